"""Small runs with known load, for the tests of diagnose."""

from __future__ import annotations

import numpy as np

from equipoise.trace import Trace


def ids_by(chances_TE, top_k, seed=0):
    """Ids [T, K] of distinct experts, drawn without replacement by the chances of each token."""
    noise = np.random.default_rng(seed).gumbel(size=chances_TE.shape)
    with np.errstate(divide="ignore"):
        return np.argsort(-(np.log(chances_TE) + noise), axis=1)[:, :top_k]


def run(chances_LE, tokens=20_000, top_k=2, seed=0, per_document=200, labels=None, **kwargs):
    """A trace whose layer l selects by chances_LE[l] in every token, and `ids` as recorded."""
    chances = np.asarray(chances_LE, float)
    layers = [
        ids_by(np.broadcast_to(row, (tokens, len(row))), top_k, seed + i)
        for i, row in enumerate(chances)
    ]
    ids = np.stack(layers, 1)
    if per_document:
        kwargs["sequences"] = np.arange(tokens) // per_document
    trace = Trace.from_arrays(ids, num_experts=chances.shape[1], labels=labels, **kwargs)
    return trace, ids


EVEN = [1.0] * 16
DEAD = [0.0] + [1.0] * 15
HOT = [1.0] * 15 + [6.0]
