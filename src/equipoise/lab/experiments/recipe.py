"""Experiment 7: combinations of methods against the frontier of the single ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from equipoise.lab.config import Config
from equipoise.lab.experiments import frontier
from equipoise.lab.experiments.base import Experiment, Page, Results, draw_load, number, seeded
from equipoise.lab.results import Result, mean_interval, settled

CANDIDATES = {
    "quantile, ema 0.9": "quantile(ema=0.9)",
    "sign, decaying": "sign(rate=cosine(start=0.02, end=0.0005, steps={steps}))",
    "quantile and switch 0.001": "quantile(ema=0.9) + switch(scope=global, weight=0.001)",
    "quantile and sequence 0.0001": "quantile(ema=0.9) + switch(scope=sequence, weight=0.0001)",
    "switch, steered": "switch(scope=global, weight=target_max_vio(target=0.3))",
    "switch, decaying": "switch(scope=global, weight=cosine(start=0.1, end=0.01, steps={steps}))",
}
"""Of a bias, of a bias and a loss, and of a loss alone, for models that have no place for a bias."""
FINALISTS = ("sign, decaying", "switch, decaying", "switch, steered")
"""Run in as many paired seeds as the frontier's leaders: what `balance.recommended` gives. Chosen for what
they need as much as by one seed of 16 experts: `sign` need not know of group limits, as quantiles do;
`switch, decaying` needs no target, as `switch, steered` does, and which no weight reaches where chance
alone gives more."""


def configs(tier: str, seeds: int) -> list[Config]:
    """All candidates at every number of experts, then the finalists in seeds, with the leaders."""
    shapes = frontier.SHAPES if tier == "cpu" else {64: frontier.SHAPES[64]}
    steps = frontier.base(next(iter(shapes)), tier).steps
    candidates = {name: balance.format(steps=steps) for name, balance in CANDIDATES.items()}
    finalists = {name: candidates.pop(name) for name in FINALISTS}
    leaders = {name: frontier.METHODS[name] for name in frontier.LEADERS}
    found: list[Config] = []
    for experts in shapes:
        found += seeded(frontier.named(experts, candidates, tier), seeds)
    for experts in shapes:
        several = frontier.named(experts, {**leaders, **finalists}, tier)
        found += seeded(several, max(frontier.SEEDS, seeds))
    return found


def write(page: Page, results: Results) -> None:
    """A table for each number of experts, how fast balance comes, and a verdict."""
    by_experts = frontier.grouped(results)
    for experts, methods in by_experts.items():
        page.heading(f"{experts} experts")
        page.table(
            (*frontier.HEAD, f"steps, of {_steps(by_experts)}, until MaxVio_batch stays below 0.5"),
            [
                [*frontier.row(page, name, runs, methods), _settled(runs)]
                for name, runs in methods.items()
            ],
        )
    page.text(frontier.READING)
    page.step_times("`none`")
    page.figure("frontier", frontier.CAPTION, lambda path: frontier.draw(by_experts, path))
    page.figure("over-time", _OVER_TIME, lambda path: _draw(by_experts, path))
    page.heading("Verdict")
    page.bullets(*verdicts(by_experts))


_OVER_TIME = "MaxVio of each step's tokens over training, mean of the last 10 steps (seed 0)."


def _steps(by_experts: Mapping[int, Mapping[str, Sequence[Result]]]) -> int:
    return next(iter(next(iter(by_experts.values())).values()))[0].config.steps


def _settled(runs: Sequence[Result]) -> str:
    found = [settled(run) for run in runs]
    kept = [step for step in found if step is not None]
    if len(kept) < len(found):
        return "–" if not kept else f"{min(kept)} or more ({len(kept)} of {len(found)} seeds)"
    return number(float(np.median(kept)), 0)


def verdicts(by_experts: Mapping[int, Mapping[str, Sequence[Result]]]) -> list[str]:
    """For each finalist and number of experts: beyond, on, or behind the leaders' frontier."""
    found = []
    for name in FINALISTS:
        told = []
        for experts, methods in by_experts.items():
            leaders = {n: methods[n] for n in frontier.LEADERS if n != "none" and n in methods}
            if len(methods.get(name, ())) >= frontier.SEEDS and leaders:
                told.append(f"{experts} experts: {_against(methods[name], leaders)}")
        if told:
            found.append(f"{name}. {'. '.join(told)}.")
    return found or [
        f"No candidate has the {frontier.SEEDS} paired seeds yet that a verdict takes."
    ]


def _against(mine: Sequence[Result], leaders: Mapping[str, Sequence[Result]]) -> str:
    """A candidate against each leader of the frontier, in loss and in MaxVio, of paired seeds."""
    told = []
    for leader, runs in leaders.items():
        loads = {run.seed: run.final.max_vio for run in runs}
        differences = [r.final.max_vio - loads[r.seed] for r in mine if r.seed in loads]
        mean, half = mean_interval(differences)
        told.append(
            f"against {leader}, loss {frontier.verdict(frontier.paired(mine, runs))}; MaxVio "
            f"{mean:+.2f} ± {half:.2f}"
        )
    return "; ".join(told)


def _draw(by_experts: Mapping[int, Mapping[str, Sequence[Result]]], path: Path) -> None:
    panels = {
        f"{experts} experts": {name: runs[0] for name, runs in methods.items()}
        for experts, methods in by_experts.items()
    }
    draw_load(panels, path, window=10, width=9.0)


EXPERIMENT = Experiment(
    "recipe",
    "A better recipe",
    """Is there a combination of published methods that is on or beyond the frontier of the single ones at
    every number of experts? Candidates of two kinds: biases, which a model with a selection bias of its
    own keeps in its checkpoint, and losses, for the others. The frontier's leaders are
    `frontier`'s own runs.""",
    configs,
    write,
    (
        """that a candidate is better where runs are longer: these see about one token a parameter;""",
        """that the finalists are the best candidates: they were chosen among six with one seed of 16
        experts, in which other methods were ahead of both, by no more than seeds may differ;""",
        """anything about softmax routers, capacity, or models that are fine-tuned.""",
    ),
)
