"""`Trace`: the recorded run. Counts always; token rows and weights where they were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from equipoise.errors import EquipoiseError, TraceError, nearest
from equipoise.metrics.counting import count_ids
from equipoise.trace.files import list_column
from equipoise.trace.labels import accuracy, is_in, next_number, sequence_table
from equipoise.trace.parts import Part
from equipoise.trace.provenance import merged
from equipoise.trace.recount import recount
from equipoise.trace.rows import RowReader, TokenBatch, Where
from equipoise.trace.schema import LABELS, SEQUENCES_SCHEMA, Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Value = str | None

KEYS = (*LABELS, "role", "phase")
"""What a trace can be selected and grouped by."""


@dataclass(frozen=True)
class Window:
    """Counts of one window: the first forward passes that together reached `window_tokens` rows."""

    index: int
    tokens_L: Array
    counts_LE: Array


@dataclass(frozen=True)
class _Sums:
    counts_LE: Array
    tokens_L: Array
    unrouted_L: Array
    rows: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.counts_LE + other.counts_LE,
            self.tokens_L + other.tokens_L,
            self.unrouted_L + other.unrouted_L,
            self.rows + other.rows,
        )


@dataclass(frozen=True)
class _View:
    """What of the trace is looked at: allowed values by key, and positions in the stored layers."""

    where: Where
    layers: tuple[int, ...]


class Trace:
    """A recorded run, or a view of it; immutable, and lazy: token rows stay on disk.

    Make one with `equipoise.open`, `Trace.from_arrays`, or `select` on another.
    """

    def __init__(self, parts: Sequence[Part], path: Path | None = None, view: _View | None = None):
        if not parts:
            raise TraceError("A trace has at least one part.")
        self._parts, self.path = tuple(parts), path
        stored = parts[0].manifest.layers
        self._view = view or _View({}, tuple(range(len(stored))))
        self.layers: tuple[Layer, ...] = tuple(stored[index] for index in self._view.layers)
        self._groups: dict[str, dict[str, Trace]] = {}

    def __repr__(self) -> str:
        shape = f"{len(self.layers)} MoE layers, {self.tokens:,} tokens"
        return f"<Trace {self.path or 'in memory'}: {shape}, {self.meta['status']}>"

    # -- what was recorded ---------------------------------------------------------------------

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Provenance of the run: model, versions, task, level, status, speed, memory."""
        return merged([part.manifest for part in self._parts])

    @cached_property
    def counts_LE(self) -> NDArray[np.int64]:
        """Selections per layer and expert, int64 [L, E]; zero beyond a layer's own experts."""
        return self._totals.counts_LE

    @property
    def tokens(self) -> int:
        """Token rows that were counted (of the first stack, where there are several)."""
        return self._totals.rows

    @property
    def tokens_L(self) -> NDArray[np.int64]:
        """Token rows that each layer routed, int64 [L]."""
        return self._totals.tokens_L

    @property
    def unrouted_L(self) -> NDArray[np.int64]:
        """Slots per layer that went to no expert; with the counts they sum to tokens x top-k."""
        return self._totals.unrouted_L

    @property
    def has_rows(self) -> bool:
        """Token rows are stored, perhaps of a sample of the sequences."""
        return self.meta["level"] != "counts" and bool(self.layers)

    @property
    def rows_complete(self) -> bool:
        """Every counted token has its row."""
        return self.has_rows and all(part.manifest.every == 1 for part in self._counted_parts())

    @cached_property
    def sequences(self) -> pa.Table:
        """One row per sequence of the view: labels, role spans, answers; see docs/trace-format.md."""
        tables = []
        offset = 0
        for part in self._counted_parts():
            table = sequence_table(part)
            numbers = pc.add(table["sequence"], pa.scalar(offset, pa.int64()))
            tables.append(table.set_column(0, SEQUENCES_SCHEMA.field(0), numbers))
            offset += next_number(table)
        table = pa.concat_tables(tables)
        for key in LABELS:
            if key in self._view.where:
                table = table.filter(is_in(table[key], self._view.where[key]))
        return table

    def accuracy(self) -> dict[str, Any] | None:
        """Right answers over all questions, by subject and by category; None without questions."""
        return accuracy(self.sequences)

    # -- views ---------------------------------------------------------------------------------

    def select(
        self,
        *,
        subject: str | Iterable[str] | None = None,
        category: str | Iterable[str] | None = None,
        domain: str | Iterable[str] | None = None,
        role: str | Iterable[str] | None = None,
        phase: str | Iterable[str] | None = None,
        layers: int | Iterable[int] | None = None,
    ) -> Trace:
        """A view of the rows with these labels and the layers with these true numbers.

        Each argument is one value or several. An unknown value is an error that names the nearest.
        """
        where = dict(self._view.where)
        asked = zip(KEYS, (subject, category, domain, role, phase), strict=True)
        for key, values in asked:
            if values is not None:
                where[key] = self._known(key, [values] if isinstance(values, str) else values)
        chosen = self._view.layers
        if layers is not None:
            chosen = self._layers_numbered([layers] if isinstance(layers, int) else layers)
        return Trace(self._parts, self.path, _View(where, chosen))

    def values(self, key: str) -> list[str]:
        """The values that subject, category, domain, role or phase takes, by first appearance."""
        if key not in KEYS:
            raise EquipoiseError(
                f"A trace is not grouped by {key!r}: allowed are {', '.join(KEYS)}."
                + nearest(key, KEYS)
            )
        found: dict[Value, None] = {}
        for _, batch in self._filtered_counts():
            found.update(dict.fromkeys(batch.column(key).to_pylist()))
        return [value for value in found if value is not None]

    def groups(self, by: str) -> dict[str, Trace]:
        """A view for each value of subject, category, domain, role or phase; counted in one pass."""
        if by not in self._groups:
            self.values(by)  # raises for what is no key
            self._groups[by] = self._grouped(by)
        return dict(self._groups[by])

    def _grouped(self, by: str) -> dict[str, Trace]:
        sums: dict[str, _Sums] = {}
        for part, batch in self._filtered_counts():
            values = np.array(batch.column(by).to_pylist(), object)
            for value in dict.fromkeys(values):
                if value is not None:
                    found = self._sum(part, batch, values == value)
                    sums[value] = sums[value] + found if value in sums else found
        views = {value: self._where(by, value) for value in sums}
        for value, view in views.items():
            view._totals = sums[value]
        return views

    def _where(self, key: str, value: str) -> Trace:
        where = {**self._view.where, key: frozenset([value])}
        return Trace(self._parts, self.path, replace(self._view, where=where))

    def _known(self, key: str, values: Iterable[str]) -> frozenset[Value]:
        known = self.values(key)
        wanted = list(values)
        for value in wanted:
            if value not in known:
                shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
                raise EquipoiseError(
                    f"No {key} {value!r} in this trace; it has {len(known)}: {shown or 'none'}."
                    + nearest(value, known)
                )
        return frozenset(wanted)

    def _layers_numbered(self, numbers: Iterable[int]) -> tuple[int, ...]:
        wanted = set(numbers)
        have = {layer.layer for layer in self.layers}
        if wanted - have:
            raise EquipoiseError(
                f"No MoE layer {min(wanted - have)} in this trace; it has"
                f" {', '.join(map(str, sorted(have))) or 'none'}."
            )
        pairs = zip(self._view.layers, self.layers, strict=True)
        return tuple(index for index, layer in pairs if layer.layer in wanted)

    # -- reading -------------------------------------------------------------------------------

    def windows(self) -> Iterator[Window]:
        """Counts window by window, in recorded order, rank by rank."""
        for index, (part, batch) in enumerate(self._filtered_counts()):
            if batch.num_rows:
                sums = self._sum(part, batch)
                yield Window(index, sums.tokens_L, sums.counts_LE)

    def batches(self, columns: str = "all") -> Iterator[TokenBatch]:
        """Stored token rows; columns="ids" leaves weights and margins unread.

        Arrays are views of a memory-mapped file: copy what you keep beyond the next batch.
        """
        if not self.has_rows:
            raise EquipoiseError(
                'This trace holds no token rows: it was recorded at level "counts".'
                ' Record with level="ids" to ask for single tokens.'
            )
        starts: dict[str, int] = {}
        for part, reader in self._readers():
            for stack in part.manifest.stacks:
                for tokens in reader.batches(stack, columns):
                    if len(tokens.sequence_T):
                        start = starts.get(stack, 0)
                        starts[stack] = start + len(tokens.sequence_T)
                        yield replace(tokens, start=start)

    def recount(self) -> NDArray[np.int64]:
        """Count the stored token rows again, int64 [L, E]; equals `counts_LE` if rows are complete."""
        counts_LE = np.zeros((len(self.layers), self._max_experts), np.int64)
        if self.has_rows and not self._view.where:
            for part in self._counted_parts():
                recount(part, self.layers, counts_LE)
            return counts_LE
        for batch in self.batches(columns="ids"):
            for index, ids_TK in batch.ids.items():
                experts = self.layers[index].experts
                count_ids(ids_TK, experts, counts_LE[index, :experts])
        return counts_LE

    @cached_property
    def expert_ids_TLK(self) -> Array:
        """All stored ids as one array [T, L, K] in memory, for traces whose layers share T and K."""
        if len({(layer.top_k, layer.stack) for layer in self.layers}) > 1:
            raise EquipoiseError("Layers differ in top-k or token rows: read `batches()` instead.")
        parts = [
            np.stack([b.ids[i] for i in range(len(self.layers))], 1) for b in self.batches("ids")
        ]
        return np.concatenate(parts)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write this trace, or this view, as one part into a new folder; returns the folder."""
        from equipoise.trace.save import save

        return save(self, Path(path), force)

    @classmethod
    def from_arrays(
        cls,
        ids: Array,
        *,
        layers: Sequence[int] | None = None,
        num_experts: int | Sequence[int] | None = None,
        weights: Array | None = None,
        sequences: Array | None = None,
        labels: Mapping[str, Sequence[Any]] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Build a trace from routing recorded elsewhere.

        Args:
            ids: selected experts, integers [T, L, K]; -1 for a slot that went to no expert.
            layers: true number of each of the L layers; 0 to L-1 when left out.
            num_experts: experts per layer, one number or L. Give it: left out, it is the largest id
                plus one, and an expert that was never selected at the end of the list is not seen.
            weights: routing weights [T, L, K]; makes a trace of level "full" (without margins: nan).
            sequences: sequence number of each token [T], rows of one sequence together.
            labels: columns of the sequence table (subject, category, domain, split, name, question,
                answer, choice, correct), one value for each sequence number in ascending order.
            meta: provenance, kept as it is.

        Raises:
            EquipoiseError: shapes that disagree, or ids out of range.
        """
        from equipoise.trace.arrays import part_from_arrays

        part = part_from_arrays(ids, layers, num_experts, weights, sequences, labels, meta)
        return cls([part])

    # -- inside --------------------------------------------------------------------------------

    @property
    def _max_experts(self) -> int:
        return max((layer.experts for layer in self.layers), default=0)

    def _counted_parts(self) -> list[Part]:
        return [part for part in self._parts if part.manifest.data_rank == part.manifest.rank]

    def _readers(self) -> Iterator[tuple[Part, RowReader]]:
        """Each part with a reader of its rows; parts after the first shift sequence numbers."""
        offset = 0
        for part in self._counted_parts():
            yield part, RowReader(part, offset, self.layers, self._view.where)
            offset += next_number(sequence_table(part))

    def _filtered_counts(self) -> Iterator[tuple[Part, pa.RecordBatch]]:
        for part in self._counted_parts():
            for batch in part.counts():
                mask = np.ones(batch.num_rows, bool)
                for key, allowed in self._view.where.items():
                    mask &= is_in(batch.column(key), allowed).to_numpy(zero_copy_only=False)
                yield part, batch if mask.all() else batch.filter(pa.array(mask))

    def _sum(self, part: Part, batch: pa.RecordBatch, rows: Array | slice = slice(None)) -> _Sums:
        """Sums over rows of a counts batch, for the layers of the view."""
        flat = list_column(batch, "counts")[rows].sum(0, dtype=np.int64)
        edges = np.cumsum([0, *(layer.experts for layer in part.manifest.layers)])
        counts_LE = np.zeros((len(self.layers), self._max_experts), np.int64)
        for row, index in enumerate(self._view.layers):
            counts_LE[row, : self.layers[row].experts] = flat[edges[index] : edges[index + 1]]
        pick = list(self._view.layers)
        return _Sums(
            counts_LE,
            list_column(batch, "tokens")[rows].sum(0, dtype=np.int64)[pick],
            list_column(batch, "unrouted")[rows].sum(0, dtype=np.int64)[pick],
            int(batch.column("rows").to_numpy()[rows].sum(dtype=np.int64)),
        )

    @cached_property
    def _totals(self) -> _Sums:
        layers = len(self.layers)
        total = _Sums(
            np.zeros((layers, self._max_experts), np.int64),
            np.zeros(layers, np.int64),
            np.zeros(layers, np.int64),
            0,
        )
        for part, batch in self._filtered_counts():
            total = total + self._sum(part, batch)
        routed = total.counts_LE.sum(1) + total.unrouted_L
        for layer, tokens, slots in zip(self.layers, total.tokens_L, routed, strict=True):
            if slots != tokens * layer.top_k:
                raise TraceError(
                    f"{self.path or 'The trace'} is damaged: layer {layer.layer} counts {slots:,}"
                    f" selections for {tokens:,} tokens and top-{layer.top_k}."
                )
        return total


__all__ = ["KEYS", "TokenBatch", "Trace", "Window"]
