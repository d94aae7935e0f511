"""Experiment 5: the other remedies that people propose against unequal load, each by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equipoise.lab import figures
from equipoise.lab.config import Config
from equipoise.lab.experiments import leaks
from equipoise.lab.experiments.base import (
    Experiment,
    Page,
    Results,
    average,
    first_seed,
    number,
    seeded,
    signed,
    spread,
)
from equipoise.lab.experiments.collapse import STARVED, SWITCH, WINDOW
from equipoise.lab.recipes import gpu, small
from equipoise.lab.results import Result, mean_interval, starved

PLAIN, BALANCED = "no balancing", "Switch loss 0.01"
LIFE = "patience=10, below=0.01"
"""An expert is dead after so many steps below so much of its fair share."""


def configs(tier: str, seeds: int) -> list[Config]:
    """One remedy a run, evaluated on a part of the held-out text."""
    base = small() if tier == "cpu" else gpu().change({"tokens": 50_000_000})
    base = base.change({"model.router": "softmax(weighting=scores)", "evaluation_tokens": 100_000})
    runs = {**_telling(base), **_further(base)}
    return seeded([base.change({"name": n, **c}) for n, c in runs.items()], seeds)


Changes = dict[str, dict[str, object]]


def _telling(base: Config) -> Changes:
    """A run of each kind, the most telling first."""
    small = base.data.row_length // 16
    slots = base.data.row_length * base.model.top_k // base.model.experts
    return {
        PLAIN: {},
        BALANCED: {"balance": SWITCH},
        "expert choice": {"model.router": "expert_choice"},
        f"expert choice, chunks of {small}": _choice(small),
        f"expert choice, chunks of {small}, shuffled": _choice(small, shuffle=True),
        "capacity 1.25, drop": _capacity(1.25),
        "life cycle, revive": {"balance": f"lifecycle(dead=revive, {LIFE})"},
        "entropy, weight 0.01": {"balance": "entropy(weight=0.01)"},
        "temperature 2": _softmax("temperature=2.0"),
        "noise, learned": _softmax("noise=learned"),
        "random second expert": _softmax("random_second=True"),
        "expert threshold": {"model.router": "expert_threshold"},
        "life cycle, core and reserve": {
            "balance": "lifecycle(dead=keep, reserve=0.5, demand=1.0, window=10)"
        },
        "soft MoE": {"model.router": f"soft(slots={slots})"},
    }


def _further(base: Config) -> Changes:
    """Other strengths and forms."""
    quarter, row = base.data.row_length // 4, base.data.row_length
    both = f"{SWITCH} + capacity(factor=1.25)"
    return {
        f"expert choice, chunks of {quarter}": _choice(quarter),
        f"expert choice, chunks of {row}": _choice(row),
        f"expert choice, chunks of {quarter}, shuffled": _choice(quarter, shuffle=True),
        f"expert choice, chunks of {row}, shuffled": _choice(row, shuffle=True),
        "life cycle, retire": {"balance": f"lifecycle(dead=retire, {LIFE})"},
        "life cycle, freeze and wake": {
            "balance": f"lifecycle(dead=freeze, {LIFE}, asleep=20, awake=10)"
        },
        "adversarial 0.01": {"balance": "adversarial(weight=0.01)"},
        "entropy, weight -0.01": {"balance": "entropy(weight=-0.01)"},
        "temperature 0.5": _softmax("temperature=0.5"),
        "noise, jitter 0.1": _softmax("jitter=0.1"),
        "capacity 1.25, reroute": _capacity(1.25, "overflow=reroute"),
        "capacity 1.25, drop, and Switch loss 0.01": {"balance": both},
        "capacity 1.25, dynamic": _capacity(1.25, "recent=0.9"),
        "capacity 1.0, drop": _capacity(1.0),
        "capacity 1.25, pad": {"model.capacity": "capacity(factor=1.25, overflow=pad)"},
        "capacity 1.0, reroute": _capacity(1.0, "overflow=reroute"),
        "noise, jitter 0.01": _softmax("jitter=0.01"),
        "adversarial 0.1": {"balance": "adversarial(weight=0.1)"},
    }


def _softmax(option: str) -> dict[str, object]:
    return {"model.router": f"softmax(weighting=scores, {option})"}


def _choice(chunk: int, shuffle: bool = False) -> dict[str, object]:
    shuffled = ", shuffle=True" if shuffle else ""
    return {"model.router": f"expert_choice(chunk={chunk}{shuffled})"}


def _capacity(factor: float, *options: str) -> dict[str, object]:
    return {"balance": f"capacity({', '.join([f'factor={factor}', *options])})"}


def write(page: Page, results: Results) -> None:
    """Tables and figures."""
    ranked = {n: list(runs) for n, runs in results.items() if not leaks.looks_ahead(runs[0])}
    order = sorted(ranked, key=lambda name: (name != PLAIN, name != BALANCED, name))
    ranked = {name: ranked[name] for name in order}
    if ranked:
        page.heading("Result")
        page.table(_HEAD, [_row(page, name, runs, ranked) for name, runs in ranked.items()])
        page.text(_READING, *_findings(ranked))
        page.step_times("no balancing")
        page.figure("load", _LOAD, lambda path: _draw_load(ranked, path))
    _life_cycles(page, ranked)
    ahead = {n: list(runs) for n, runs in results.items() if n not in ranked}
    leaks.write(page, ahead, ranked.get(PLAIN))
    page.heading("Settings")
    page.table(("run", "setting"), [(n, _setting(runs[0].config)) for n, runs in results.items()])


def _setting(config: Config) -> str:
    """What sets a run apart from the one without balancing."""
    if config.balance != "none":
        return f"`balance={config.balance}`"
    if config.model.capacity != "none":
        return f"`model.capacity={config.model.capacity}`"
    return f"`model.router={config.model.router}`"


_HEAD = (
    "run",
    "held-out loss",
    "more than without",
    "MaxVio_global (chance)",
    "starved",
    "dropped",
    "experts a token, trained and held out",
    "tokens without one",
    "step time, of no balancing",
)
_READING = f"""Loss in nats per token, mean of the domains, and its difference to the run without
balancing; with several seeds means, and 95 % intervals by Student's t, of differences by seed.
MaxVio_global: busiest expert's selections over the mean of all, minus 1, on the held-out text that was
evaluated, every domain weighing alike, mean over layers. Starved: share of the layer-expert cells
with less than {STARVED:.0%} of a fair share of a window of {WINDOW} steps, in the last quarter of
training. Experts that a life cycle has taken out count in both. Dropped: share of the selections of
the last tenth of training that went to no expert; MaxVio is of the selections before. Tokens
without one: those that no expert's threshold let in, in the same steps, mean over layers. A capacity acts
in training only, but for `pad`, whose layers drop in evaluation too, domain by domain. Expert threshold
scores by a sigmoid, the others by a softmax."""
_LOAD = """MaxVio_global (dotted: chance) and held-out loss of every remedy, most even load first;
hollow: without balancing and with the Switch loss. One seed does not order losses."""


def _row(page: Page, name: str, runs: Sequence[Result], ranked: Results) -> tuple[str, ...]:
    more, more_half = _more(runs, ranked)
    floor = runs[0].final.max_vio_floor(runs[0].config.model.top_k)
    low = float(np.mean([_starved(r) for r in runs]))
    dropped = float(np.mean([r.dropped_share for r in runs]))
    return (
        name,
        average([r.final.loss for r in runs], 3),
        "–" if name == PLAIN or np.isnan(more) else f"{signed(more)}{spread(more_half)}",
        f"{average([r.final.max_vio for r in runs])} ({number(floor, 3)})",
        "–" if np.isnan(low) else f"{100 * low:.0f} %",
        "–" if np.isnan(dropped) else f"{100 * dropped:.1f} %",
        f"{average([_experts(r) for r in runs])}, "
        f"{average([r.final.experts_per_token for r in runs])}",
        leaks.unchosen(runs),
        page.step_time(runs[0], ranked.get(PLAIN)),
    )


def _more(runs: Sequence[Result], ranked: Results) -> tuple[float, float]:
    """Loss less that without balancing, seed by seed: mean, and half its interval."""
    plain = {r.seed: r.final.loss for r in ranked.get(PLAIN, ())}
    found = [r.final.loss - plain[r.seed] for r in runs if r.seed in plain]
    return mean_interval(found) if found else (float("nan"), float("nan"))


def _starved(run: Result) -> float:
    found = starved(run.counts, STARVED, WINDOW)
    return float(found[-max(1, len(found) // 4) :].mean()) if len(found) else float("nan")


def _experts(run: Result) -> float:
    """Selected for a token, in the last tenth of training."""
    counts_NLE = run.counts[-max(1, len(run.counts) // 10) :]
    return float(counts_NLE.sum(2).mean()) / run.config.step_tokens


def _findings(ranked: Results) -> list[str]:
    """What the table says, in words made from its numbers."""
    if not {PLAIN, BALANCED} <= ranked.keys():
        return []
    vio = {n: float(np.mean([r.final.max_vio for r in runs])) for n, runs in ranked.items()}
    others = sorted((n for n in vio if n not in (PLAIN, BALANCED)), key=vio.__getitem__)
    half = vio[PLAIN] / 2
    limits = (vio[BALANCED], half, 0.9 * vio[PLAIN], 1.1 * vio[PLAIN], float("inf"))
    told = (
        "as even as with the Switch loss or more",
        f"less even than that, up to {half:.2f}",
        f"above {half:.2f}, but more even than without balancing by more than a tenth",
        "within a tenth of MaxVio without balancing",
        "less even than without balancing by more than a tenth",
    )
    found = [f"MaxVio_global, of selections before any capacity and with experts that a life cycle has "
             f"taken out, is {vio[PLAIN]:.2f} without balancing (half of it: {half:.2f}), "
             f"{vio[BALANCED]:.2f} with the Switch loss."]  # fmt: skip
    below = -1.0
    for limit, words in zip(limits, told, strict=True):
        names = [f"{n} ({vio[n]:.2f})" for n in others if below < vio[n] <= limit]
        below = max(below, limit)
        if names:
            found.append(f"{words[0].upper()}{words[1:]}: {', '.join(names)}.")
    drops = {n: float(np.mean([r.dropped_share for r in runs])) for n, runs in ranked.items()}
    told_drops = [f"{n}: {100 * share:.1f} %" for n, share in drops.items() if share == share]
    if told_drops:
        found.append(f"Dropped at the end of training: {'; '.join(told_drops)}.")
    return [" ".join(found)]


def _life_cycles(page: Page, ranked: Results) -> None:
    rows = []
    for name, run in first_seed(ranked).items():
        events = run.summary.get("events")
        if events is not None:
            told = Counter(event["what"] for event in events)
            said = ", ".join(f"{n} {what}" for what, n in told.items()) or "nothing"
            cells = run.counts.shape[1] * run.counts.shape[2]
            rows.append((name, said, f"{_out(events)} of {cells}"))
    if rows:
        page.heading("What the life cycles did")
        page.table(("run", "events", "cells out of selection at the end"), rows)
        page.text(
            """Of seed 0. Revived: given the weights of the layer's busiest expert, with noise. The
            reserve is half of each layer's experts; one is woken, as a copy of the busiest, when the
            MaxVio of those awake was above 1 for 10 steps in a row."""
        )


def _out(events: Sequence[dict[str, object]]) -> int:
    """Cells that events took out of selection and none brought back."""
    last = {(event["layer"], event["expert"]): event["what"] for event in events}
    return sum(what in ("frozen", "retired", "reserved") for what in last.values())


def _draw_load(ranked: Results, path: Path) -> None:
    means = {
        n: (
            float(np.mean([r.final.max_vio for r in runs])),
            float(np.mean([r.final.loss for r in runs])),
        )
        for n, runs in ranked.items()
    }
    names = sorted(means, key=lambda name: means[name][0], reverse=True)
    figure, axes = figures.canvas(2, width=9.0, height=1.0 + 0.22 * len(names))
    first = next(iter(ranked.values()))[0]
    for column, title in enumerate(("MaxVio_global", "held-out loss, nats per token")):
        axis = axes[0, column]
        for place, name in enumerate(names):
            hollow = name in (PLAIN, BALANCED)
            fill = "white" if hollow else figures.COLOURS[0]
            axis.plot(means[name][column], place, "o", color=figures.COLOURS[0], mfc=fill)
        axis.set_yticks(range(len(names)), names if column == 0 else [], fontsize=8)
        axis.set_xlabel(title)
        if column:
            axis.locator_params(axis="x", nbins=5)
    axes[0, 0].set_xscale("log")
    axes[0, 0].xaxis.set_major_formatter("{x:g}")
    chance = first.final.max_vio_floor(first.config.model.top_k)
    axes[0, 0].axvline(chance, color="#888888", linewidth=0.9, linestyle=":")
    figures.save(figure, path)


EXPERIMENT = Experiment(
    "remedies",
    "The other remedies that people propose",
    """Published: experts that choose their tokens leak the future (arXiv 2408.15664: in a 2 B model trained
    on 100 B tokens, choosing within 512 tokens instead of 8192 lowers the loss by about 10 %, and
    shuffling tokens over chunks takes the drop away). Thresholds in place of the choice are said to have
    the lower loss than top-k, by one run (2603.11535, here from a secondary source). For noise, a random
    second expert, limits of capacity, soft mixtures, temperature, entropy, adversarial idleness, reviving,
    freezing, retiring, and a reserve of experts no measured effect on a language model is among the
    sources used here; whose proposals they are docs/nn.md and docs/balance.md say.""",
    configs,
    write,
    (
        """which remedy gives the lower loss: single runs of few tokens do not tell; without balancing
        few experts see more tokens each, which at this length is an advantage;""",
        """that a remedy cannot do better: one or two strengths each, none tuned, and a life cycle of
        10 steps in a run of some hundred is hasty;""",
        """that expert choice leaks no more than is shown: a model has to learn to use what the choice
        tells, and the published effect is after 100 B tokens; what it tells of the domain of the
        text to come is not in the figure; nor can its losses as trained, or those of soft MoE, be
        set beside the others';""",
        """what a capacity saves in time on several devices, where the fullest expert is waited for:
        these runs have one process.""",
    ),
)
