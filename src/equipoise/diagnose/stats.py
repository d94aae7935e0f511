"""`stats`: every measure of every layer, each beside what chance alone gives and its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.diagnose.evidence import Evidence, LayerEvidence, full_windows, gather, gather_by
from equipoise.errors import EquipoiseError, nearest
from equipoise.metrics import load
from equipoise.metrics.blocks import MIN_BLOCKS
from equipoise.metrics.floors import Floor, floor
from equipoise.metrics.intervals import RESAMPLES, layer_intervals
from equipoise.trace import Layer, Trace

Row = dict[str, Any]


def stats(trace: Trace, *, intervals: bool = True, resamples: int = RESAMPLES) -> Row:
    """All measures of a trace or view, in plain Python values, None where there is no number.

    `layers` holds one row per MoE layer (keys: docs/stats.md). With intervals=False the stored
    token rows are not read, and intervals, design effect and effective tokens are None.
    """
    return _stats(trace, gather(trace) if intervals else None, resamples)


def stats_by(
    trace: Trace, by: str, *, intervals: bool = True, resamples: int = RESAMPLES
) -> dict[str, Row]:
    """`stats` of each value of subject, category, domain, role or phase, by first appearance.

    Raises EquipoiseError where `by` is none of these, or the trace has no value for it.
    """
    views = trace.groups(by)
    if not views:
        raise EquipoiseError(f"this trace has no {by}: its sequences were recorded without one")
    known: Mapping[str, Evidence] = gather_by(trace, by) if intervals else {}
    return {name: _stats(view, known.get(name), resamples) for name, view in views.items()}


def layer_rows(trace: Trace, layer: int | str, *, intervals: bool = True) -> list[Row]:
    """Every expert of one layer, least used first: count, share, ratio, interval, idle run, rank.

    `layer` is the true layer number, or the module path where two routers share a number (a number
    then gives the rows of both). Ties in rank go by expert number. With intervals=False the token
    rows are not read; intervals are None, and idle runs too unless never selected.
    """
    evidence = gather(trace) if intervals else None
    rows = []
    for index in _positions(trace, layer):
        here = trace.layers[index]
        counts_E = trace.counts_LE[index, : here.experts]
        known = evidence.layers[index] if evidence else None
        rows += _expert_rows(here, counts_E, int(trace.tokens_L[index]), known)
    return rows


def _positions(trace: Trace, layer: int | str) -> list[int]:
    found = [i for i, x in enumerate(trace.layers) if layer in (x.layer, x.path, x.name)]
    if found:
        return found
    numbers = [x.layer for x in trace.layers]
    shown = ", ".join(map(str, numbers)) or "none"
    hint = nearest(str(layer), [x.path for x in trace.layers])
    raise EquipoiseError(f"no MoE layer {layer!r} in this trace: it has {shown}.{hint}")


def _expert_rows(
    layer: Layer, counts_E: NDArray[np.int64], tokens: int, evidence: LayerEvidence | None
) -> list[Row]:
    total = int(counts_E.sum())
    share_E, ratio_E = load.share(counts_E), load.ratio(counts_E)
    unknown_E = np.full(layer.experts, np.nan)
    low_E, high_E = unknown_E, unknown_E
    if evidence is not None:
        low_E, high_E = evidence.share_intervals
    longest_E = evidence.longest_idle_E if evidence else None
    ascending = np.argsort(counts_E, kind="stable")
    return [
        {
            "rank": rank,
            "layer": layer.layer,
            "path": layer.path,
            "expert": int(e),
            "count": int(counts_E[e]),
            "total": total,
            "share": plain(share_E[e]),
            "ratio": plain(ratio_E[e]),
            "share_interval": pair((low_E[e], high_E[e])),
            "ratio_interval": pair((low_E[e] * layer.experts, high_E[e] * layer.experts)),
            "longest_idle": idle_run(longest_E, e, counts_E, tokens),
        }
        for rank, e in enumerate(ascending, 1)
    ]


def idle_run(
    run_E: NDArray[np.int64] | None, expert: int, counts_E: NDArray[np.int64], tokens: int
) -> int | None:
    """An expert's idle run; every token where it was never selected, else None without rows."""
    if counts_E[expert] == 0:
        return tokens
    return None if run_E is None else int(run_E[expert])


def _stats(trace: Trace, evidence: Evidence | None, resamples: int) -> Row:
    batches = _window_measures(trace)
    rows = [
        _layer_row(trace, i, evidence.layers[i] if evidence else None, evidence, resamples)
        | batches[i]
        for i in range(len(trace.layers))
    ]
    return {
        "tokens": int(trace.tokens),
        "status": trace.meta.get("status"),
        "sequences": trace.sequences.num_rows,
        "block": evidence.kind if evidence else None,
        "layers": rows,
        "accuracy": trace.accuracy(),
    }


def _layer_row(
    trace: Trace,
    index: int,
    here: LayerEvidence | None,
    evidence: Evidence | None,
    resamples: int,
) -> Row:
    layer = trace.layers[index]
    counts_E = trace.counts_LE[index, : layer.experts]
    tokens, unrouted = int(trace.tokens_L[index]), int(trace.unrouted_L[index])
    routed = round(int(counts_E.sum()) / layer.top_k)
    row: Row = {
        "layer": layer.layer,
        "path": layer.path,
        "experts": layer.experts,
        "top_k": layer.top_k,
        "tokens": tokens,
        "counts": counts_E.tolist(),
        "never_selected": np.flatnonzero(counts_E == 0).tolist() if tokens else [],
        "least_used": np.argsort(counts_E, kind="stable").tolist(),
        "unrouted": unrouted,
        "unrouted_share": unrouted / (tokens * layer.top_k) if tokens else None,
        "score_function": layer.score_function,
        "selection_bias": layer.selection_bias,
        "shared_experts": layer.shared_experts,
    }
    row |= _measures(counts_E, floor(routed, layer.experts, layer.top_k))
    once = not unrouted and counts_E.max(initial=0) <= tokens  # each token selects K distinct
    return row | _uncertainty(here, evidence, tokens, layer.top_k if once else 1, resamples)


def _measures(counts_E: NDArray[np.int64], chance: Floor) -> Row:
    row: Row = {}
    for name, measure in load.MEASURES.items():
        row[name] = plain(measure(counts_E))
        row[f"{name}_floor"] = plain(chance.mean[name])
        row[f"{name}_floor_95"] = plain(chance.limit[name])
    return row


def _uncertainty(
    here: LayerEvidence | None,
    evidence: Evidence | None,
    tokens: int,
    distinct: int,
    resamples: int,
) -> Row:
    """Intervals of the layer's measures, design effect and effective tokens."""
    found = None
    why: str | None = "not asked for"
    if here is not None and evidence is not None:
        why = evidence.why_no_interval
        found = None if why else layer_intervals(here.counts_BE, resamples, top_k=distinct)
        why = why if why or found else _too_few(evidence.kind, here.blocks)
    effect = here.effect.layer if here is not None else float("nan")
    row: Row = {
        f"{name}_interval": pair(found[name]) if found else None
        for name in ("max_vio", "gini", "cv", "entropy", "effective_experts")
    }
    row["no_interval"] = why
    row["design_effect"] = plain(effect)
    row["effective_tokens"] = plain(tokens / effect)
    row["blocks"] = here.blocks if here is not None else None
    return row


def _too_few(kind: str, blocks: int) -> str:
    return f"only {blocks} {kind}{'' if blocks == 1 else 's'}, {MIN_BLOCKS} are needed"


def _window_measures(trace: Trace) -> list[Row]:
    """MaxVio of single windows by layer: mean and 95th percentile, beside the floor of one."""
    windows = list(full_windows(trace))
    rows = []
    for i, layer in enumerate(trace.layers):
        counts_WE = np.array([w.counts_LE[i, : layer.experts] for w in windows])
        counts_WE = counts_WE[counts_WE.sum(1) > 0] if len(windows) else counts_WE
        if not len(counts_WE):
            rows.append(dict.fromkeys(_WINDOW_KEYS))
            continue
        values_W = load.max_vio(counts_WE)
        size = round(float(np.median(counts_WE.sum(1))) / layer.top_k)
        chance = floor(size, layer.experts, layer.top_k).mean["max_vio"]
        found = (values_W.mean(), np.quantile(values_W, 0.95), chance, len(values_W), size)
        rows.append(dict(zip(_WINDOW_KEYS, map(plain, found), strict=True)))
    return rows


_WINDOW_KEYS = (
    "max_vio_batch_mean",
    "max_vio_batch_p95",
    "max_vio_batch_floor",
    "batches",
    "batch_tokens",
)


def plain(value: Any) -> Any:
    """A numpy scalar as Python's int or float; None for nan."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    number = float(value)
    return number if np.isfinite(number) else None


def pair(interval: tuple[Any, Any]) -> list[float] | None:
    """[low, high] as Python floats; None where unknown."""
    low, high = plain(interval[0]), plain(interval[1])
    return None if low is None or high is None else [float(low), float(high)]
