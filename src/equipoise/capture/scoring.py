"""Forward passes of the runners: logits only where they are read, and log-likelihoods of the
letters.

Projecting every position to the vocabulary costs most of a small model's time and memory, so the
positions are named (`logits_to_keep`). Log-softmax is taken in float32 at least;
lm-evaluation-harness takes it in the model's dtype unless `softmax_dtype` is set: the same for
float32, coarser for half.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equipoise.capture.rows import Continuations, Head

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class Forward:
    """Calls a causal model on right-padded, masked rows for logits at chosen columns."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        defined_in = sys.modules.get(type(model).__module__)
        accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Code that comes with a checkpoint may take a number only; transformers takes an index, and
        # since 5.18 one per row.
        self._by_column = accepts and type(model).__module__.startswith("transformers.")
        self._by_row = self._by_column and hasattr(defined_in, "slice_logits_to_keep")

    def __call__(
        self,
        rows: Sequence[NDArray[np.int32]],
        columns: Sequence[Sequence[int]],
        cache: Any = None,
        past: int = 0,
    ) -> Tensor:
        """Logits [B, M, V] of B rows of ids at M columns each, `past` tokens being in the cache."""
        inputs = self._pad(rows, past)
        inputs |= {"use_cache": False} if cache is None else {"past_key_values": cache}
        columns_BM = torch.tensor(columns, device=self.device)
        if self._by_row:
            logits: Tensor = self.model(**inputs, logits_to_keep=columns_BM).logits
            return logits
        if self._by_column:
            kept, place_BM = np.unique(columns, return_inverse=True)
            inputs["logits_to_keep"] = torch.from_numpy(kept).to(self.device)
            columns_BM = torch.from_numpy(place_BM.reshape(columns_BM.shape))
        logits = self.model(**inputs).logits
        return torch.take_along_dim(logits, columns_BM.to(logits.device)[..., None], dim=1)

    def prefill(self, row: NDArray[np.int32]) -> Any:
        """Run one row; its key-value cache, or None where the model returns none."""
        inputs = self._pad([row], 0)
        if self._by_column:
            inputs["logits_to_keep"] = 1
        return getattr(self.model(**inputs, use_cache=True), "past_key_values", None)

    def _pad(self, rows: Sequence[NDArray[np.int32]], past: int) -> dict[str, Any]:
        """Rows padded on the right with id 0, and the mask over past and present columns."""
        width = max(map(len, rows))
        ids_BC = np.zeros((len(rows), width), dtype=np.int64)
        mask_BC = np.zeros((len(rows), past + width), dtype=np.int64)
        for b, row in enumerate(rows):
            ids_BC[b, : len(row)] = row
            mask_BC[b, : past + len(row)] = 1
        return {
            "input_ids": torch.from_numpy(ids_BC).to(self.device),
            "attention_mask": torch.from_numpy(mask_BC).to(self.device),
        }


def columns(row: int, head: Head, width: int) -> list[int]:
    """Columns that predict a continuation of a row of `row` ids with its head fed after it.

    Rows of one batch ask for equally many columns, `width`: short ones repeat their last.
    """
    return [row - 1 + min(j, len(head)) for j in range(width)]


def score(
    logits_BMV: Tensor, row_heads: Sequence[Head], asked: Sequence[Continuations]
) -> NDArray[np.float64]:
    """Log-likelihoods [B, A] of the A continuations of each row; NaN where the head is another's.

    Column j of a row holds the logits that predict token j of the continuation.
    """
    shape = (len(asked), logits_BMV.shape[1], len(asked[0]))
    token_BMA, counts_BMA = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for b, (head, letters) in enumerate(zip(row_heads, asked, strict=True)):
        for a, letter in enumerate(letters):
            if letter[:-1] == head:
                token_BMA[b, : len(letter), a] = letter
                counts_BMA[b, : len(letter), a] = True
    wide = logits_BMV if logits_BMV.dtype == torch.float64 else logits_BMV.float()
    index = torch.from_numpy(token_BMA).to(wide.device)
    picked_BMA = torch.log_softmax(wide, dim=-1).gather(2, index).double().cpu().numpy()
    summed_BA = np.where(counts_BMA, picked_BMA, 0.0).sum(axis=1)
    return np.where(counts_BMA.any(axis=1), summed_BA, np.nan)
