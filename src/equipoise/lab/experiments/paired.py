"""Methods against one another in paired seeds: differences, at equal balance, equivalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from equipoise.lab.experiments.base import Results, signed, spread
from equipoise.lab.results import Result, equivalence, mean_interval

MARGIN = 0.02
"""Losses (nats per token) nearer than this count as equal; fixed before the runs."""
SEEDS = 5
"""Of the leaders, at least."""
FEWEST = 3
"""Seeds that an interval of some of a method's seeds takes."""
LINE = ("switch 0.01", "switch 0.1", "switch 1", "switch 10")
"""One loss over its strength: what others are compared with at equal MaxVio."""
REFERENCE, STRONG = LINE[:2]
Groups = Mapping[str, Mapping[str, Sequence[Result]]]
"""Runs by group, as `16 experts`, and method."""


def grouped(results: Results) -> dict[str, dict[str, list[Result]]]:
    """Runs by group and method, as their names say."""
    found: dict[str, dict[str, list[Result]]] = {}
    for name, runs in results.items():
        group, _, method = name.partition(": ")
        found.setdefault(group, {})[method] = list(runs)
    return found


def paired(
    runs: Sequence[Result], reference: Sequence[Result], measure: str = "loss"
) -> list[float]:
    """A measure of the evaluation less the reference's, of the seeds that both have."""
    theirs = {run.seed: getattr(run.final, measure) for run in reference}
    return [getattr(r.final, measure) - theirs[r.seed] for r in runs if r.seed in theirs]


def at_equal_load(runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]) -> list[float]:
    """Loss less that of the Switch losses at the same MaxVio, of the seeds where these reach it.

    Straight lines in ln MaxVio between the strengths of one seed, from the least even to the most.
    """
    found = []
    for run, (loads, losses) in zip(runs, _lines(runs, methods), strict=True):
        if len(loads) > 1 and loads[0] <= run.final.max_vio <= loads[-1]:
            loss = np.interp(np.log(run.final.max_vio), np.log(loads), losses)
            found.append(run.final.loss - float(loss))
    return found


def told_at_equal_load(runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]) -> str:
    """The verdict at equal MaxVio; of the seeds that the losses reach, and what the others are.

    Those of only some seeds were picked by their outcome: a mean, and no word on it.
    """
    found = at_equal_load(runs, methods)
    if len(found) == len(runs):
        return verdict(found)
    beside = [
        (run.final.max_vio, loads)
        for run, (loads, _) in zip(runs, _lines(runs, methods), strict=True)
    ]
    if any(len(loads) < 2 for _, loads in beside):
        return "–"
    above = sum(load < loads[0] for load, loads in beside)
    below = sum(load > loads[-1] for load, loads in beside)
    others = [f"{n} {kind}" for n, kind in ((above, MORE_EVEN), (below, LESS_EVEN)) if n]
    if not found:
        return others[0].partition(" ")[2] if len(others) == 1 else ", ".join(others)
    told = difference(found if len(found) >= FEWEST else [float(np.mean(found))])
    return f"{told} ({len(found)} of {len(runs)}, {', '.join(others)})"


MORE_EVEN, LESS_EVEN = "more even than all", "less even than all"


def _lines(
    runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]
) -> list[tuple[list[float], list[float]]]:
    """MaxVio and loss of the Switch losses of each run's seed, the most even first.

    Of the strengths that all these seeds have: a seed with one more would be compared with another line.
    And of those that are more even than every weaker one: where more weight no longer evens the load, it
    only costs loss, and a line through it would lead away from what the losses can do.
    """
    seeds = {run.seed for run in runs}
    strengths = [{r.seed: r.final for r in methods.get(name, ())} for name in LINE]
    found = []
    for run in runs:
        loads: list[float] = []
        losses: list[float] = []
        for end in (s[run.seed] for s in strengths if seeds <= s.keys()):
            if not loads or end.max_vio < loads[0]:
                loads, losses = [end.max_vio, *loads], [end.loss, *losses]
        found.append((loads, losses))
    return found


def difference(values: Sequence[float], digits: int = 3) -> str:
    """A mean with its sign and its interval, where there are several."""
    mean, half = mean_interval(values)
    return signed(mean, digits) + spread(half, digits)


def verdict(differences: Sequence[float]) -> str:
    """The mean difference, its interval, and whether it is equivalent to none."""
    if not differences:
        return "–"
    mean, half = mean_interval(differences)
    words = [difference(differences)]
    if abs(mean) > half:
        words.append("higher" if mean > 0 else "lower")
    if equivalence(differences, MARGIN) < 0.05:
        words.append("equivalent")
    return ", ".join(words)
