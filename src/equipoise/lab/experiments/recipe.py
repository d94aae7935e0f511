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
"""Run in as many paired seeds as the frontier's leaders. Chosen for what they need as much as by one seed of
16 experts: `sign` need not know of group limits, as quantiles do, `switch, decaying` needs no target.
`balance.recommended` gives the frontier's `quantile` to models with a selection bias of their own, and
`switch, decaying` to the others."""


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
    page.text(_PLACES, frontier.COMPARISONS)


_PLACES = """The frontier: the leaders that no other leader is better than. Better: the lower loss or the
lower MaxVio_global, and not the higher of either, by 95 % intervals of paired seeds. Behind the frontier: one
of it is better. Beyond: none is, and the candidate is better than one of it. On: neither."""
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
    places: dict[str, dict[int, str]] = {}
    for name in FINALISTS:
        told = []
        for experts, methods in by_experts.items():
            leaders = {n: methods.get(n, ()) for n in frontier.LEADERS}
            mine = methods.get(name, ())
            if all(len(runs) >= frontier.SEEDS for runs in (mine, *leaders.values())):
                place = places.setdefault(name, {})[experts] = _place(mine, leaders)
                against = "; ".join(
                    f"against {leader} {_told(mine, runs)}" for leader, runs in leaders.items()
                )
                told.append(f"{experts} experts: {place} the frontier ({against})")
        if told:
            found.append(f"{name}. {'. '.join(told)}.")
    if not found:
        return [f"No candidate has the {frontier.SEEDS} paired seeds yet that a verdict takes."]
    held = [n for n, at in places.items() if "behind" not in at.values()]
    tried = ", ".join(str(n) for n in by_experts if any(n in at for at in places.values()))
    return [
        f"On or beyond the frontier wherever the seeds are run ({tried} experts): "
        f"{', '.join(held) or 'no candidate'}.",
        *found,
    ]


def _place(mine: Sequence[Result], leaders: Mapping[str, Sequence[Result]]) -> str:
    """Where a candidate stands to the leaders of which none is better than another."""
    best = [
        runs for runs in leaders.values() if not any(_better(o, runs) for o in leaders.values())
    ]
    if any(_better(runs, mine) for runs in best):
        return "behind"
    return "beyond" if any(_better(mine, runs) for runs in best) else "on"


def _better(mine: Sequence[Result], theirs: Sequence[Result]) -> bool:
    """Shown to have the lower loss or MaxVio, by 95 % intervals of paired seeds, and the higher of none."""
    found = [mean_interval(d) for d in _differences(mine, theirs)]
    less = any(mean + half < 0 for mean, half in found)
    return less and not any(mean - half > 0 for mean, half in found)


def _differences(
    mine: Sequence[Result], theirs: Sequence[Result]
) -> tuple[list[float], list[float]]:
    """In loss and in MaxVio_global, of the seeds that both have."""
    other = {run.seed: run.final for run in theirs}
    pairs = [(r.final, other[r.seed]) for r in mine if r.seed in other]
    return [a.loss - b.loss for a, b in pairs], [a.max_vio - b.max_vio for a, b in pairs]


def _told(mine: Sequence[Result], theirs: Sequence[Result]) -> str:
    losses, loads = _differences(mine, theirs)
    mean, half = mean_interval(loads)
    return f"loss {frontier.verdict(losses)}, MaxVio {mean:+.2f} ± {half:.2f}"


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
        """that a candidate is better where runs are longer: these see few tokens a parameter;""",
        """that the finalists are the best candidates: they were settled on when one seed of 16 experts had
        been seen, in which others were ahead of them, and that seed is one of the five;""",
        """anything about softmax routers, capacity, or models that are fine-tuned.""",
    ),
)
