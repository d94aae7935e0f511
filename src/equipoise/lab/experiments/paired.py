"""Methods against one another in paired seeds: differences, at equal balance, equivalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from equipoise.lab.experiments.base import Results
from equipoise.lab.results import Result, equivalence, mean_interval

MARGIN = 0.02
"""Losses (nats per token) nearer than this count as equal; fixed before the runs."""
SEEDS = 5
"""Of the leaders, at least."""
LINE = ("switch 0.01", "switch 0.1", "switch 1", "switch 10")
"""One loss over its strength: what others are compared with at equal MaxVio, in seeds that have it."""
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


def paired(runs: Sequence[Result], reference: Sequence[Result]) -> list[float]:
    """Loss less the reference's, of the seeds that both have."""
    theirs = {run.seed: run.final.loss for run in reference}
    return [run.final.loss - theirs[run.seed] for run in runs if run.seed in theirs]


def at_equal_load(runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]) -> list[float]:
    """Loss less that of the Switch losses at the same MaxVio, of the seeds where these reach it.

    Straight lines in ln MaxVio between the strengths of one seed, from the least even to the most.
    """
    found = []
    for run in runs:
        ends = [r.final for name in LINE for r in methods.get(name, ()) if r.seed == run.seed]
        line = sorted((float(np.log(end.max_vio)), end.loss) for end in ends)
        load = float(np.log(run.final.max_vio))
        if len(line) > 1 and line[0][0] <= load <= line[-1][0]:
            loads, losses = zip(*line, strict=True)
            found.append(run.final.loss - float(np.interp(load, loads, losses)))
    return found


def told_at_equal_load(runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]) -> str:
    """The verdict at equal MaxVio; where not all seeds' MaxVio is one that the losses reach, of how many."""
    found = at_equal_load(runs, methods)
    if not found:
        return _beside(runs, methods)
    return verdict(found) + ("" if len(found) == len(runs) else f" ({len(found)} of {len(runs)})")


def _beside(runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]) -> str:
    """Where all runs lie that are on no line: a dash where there is none."""
    loads = {
        name: [r.final.max_vio for r in methods.get(name, ())] for name in LINE if name in methods
    }
    mine = [run.final.max_vio for run in runs]
    if len(loads) < 2:
        return "–"
    ends = [load for found in loads.values() for load in found]
    if max(mine) < min(ends):
        return "more even than all"
    return "less even than all" if min(mine) > max(ends) else "–"


def verdict(differences: Sequence[float]) -> str:
    """The mean difference, its interval, and whether it is equivalent to none."""
    if not differences:
        return "–"
    mean, half = mean_interval(differences)
    if half != half:
        return f"{mean:+.3f}"
    words = [f"{mean:+.3f} ± {half:.3f}"]
    if abs(mean) > half:
        words.append("higher" if mean > 0 else "lower")
    if equivalence(differences, MARGIN) < 0.05:
        words.append("equivalent")
    return ", ".join(words)
