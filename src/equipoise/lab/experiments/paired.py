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
        loads, losses = _line(run.seed, methods)
        if len(loads) > 1 and loads[0] <= run.final.max_vio <= loads[-1]:
            loss = np.interp(np.log(run.final.max_vio), np.log(loads), losses)
            found.append(run.final.loss - float(loss))
    return found


def told_at_equal_load(runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]) -> str:
    """The verdict at equal MaxVio; where not all seeds' MaxVio is one that the losses reach, of how many.

    Where it is none: whether each run is more even than all Switch losses of its seed, or less.
    """
    found = at_equal_load(runs, methods)
    if found:
        return verdict(found) + (
            "" if len(found) == len(runs) else f" ({len(found)} of {len(runs)})"
        )
    beside = [(run.final.max_vio, _line(run.seed, methods)[0]) for run in runs]
    if not all(len(loads) > 1 for _, loads in beside):
        return "–"
    if all(load < loads[0] for load, loads in beside):
        return "more even than all"
    return "less even than all" if all(load > loads[-1] for load, loads in beside) else "–"


def _line(
    seed: int, methods: Mapping[str, Sequence[Result]]
) -> tuple[Sequence[float], Sequence[float]]:
    """MaxVio and loss of a seed's Switch losses, the most even first."""
    ends = [run.final for name in LINE for run in methods.get(name, ()) if run.seed == seed]
    line = sorted((end.max_vio, end.loss) for end in ends)
    return [load for load, _ in line], [loss for _, loss in line]


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
