"""`dead`: which experts are never or hardly ever selected, and how sure that is.

Every expert of every layer gets one verdict, the first of these that holds:

1. dead: never selected, and so many effective tokens went by that its true ratio is below
   `dead_ratio` of a fair share (upper bound, 95 %).
2. undetermined: never selected, but too few effective tokens to say the above. Not dead.
3. specialist: cold overall, but not in some subject, category or domain, by a test whose false
   finds are held at 5 % over all layers, experts and groups (Benjamini-Hochberg).
4. cold: the whole interval of its ratio lies below `cold`.
5. idle: selected, but with a run of at least `idle` tokens without a selection.
6. undetermined: its ratio is below `cold`, its interval is not.
7. active.

Being idle is a fact of this run, being cold or dead a statement about the model on such text;
so the latter go first, and idle goes before "cannot tell".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.diagnose.evidence import Evidence, LayerEvidence, gather
from equipoise.diagnose.stats import idle_run, plain
from equipoise.errors import EquipoiseError
from equipoise.metrics import bounds, load
from equipoise.trace import Trace

IDLE = 10_000
"""Tokens without a selection that make an expert idle."""

COLD = 0.1
"""Ratio below which an expert is cold: a tenth of a fair share, the laxest of the thresholds in
use (0, 1 % and 10 %); below it an expert's parameters are bought for a tenth of their price."""

DEAD = 0.01
"""Ratio that a never selected expert's upper bound has to stay below: the 1 % in use."""

FALSE_FINDS = 0.05

VERDICTS = ("dead", "cold", "specialist", "idle", "undetermined", "active")
"""Worst first."""

_LABELS = ("subject", "category", "domain")


@dataclass(frozen=True)
class _Layer:
    """What the verdicts of one layer are taken from, arrays [E]."""

    counts_E: NDArray[np.int64]
    tokens: int
    ratio_E: NDArray[np.float64]
    high_E: NDArray[np.float64]
    """Upper end of the two-sided interval of the ratio; nan where unknown."""
    share_upper_E: NDArray[np.float64]
    """One-sided 95 % bound of the share."""
    longest: list[int | None]
    current: list[int | None]


def dead(
    trace: Trace, idle: int = IDLE, *, cold: float = COLD, dead_ratio: float = DEAD
) -> dict[str, Any]:
    """A verdict on every expert of every layer, in plain Python values.

    {"idle_threshold", "cold_threshold", "dead_threshold", "verdicts": {verdict: experts},
    "experts": [{"layer", "path", "expert", "verdict", "count", "share", "share_upper", "ratio",
    "ratio_interval", "longest_idle", "current_idle", "where"}]}. `share_upper` is a one-sided 95 %
    bound; idle runs are None where token rows are missing; `where` lists what a specialist serves.
    """
    _check(idle, cold, dead_ratio)
    evidence = gather(trace)
    layers = [_examined(trace, i, evidence) for i in range(len(trace.layers))]
    where = _served(trace, layers, evidence, cold)
    rows = [
        _row(trace, i, e, layer, where.get((i, e), []), idle, cold, dead_ratio)
        for i, layer in enumerate(layers)
        for e in range(trace.layers[i].experts)
    ]
    found = [row["verdict"] for row in rows]
    return {
        "idle_threshold": idle,
        "cold_threshold": cold,
        "dead_threshold": dead_ratio,
        "verdicts": {name: found.count(name) for name in VERDICTS},
        "experts": rows,
    }


def _check(idle: int, cold: float, dead_ratio: float) -> None:
    if idle < 1:
        raise EquipoiseError(f"the idle threshold is a number of tokens from 1 up, not {idle}")
    if not 0 < dead_ratio <= cold < 1:
        raise EquipoiseError(
            f"thresholds are ratios with 0 < dead <= cold < 1, not dead {dead_ratio}, cold {cold}"
        )


def _examined(trace: Trace, index: int, evidence: Evidence) -> _Layer:
    layer, here = trace.layers[index], evidence.layers[index]
    counts_E = trace.counts_LE[index, : layer.experts]
    tokens = int(trace.tokens_L[index])
    _, high_E = here.share_intervals
    trials_E = effective_trials(here, tokens)
    upper_E = bounds.upper_bound(counts_E * trials_E / max(tokens, 1), trials_E) / layer.top_k
    runs = [
        [idle_run(run_E, e, counts_E, tokens) for e in range(layer.experts)]
        for run_E in (here.longest_idle_E, here.current_idle_E)
    ]
    ratio_E = load.ratio(counts_E)
    return _Layer(counts_E, tokens, ratio_E, high_E * layer.experts, upper_E, *runs)


def effective_trials(here: LayerEvidence, tokens: int) -> NDArray[np.float64]:
    """Effective tokens behind each expert's count, [E]; the number of blocks where unknown.

    Too few blocks to measure how alike their tokens are: then each counts as one observation.
    """
    trials_E = here.effect.trials(tokens, here.blocks)
    return np.where(np.isnan(trials_E), min(here.blocks, tokens), trials_E)


def _row(
    trace: Trace,
    index: int,
    expert: int,
    here: _Layer,
    where: list[dict[str, Any]],
    idle: int,
    cold: float,
    dead_ratio: float,
) -> dict[str, Any]:
    layer = trace.layers[index]
    return {
        "layer": layer.layer,
        "path": layer.path,
        "expert": expert,
        "verdict": _verdict(here, expert, layer.experts, bool(where), idle, cold, dead_ratio),
        "count": int(here.counts_E[expert]),
        "share": plain(here.ratio_E[expert] / layer.experts),
        "share_upper": plain(here.share_upper_E[expert]),
        "ratio": plain(here.ratio_E[expert]),
        "ratio_upper": plain(here.share_upper_E[expert] * layer.experts),
        "longest_idle": here.longest[expert],
        "current_idle": here.current[expert],
        "where": where,
    }


def _verdict(
    here: _Layer,
    expert: int,
    experts: int,
    serves: bool,
    idle: int,
    cold: float,
    dead_ratio: float,
) -> str:
    if here.counts_E[expert] == 0:
        proven = here.share_upper_E[expert] * experts < dead_ratio
        return "dead" if proven else "undetermined"
    if serves:
        return "specialist"
    if here.high_E[expert] < cold:
        return "cold"
    if (here.longest[expert] or 0) >= idle:
        return "idle"
    return "undetermined" if here.ratio_E[expert] < cold else "active"


def _served(
    trace: Trace, layers: list[_Layer], evidence: Evidence, cold: float
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """For cold experts by (layer index, expert): groups in which they are provably not cold."""
    cells = [
        (i, int(e))
        for i, layer in enumerate(layers)
        for e in np.flatnonzero((layer.counts_E > 0) & (layer.high_E < cold))
    ]
    if not cells:
        return {}
    trials = [effective_trials(e, x.tokens) for e, x in zip(evidence.layers, layers, strict=True)]
    tested = []
    for by in _LABELS:
        groups = trace.groups(by)
        if len(groups) < 2:
            continue
        for name, view in groups.items():
            tested += [_tested(view, i, e, by, name, trials[i], layers[i], cold) for i, e in cells]
    q = bounds.benjamini_hochberg([test.pop("p") for test in tested])
    served: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for test, q_value in zip(tested, q, strict=True):
        cell = test.pop("cell")
        if q_value <= FALSE_FINDS:
            served.setdefault(cell, []).append({**test, "q": float(q_value)})
    return {
        cell: sorted(found, key=lambda row: -row["ratio"])[:3] for cell, found in served.items()
    }


def _tested(
    view: Trace,
    index: int,
    expert: int,
    by: str,
    name: str,
    trials_E: NDArray[np.float64],
    whole: _Layer,
    cold: float,
) -> dict[str, Any]:
    """One expert in one group, against "its ratio there is at most `cold`"."""
    layer = view.layers[index]
    tokens, count = int(view.tokens_L[index]), int(view.counts_LE[index, expert])
    weight = trials_E[expert] / max(whole.tokens, 1)
    total = int(view.counts_LE[index].sum())
    p = bounds.p_above(count * weight, tokens * weight, cold * layer.top_k / layer.experts)
    ratio = count * layer.experts / total if total else 0.0
    return {"cell": (index, expert), "p": float(p), "by": by, "name": name, "ratio": ratio}
