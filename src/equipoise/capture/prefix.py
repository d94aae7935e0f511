"""The few-shot prefix that all questions of a subject share: its length, and its key-value cache.

The shared part is found on token ids, so it is safe with any tokenizer, and it ends before the
first token of the question. Whether a model's cache can be repeated for many rows is tried, not
assumed: the first questions are run both ways, and a model whose logits differ by more than
rounding is run in full (state-space layers that restart, caches of another kind).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from equipoise.capture.rows import Row

if TYPE_CHECKING:
    from torch import Tensor

_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
_ROUNDING = 1e-3  # float64 too: parts of many models compute in float32 whatever their dtype
_ROUNDING_HALF = 0.1


def shared_length(rows: Sequence[Row]) -> int:
    """Tokens that open every prompt alike, none of them of the question itself."""
    first = rows[0].ids
    length = min(start for row in rows for role, start, _ in row.spans if role == "question")
    for row in rows[1:]:
        differs = first[:length] != row.ids[:length]
        length = int(differs.argmax()) if differs.any() else length
    return length


@dataclass
class PrefixCache:
    """The key-value cache of one prefix, batch of one, `length` tokens long."""

    cache: Any
    length: int

    def unusable(self) -> str | None:
        """Why this cache cannot be handed out, None where it can be tried."""
        if not hasattr(self.cache, "layers") or not hasattr(self.cache, "reorder_cache"):
            return f"the model returns {type(self.cache).__name__} instead of a Cache"
        return None

    def repeat(self, rows: int) -> Any:
        """A cache of its own for that many rows; the prefix's stays as it is."""
        if all(type(layer).__name__ in _GROWING for layer in self.cache.layers):
            return self._expand(rows)
        repeated = copy.deepcopy(self.cache)
        repeated.reorder_cache(torch.zeros(rows, dtype=torch.long))
        return repeated

    def _expand(self, rows: int) -> Any:
        """Views instead of copies: these layers put new keys behind old ones into a new tensor."""
        repeated = copy.copy(self.cache)
        repeated.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in repeated.layers:
            if layer.keys is not None:
                layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])
                layer.values = layer.values.expand(rows, *layer.values.shape[1:])
        return repeated


def difference(logits: Tensor, reference: Tensor) -> float:
    """Difference of logits [..., V] relative to their spread over the vocabulary (L2 norms)."""
    logits, reference = logits.double(), reference.double()
    spread = (reference - reference.mean(dim=-1, keepdim=True)).norm()
    return float((logits - reference).norm() / spread.clamp_min(1e-30))


def allowed_difference(logits: Tensor) -> float:
    """What rounding may do to `difference` in the logits' dtype."""
    return _ROUNDING_HALF if logits.element_size() < 4 else _ROUNDING
