"""Token rows of a trace, batch by batch, through a view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from equipoise.trace.files import list_column
from equipoise.trace.labels import is_in, next_number, sequence_table
from equipoise.trace.schema import LABELS, NO_SEQUENCE, PHASES, ROLES, Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equipoise.trace.parts import Part

    Array = NDArray[Any]

Where = Mapping[str, frozenset[str | None]]
"""Allowed values of subject, category, domain, role, phase."""


@dataclass(frozen=True)
class TokenBatch:
    """Stored token rows of the layers of one stack, in recorded order, the view's filter applied."""

    start: int
    """Number of this batch's first row among the rows of its stack in the view."""
    sequence_T: Array
    """int64; rows of one document share it. NO_SEQUENCE (2**32 - 1) where unknown."""
    position_T: Array
    phase_T: Array
    """Index into PHASES."""
    role_T: Array
    """Index into ROLES."""
    ids: dict[int, Array]
    """Position in `trace.layers` -> ids [T, K], uint8 or uint16; the dtype's largest value: no expert."""
    weights: dict[int, Array] | None = None
    """... -> routing weights [T, K] as the model used them, at level "full"."""
    margins: dict[int, Array] | None = None
    """... -> [T] lowest selected minus highest unselected score, at level "full"."""


class RowReader:
    """Reads the token rows of one part: the rows that `where` allows, the columns of `layers`."""

    def __init__(self, part: Part, offset: int, layers: Sequence[Layer], where: Where) -> None:
        self._part, self._offset, self._layers = part, offset, layers
        self._keep = _filter(part, where) if where else None

    def batches(self, stack: str, columns: str = "all") -> Iterator[TokenBatch]:
        """One batch per window for the layers of a stack, empty ones included; none without layers."""
        here = {i: layer for i, layer in enumerate(self._layers) if layer.stack == stack}
        manifest = self._part.manifest
        stored = sum(layer.stack == stack for layer in manifest.layers)
        whole = 2 * len(here) > stored and (manifest.level != "full" or columns == "all")
        if here:
            for batch in self._part.tokens(manifest.stacks.index(stack), whole):
                yield self._batch(batch, here, columns)

    def _batch(self, batch: pa.RecordBatch, here: Mapping[int, Layer], columns: str) -> TokenBatch:
        mask = self._keep(batch) if self._keep is not None else None
        rows = slice(None) if mask is None or mask.all() else mask
        sequence_T = batch.column("sequence").to_numpy().astype(np.int64)[rows]
        known_T = sequence_T != NO_SEQUENCE
        tokens = TokenBatch(
            start=0,
            sequence_T=np.where(known_T, sequence_T + self._offset, sequence_T),
            position_T=batch.column("position").to_numpy()[rows],
            phase_T=batch.column("phase").to_numpy()[rows],
            role_T=batch.column("role").to_numpy()[rows],
            ids={i: list_column(batch, x.name)[rows] for i, x in here.items()},
        )
        if self._part.manifest.level != "full" or columns != "all":
            return tokens
        weights = {i: list_column(batch, f"weights:{x.name}")[rows] for i, x in here.items()}
        margins = {i: batch.column(f"margin:{x.name}").to_numpy()[rows] for i, x in here.items()}
        return replace(tokens, weights=weights, margins=margins)


def _filter(part: Part, where: Where) -> Callable[[pa.RecordBatch], Array]:
    """A function from a tokens batch to the rows of a view."""
    codes = {
        key: np.array([name in where[key] for name in names])
        for key, names in (("role", ROLES), ("phase", PHASES))
        if key in where
    }
    labelled = _labelled(part, where) if any(key in where for key in LABELS) else None

    def rows(batch: pa.RecordBatch) -> Array:
        mask_T = np.ones(batch.num_rows, bool)
        for key, allowed in codes.items():
            mask_T &= allowed[batch.column(key).to_numpy()]
        if labelled is not None:
            number_T = batch.column("sequence").to_numpy()
            mask_T &= labelled[np.minimum(number_T, len(labelled) - 1)]
        return mask_T

    return rows


def _labelled(part: Part, where: Where) -> Array:
    """Whether a sequence number belongs to the view; the last entry stands for unknown ones."""
    table = sequence_table(part)
    keep_S = np.ones(table.num_rows, bool)
    for key in LABELS:
        if key in where:
            keep_S &= is_in(table[key], where[key]).to_numpy(zero_copy_only=False)
    labelled = np.zeros(next_number(table) + 1, bool)
    labelled[table["sequence"].to_numpy()[keep_S]] = True
    return labelled
