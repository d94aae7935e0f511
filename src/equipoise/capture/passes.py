"""What is known of the rows of a forward pass: which sequence, position, phase and role each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.errors import EquipoiseError
from equipoise.trace.batches import Labels
from equipoise.trace.schema import NO_SEQUENCE, PHASES, ROLES

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]

UNLIMITED = 2**31 - 1
"""Length of a row that has no padding."""
PREFILL, DECODE = (PHASES.index(name) for name in ("prefill", "decode"))


@dataclass
class RunSequence:
    """One document or question: its labels, and what became of it."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    role_codes: Array | None = None
    """Role of each position, uint8; None where no roles were given."""
    done: bool = False
    """Its runner has said that nothing more comes."""

    @property
    def labels(self) -> Labels:
        """Subject, category, domain."""
        return tuple(self.values.get(key) for key in ("subject", "category", "domain"))  # type: ignore[return-value]


def role_codes(spans: Sequence[tuple[str, int, int]], tokens: int | None) -> Array:
    """Index into ROLES for every position that the half-open spans cover; others are "none"."""
    length = max([tokens or 0, *(stop for _, _, stop in spans)])
    codes = np.zeros(length, np.uint8)
    for role, start, stop in spans:
        if role not in ROLES:
            raise EquipoiseError(f"No role {role!r}: allowed are {', '.join(ROLES)}.")
        codes[start:stop] = ROLES.index(role)
    return codes


@dataclass(frozen=True)
class RowInfo:
    """Per token row of one forward pass, flattened [B * S]."""

    keep_T: Array
    """False on padding and on repeats of a context that was counted before."""
    sequence_T: Array
    position_T: Array
    phase_T: Array
    role_T: Array


@dataclass(frozen=True)
class Batch:
    """What a runner says of the next forward pass: see `Recorder.batch`."""

    sequences: Sequence[RunSequence]
    starts: Array
    lengths: Array
    skip: Array

    def later(self, width: int, columns: int) -> Batch:
        """The rows of a pass on the cache of the first, which was `width` wide: generation.

        `columns` came between the two. What is fed now is no padding.
        """
        starts = self.starts + np.minimum(self.lengths, width) + columns
        return replace(self, starts=starts, lengths=np.full_like(self.lengths, UNLIMITED))

    def rows(self, shape: tuple[int, int]) -> RowInfo:
        """The rows of a pass of `shape` [B, S]."""
        batch, width = shape
        column_S = np.arange(width)
        position_BS = self.starts[:, None] + column_S
        keep_BS = (column_S < self.lengths[:, None]) & (position_BS >= self.skip[:, None])
        role_BS = np.zeros(shape, np.uint8)
        for row, sequence in enumerate(self.sequences):
            codes = sequence.role_codes
            if codes is not None:
                start = int(self.starts[row])
                here = codes[start : start + width]
                role_BS[row, : len(here)] = here
        numbers = np.array([sequence.number for sequence in self.sequences], np.int64)
        phase = DECODE if width == 1 and bool((self.starts > 0).all()) else PREFILL
        return RowInfo(
            keep_BS.reshape(-1),
            np.repeat(numbers, width),
            position_BS.reshape(-1),
            np.full(batch * width, phase, np.uint8),
            role_BS.reshape(-1),
        )


@dataclass(frozen=True)
class Inferred:
    """What a forward pass of a user's own loop says about its rows by its arguments."""

    sequences: Sequence[RunSequence]
    past: int
    """Columns that a cache holds already."""
    mask_BS: Tensor | None
    """The attention mask over past and present columns [B, past + S], bool, on the host by use."""

    def rows(self, shape: tuple[int, int]) -> RowInfo:
        """The rows of a pass of `shape` [B, S]."""
        batch, width = shape
        if self.mask_BS is not None:
            mask = self.mask_BS.numpy()
            keep_BS = mask[:, -width:]
            position_BS = np.cumsum(mask, 1)[:, -width:] - 1
            position_BS = np.maximum(position_BS, 0)
        else:
            keep_BS = np.ones(shape, bool)
            position_BS = np.broadcast_to(self.past + np.arange(width), shape)
        phase = DECODE if self.past and width == 1 else PREFILL
        return RowInfo(
            keep_BS.reshape(-1),
            np.repeat(np.array([s.number for s in self.sequences], np.int64), width),
            position_BS.reshape(-1),
            np.full(batch * width, phase, np.uint8),
            np.zeros(batch * width, np.uint8),
        )


def unknown_rows(count: int, only: int | None, prefill: bool = True) -> RowInfo:
    """Rows of a stack that does not see the batch's tokens (vision patches, an encoder's own input)."""
    return RowInfo(
        np.ones(count, bool),
        np.full(count, NO_SEQUENCE if only is None else only, np.int64),
        np.arange(count),
        np.full(count, PREFILL if prefill else DECODE, np.uint8),
        np.zeros(count, np.uint8),
    )


def batch_shape(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """[B, S] of a forward pass, from its ids or embeddings; None where it has neither."""
    ids = arguments.get("input_ids")
    if ids is None:
        ids = arguments.get("inputs_embeds")
    if ids is None or not hasattr(ids, "shape") or len(ids.shape) < 2:
        return None
    return int(ids.shape[0]), int(ids.shape[1])


def mask_of(arguments: Mapping[str, Any], name: str = "attention_mask") -> Tensor | None:
    """The 2-D attention mask [B, past + S] of a pass; None where it has none, or another kind."""
    mask = arguments.get(name)
    return mask if getattr(mask, "ndim", 0) == 2 else None


def past_length(arguments: Mapping[str, Any], width: int, mask: Tensor | None) -> int:
    """Columns that the cache of this pass holds already."""
    if mask is not None and mask.shape[1] > width:
        return int(mask.shape[1]) - width
    cache = arguments.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0
