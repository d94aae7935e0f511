"""Experiment 7: combinations of methods against the frontier of the single ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from equipoise.errors import counted
from equipoise.lab.config import Config
from equipoise.lab.experiments import frontier
from equipoise.lab.experiments.base import (
    Experiment,
    Page,
    Results,
    draw_load,
    first_seed,
    number,
    seeded,
)
from equipoise.lab.experiments.paired import (
    REFERENCE,
    SEEDS,
    STRONG,
    Groups,
    difference,
    grouped,
    paired,
    verdict,
)
from equipoise.lab.results import Result, mean_interval, settled
from equipoise.lab.terms import RECOMMENDED

FALLING = "switch, decaying"
CANDIDATES = {
    "quantile, ema 0.9": "quantile(ema=0.9)",
    "quantile, ema 0.9, and switch 0.001": "quantile(ema=0.9) + switch(scope=global, weight=0.001)",
    "quantile, ema 0.9, and sequence 0.0001": (
        "quantile(ema=0.9) + switch(scope=sequence, weight=0.0001)"
    ),
}
"""In one seed of 16 experts."""
FINALISTS = {
    "sign, decaying": "sign(rate=cosine(start=0.02, end=0.0005, steps={steps}))",
    FALLING: "switch(scope=global, weight=cosine(start=0.1, end=0.01, steps={steps}))",
    "switch, steered": "switch(scope=global, weight=target_max_vio(target=0.3))",
    "quantile and switch 0.001": "quantile + switch(scope=global, weight=0.001)",
    "quantile and sequence 0.0001": "quantile + switch(scope=sequence, weight=0.0001)",
    "quantile by histogram and switch 0.001": (
        "quantile_histogram + switch(scope=global, weight=0.001)"
    ),
    "quantile by histogram and sequence 0.0001": (
        "quantile_histogram + switch(scope=sequence, weight=0.0001)"
    ),
}
"""In as many paired seeds as the frontier's leaders, with 16 experts."""
GO_ON: tuple[str, ...] = ()
"""Finalists beyond the frontier of 16 experts: with 64 and 256, too. None is: of what is only on it, the
single method is the simpler."""
SOFTMAX = "softmax(weighting=scores)"
GROUPED = "sigmoid(selection=group_limited(groups=8, limit=4))"
LOSSES = (REFERENCE, STRONG)
"""The leaders for families that have no selection bias, nearly all of those with a softmax router."""


def configs(tier: str, seeds: int) -> list[Config]:
    """Candidates, finalists and leaders with a sigmoid router, losses with a softmax router, biases under a
    limit on groups."""
    shapes = tuple(frontier.SHAPES) if tier == "cpu" else (64,)
    first, several = shapes[0], max(SEEDS, seeds)
    steps = frontier.base(first, tier).steps
    finalists = {name: balance.format(steps=steps) for name, balance in FINALISTS.items()}
    leaders = {name: frontier.METHODS[name] for name in frontier.LEADERS}
    softmax = {**{name: leaders[name] for name in LOSSES}, FALLING: finalists[FALLING]}
    softmax["quantile"] = leaders["quantile"]
    found = seeded(frontier.named(frontier.base(first, tier), CANDIDATES), seeds)
    for experts in shapes:
        held = finalists if experts == first else {name: finalists[name] for name in GO_ON}
        plain = frontier.base(experts, tier)
        found += seeded(frontier.named(plain, {**leaders, **held}), several)
    found += seeded(frontier.named(frontier.base(64, tier, SOFTMAX), softmax, "softmax"), several)
    biases = {name: leaders[name] for name in (REFERENCE, "sign 0.01")}
    biases["quantile by histogram, with groups"] = RECOMMENDED
    limited = frontier.named(frontier.base(64, tier, GROUPED), biases, "4 of 8 groups")
    return found + seeded(limited, seeds)


def write(page: Page, results: Results) -> None:
    """A table for each number of experts, how fast balance comes, and a verdict."""
    groups = grouped(results)
    for group, methods in groups.items():
        page.heading(group)
        page.table(
            (
                *frontier.HEAD,
                f"steps, of {_steps(groups)}, until MaxVio_batch (mean of 5) stays below 0.5, median",
            ),
            [
                [*frontier.row(page, name, runs, methods), _settled(runs)]
                for name, runs in methods.items()
            ],
        )
    page.text(frontier.READING)
    page.step_times(f"`{REFERENCE}`")
    page.figure("frontier", frontier.CAPTION, lambda path: frontier.draw(groups, path))
    if first_seed(results):
        page.figure("over-time", _OVER_TIME, lambda path: _draw(groups, path))
    page.heading("Verdict")
    page.bullets(*verdicts(groups))
    page.text(_PLACES, frontier.COMPARISONS)


_PLACES = """The frontier: the leaders that no other leader is better than. Better: the lower loss or the
lower MaxVio_global, and not the higher of either, by 95 % intervals of paired seeds; a difference in MaxVio
counts however small it is, and "by MaxVio alone" says where no loss was shown to be lower. Behind the
frontier: one of it is better. Beyond: none is, and the candidate is better than one of it. On: neither."""
_OVER_TIME = "MaxVio of each step's tokens over training, mean of the last 10 steps (seed 0)."


def _steps(groups: Groups) -> int:
    return next(iter(next(iter(groups.values())).values()))[0].config.steps


def _settled(runs: Sequence[Result]) -> str:
    found = [settled(run) for run in runs]
    kept = [step for step in found if step is not None]
    if len(kept) < len(found):
        told = ", ".join(str(step) for step in sorted(kept)) or "none"
        return f"{told} ({len(kept)} of {counted(len(found), 'seed')})"
    return number(float(np.median(kept)), 0)


def leaders(group: str) -> tuple[str, ...]:
    """The methods that a group's frontier is made of."""
    return LOSSES if group.endswith("softmax") else frontier.LEADERS


def verdicts(groups: Groups) -> list[str]:
    """The leaders' frontiers; for each finalist and group: beyond, on, or behind them."""
    whole = {group: _leading(group, methods) for group, methods in groups.items()}
    whole = {g: best for g, best in whole.items() if all(len(r) >= SEEDS for r in best.values())}
    places: dict[str, dict[str, str]] = {}
    found = []
    for name in FINALISTS:
        told = []
        for group, best in whole.items():
            mine = groups[group].get(name, ())
            if len(mine) >= SEEDS:
                place = places.setdefault(name, {})[group] = _place(mine, best)
                against = "; ".join(f"against {n} {_told(mine, runs)}" for n, runs in best.items())
                why = (
                    ", by MaxVio alone" if place == "behind" and _by_load_alone(mine, best) else ""
                )
                told.append(f"{group}: {place} the frontier{why} ({against})")
        if told:
            found.append(f"{name}. {'. '.join(told)}.")
    if not found:
        return [f"No candidate has the {SEEDS} paired seeds yet that a verdict takes."]
    frontiers = "; ".join(
        f"{g}: {', '.join(_frontier(best))}{_left_out(groups[g], best)}"
        for g, best in whole.items()
    )
    held = [
        f"{name} ({', '.join(at)})" for name, at in places.items() if "behind" not in at.values()
    ]
    beyond = [
        name
        for name, at in places.items()
        if "beyond" in at.values() and "behind" not in at.values()
    ]
    return [
        f"The frontier of the single methods. {frontiers}. {_everywhere(whole)}".rstrip(),
        f"On or beyond the frontier wherever its seeds are run: {', '.join(held) or 'no candidate'}. "
        f"Beyond it: {', '.join(beyond) or 'none, so that none of them beats the single methods'}.",
        *found,
    ]


def _everywhere(whole: Mapping[str, Mapping[str, Sequence[Result]]]) -> str:
    """The methods on the frontier of every group of all leaders."""
    best = [
        _frontier(found) for group, found in whole.items() if leaders(group) == frontier.LEADERS
    ]
    if len(best) < 2:
        return ""
    names = [name for name in best[0] if all(name in found for found in best)]
    return f"On it at all {len(best)} sizes: {', '.join(names) or 'none'}."


def _leading(group: str, methods: Mapping[str, Sequence[Result]]) -> dict[str, Sequence[Result]]:
    return {name: methods.get(name, ()) for name in leaders(group)}


def _frontier(leaders: Mapping[str, Sequence[Result]]) -> dict[str, Sequence[Result]]:
    """The leaders of which none is better than another."""
    return {
        name: runs
        for name, runs in leaders.items()
        if not any(_better(other, runs) for other in leaders.values())
    }


def _place(mine: Sequence[Result], leaders: Mapping[str, Sequence[Result]]) -> str:
    """Where a candidate stands to the frontier."""
    best = _frontier(leaders).values()
    if any(_better(runs, mine) for runs in best):
        return "behind"
    return "beyond" if any(_better(mine, runs) for runs in best) else "on"


def _by_load_alone(mine: Sequence[Result], leaders: Mapping[str, Sequence[Result]]) -> bool:
    """Whether no leader that is better than a candidate is shown to have the lower loss."""
    better = [runs for runs in leaders.values() if _better(runs, mine)]
    return not any(_below(paired(runs, mine)) for runs in better)


def _left_out(methods: Mapping[str, Sequence[Result]], best: Mapping[str, Sequence[Result]]) -> str:
    """That `quantile` is better, where the frontier is of losses alone."""
    runs = methods.get(frontier.PLAIN_BIAS, ())
    if frontier.PLAIN_BIAS in best or len(runs) < SEEDS:
        return ""
    beaten = [name for name, theirs in _frontier(best).items() if _better(runs, theirs)]
    told = f"; {frontier.PLAIN_BIAS} is better than {' and '.join(beaten)}" if beaten else ""
    return f" (of losses alone{told})"


def _better(mine: Sequence[Result], theirs: Sequence[Result]) -> bool:
    """Shown to have the lower loss or MaxVio, by 95 % intervals of paired seeds, and the higher of none."""
    found = [paired(mine, theirs, measure) for measure in ("loss", "max_vio")]
    return any(map(_below, found)) and not any(_below([-x for x in d]) for d in found)


def _below(differences: Sequence[float]) -> bool:
    mean, half = mean_interval(differences)
    return mean + half < 0


def _told(mine: Sequence[Result], theirs: Sequence[Result]) -> str:
    loads = difference(paired(mine, theirs, "max_vio"), 2)
    return f"loss {verdict(paired(mine, theirs))}, MaxVio {loads}"


def _draw(groups: Groups, path: Path) -> None:
    panels = {group: first for group, methods in groups.items() if (first := first_seed(methods))}
    draw_load(panels, path, window=10, width=9.0)


_CHOSEN = " and ".join(f"`{name}`" for name in frontier.CHOSEN)


EXPERIMENT = Experiment(
    "recipe",
    "A better recipe",
    """Is there a combination of published methods, or a schedule of one, that is on or beyond the frontier of
    the single ones at every number of experts? Finalists, four combinations and three schedules, are run
    with 16 experts, in the seeds of `frontier`'s leaders, and go on to 64 and 256 if they are beyond the
    frontier there. Families without a selection bias (Mixtral, OLMoE, Qwen3-MoE, ...) have no place to keep
    one: for them it is asked of losses alone, with the softmax router that they have and 64 experts;
    `quantile` beside them shows what a place for it would be worth. With experts limited to 4 of 8 groups,
    as DeepSeek-V3 limits them, biases are run in one seed.""",
    configs,
    write,
    (
        """that a combination is on the frontier with 64 or 256 experts, where it was not run;""",
        f"""that the single methods of the frontier are the best: {_CHOSEN} were made leaders after one seed
        of 16 experts, which is among the five, and some are better than others only by a little in
        MaxVio;""",
        """that a candidate is better where runs are longer: these see few tokens a parameter;""",
        """that the finalists are the best candidates: they were settled on when one seed of 16 experts had
        been seen, the two with `quantile` when all five of `quantile` had, the two with its histogram when
        all of the others had, and those seeds are among the five; nothing that the other experiments
        vary (scales of the weights, scopes, capacities) is combined with them;""",
        """anything about capacity, or models that are fine-tuned.""",
    ),
)
