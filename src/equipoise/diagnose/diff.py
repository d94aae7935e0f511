"""`diff`: two runs side by side, layer by layer; a dense run beside a MoE by accuracy and speed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.diagnose.evidence import LayerEvidence, gather
from equipoise.diagnose.stats import plain
from equipoise.errors import EquipoiseError
from equipoise.metrics import load
from equipoise.metrics.floors import floor
from equipoise.trace import Trace

Row = dict[str, Any]


def diff(a: Trace, b: Trace, *, least: int | None = None) -> Row:
    """What changed from `a` to `b`, in plain Python values.

    {"tokens": [a, b], "accuracy": [a, b], "accuracy_change", "tokens_per_second": [a, b],
    "layers": [{"layer", "path", "experts", "top_k", "js_distance", "js_floor", "least_k",
    "least_overlap", "least_overlap_floor", "max_vio": [a, b], "max_vio_floor": [a, b],
    "share_change": [per expert, b - a], "most_changed": expert}]}.
    `least` is the k of the least-used experts that are compared, a tenth of the layer by default.
    With a dense model on one side `layers` is empty. Raises EquipoiseError where both have experts
    but not the same layers.
    """
    if a.layers and b.layers:
        _check_same_shape(a, b)
        rows = [_layer_row(a, b, i, least) for i in range(len(a.layers))]
    else:
        rows = []
    scores = [_accuracy(a), _accuracy(b)]
    known = None not in scores
    return {
        "tokens": [int(a.tokens), int(b.tokens)],
        "dense": [not a.layers, not b.layers],
        "accuracy": scores,
        "accuracy_change": scores[1] - scores[0] if known else None,  # type: ignore[operator]
        "tokens_per_second": [a.meta.get("tokens_per_second"), b.meta.get("tokens_per_second")],
        "layers": rows,
    }


def js_distance(p_E: NDArray[np.float64], q_E: NDArray[np.float64]) -> float:
    """Jensen-Shannon distance, the root of the divergence in bits; in [0, 1] (Lin 1991)."""
    mean_E = (p_E + q_E) / 2
    bits = sum(float((x * _log2_ratio(x, mean_E)).sum()) for x in (p_E, q_E)) / 2
    return float(np.sqrt(max(bits, 0.0)))


def _log2_ratio(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log2(np.where(x > 0, x, 1) / np.where(x > 0, y, 1))


def _layer_row(a: Trace, b: Trace, index: int, least: int | None) -> Row:
    layer = a.layers[index]
    counts = [t.counts_LE[index, : layer.experts] for t in (a, b)]
    shares = [load.share(c) for c in counts]
    change_E = shares[1] - shares[0]
    k = min(least or max(layer.experts // 10, 1), layer.experts)
    lowest = [set(np.argsort(c, kind="stable")[:k].tolist()) for c in counts]
    routed = [round(int(c.sum()) / layer.top_k) for c in counts]
    known = bool(np.isfinite(change_E).all())
    return {
        "layer": layer.layer,
        "path": layer.path,
        "experts": layer.experts,
        "top_k": layer.top_k,
        "js_distance": js_distance(shares[0], shares[1]) if known else None,
        "js_floor": _js_floor([gather(t).layers[index] for t in (a, b)], layer.experts),
        "least_k": k,
        "least_overlap": len(lowest[0] & lowest[1]) / k,
        "least_overlap_floor": k / layer.experts,
        "max_vio": [plain(load.max_vio(c)) for c in counts],
        "max_vio_floor": [
            plain(floor(t, layer.experts, layer.top_k).mean["max_vio"]) for t in routed
        ],
        "share_change": [plain(x) for x in change_E],
        "most_changed": int(np.abs(change_E).argmax()) if known else None,
    }


def _js_floor(evidence: list[LayerEvidence], experts: int) -> float | None:
    """Distance to expect between two runs of one and the same model on other documents.

    The divergence of two samples of one distribution is (1/8) sum (p-q)^2 / p in nats, and the
    variance of a share p (1 - K p) deff / (T K).
    """
    nats = 0.0
    for here in evidence:
        selections = int(here.counts_BE.sum())
        effect = here.effect.layer
        if not selections or not np.isfinite(effect):
            return None
        nats += (experts - here.top_k) * effect / selections / 8
    return float(np.sqrt(min(nats / np.log(2), 1.0)))


def _accuracy(trace: Trace) -> float | None:
    found = trace.accuracy()
    return None if found is None else float(found["overall"]["accuracy"])


def _check_same_shape(a: Trace, b: Trace) -> None:
    shapes = [[(x.layer, x.experts, x.top_k) for x in t.layers] for t in (a, b)]
    if shapes[0] == shapes[1]:
        return
    for one, other in zip(*shapes, strict=False):
        if one != other:
            raise EquipoiseError(
                f"these runs cannot be compared expert by expert: the first has layer {one[0]} with"
                f" {one[1]} experts, top-{one[2]}; the second layer {other[0]} with {other[1]}"
                f" experts, top-{other[2]}. Compare runs of one model shape, or select layers"
            )
    raise EquipoiseError(
        f"these runs cannot be compared expert by expert: the first has {len(shapes[0])} MoE"
        f" layers, the second {len(shapes[1])}. Compare runs of one model shape, or select layers"
    )
