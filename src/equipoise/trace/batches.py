"""Build the record batches of one window from arrays; the one way rows get into a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from equipoise.metrics.counting import count_grouped
from equipoise.trace.files import list_array
from equipoise.trace.schema import LABELS, PHASES, ROLES, Layer, counts_schema, tokens_schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Labels = tuple[str | None, str | None, str | None]
"""Subject, category, domain."""


@dataclass
class Rows:
    """Counted token rows of one stack in one window. All arrays have the same length T."""

    sequence_T: Array
    position_T: Array
    phase_T: Array
    role_T: Array
    label_T: Array
    """Index into the window's list of labels."""
    ids: list[Array]
    """For each layer of the stack: [T, K] in the layer's id_dtype, checked."""
    weights: list[Array] | None = None
    margins: list[Array] | None = None

    def __len__(self) -> int:
        return len(self.sequence_T)

    def take(self, keep_T: Array) -> Rows:
        """The rows where `keep_T` is True."""
        if keep_T.all():
            return self
        return Rows(
            self.sequence_T[keep_T],
            self.position_T[keep_T],
            self.phase_T[keep_T],
            self.role_T[keep_T],
            self.label_T[keep_T],
            [ids_TK[keep_T] for ids_TK in self.ids],
            None if self.weights is None else [w_TK[keep_T] for w_TK in self.weights],
            None if self.margins is None else [m_T[keep_T] for m_T in self.margins],
        )


def tokens_batch(rows: Rows, layers: Sequence[Layer], level: str) -> pa.RecordBatch:
    """Rows of one stack as a record batch of `tokens_schema`."""
    schema = tokens_schema(layers, level)
    columns = [
        pa.array(rows.sequence_T.astype(np.uint32, copy=False)),
        pa.array(rows.position_T.astype(np.uint32, copy=False)),
        pa.array(rows.phase_T.astype(np.uint8, copy=False)),
        pa.array(rows.role_T.astype(np.uint8, copy=False)),
    ]
    for layer, ids_TK in zip(layers, rows.ids, strict=True):
        columns.append(list_array(ids_TK, schema.field(layer.name).type))
    if level == "full":
        assert rows.weights is not None
        assert rows.margins is not None
        for layer, weights_TK, margin_T in zip(layers, rows.weights, rows.margins, strict=True):
            type_ = schema.field(f"weights:{layer.name}").type
            columns.append(list_array(weights_TK.astype(np.float32, copy=False), type_))
            columns.append(pa.array(margin_T.astype(np.float32, copy=False)))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass
class _Groups:
    """Numbers of the distinct (label, role, phase) combinations of a window."""

    keys: dict[int, int] = field(default_factory=dict)

    def of(self, rows: Rows) -> Array:
        """The group of each row, int64 [T]."""
        code_T = rows.label_T.astype(np.int64) * len(ROLES) + rows.role_T
        code_T = code_T * len(PHASES) + rows.phase_T
        codes, group_T = np.unique(code_T, return_inverse=True)
        known = [self.keys.setdefault(int(code), len(self.keys)) for code in codes]
        return np.asarray(known, np.int64)[group_T]

    def names(self, labels: Sequence[Labels]) -> list[tuple[Labels, str, str]]:
        """Labels, role and phase of each group, in group order."""
        named = []
        for code in self.keys:
            rest, phase = divmod(code, len(PHASES))
            label, role = divmod(rest, len(ROLES))
            named.append((labels[label], ROLES[role], PHASES[phase]))
        return named


def counts_batch(
    window: int, stacks: Sequence[Rows], layers: Sequence[Layer], labels: Sequence[Labels]
) -> pa.RecordBatch:
    """Count the rows of a window by group as a record batch of `counts_schema`.

    `stacks` follows the first appearance of the layers' stacks. Raises EquipoiseError for an
    impossible id.
    """
    schema = counts_schema(layers)
    groups = _Groups()
    group_of = [groups.of(rows) for rows in stacks]
    names = groups.names(labels)
    count = len(names)
    tokens_GL = np.zeros((count, len(layers)), np.uint32)
    counts = [np.zeros((count, layer.experts), np.int64) for layer in layers]
    order = list(dict.fromkeys(layer.stack for layer in layers))
    for stack, rows, group_T in zip(order, stacks, group_of, strict=False):
        here = [i for i, layer in enumerate(layers) if layer.stack == stack]
        tokens_GL[:, here] = np.bincount(group_T, minlength=count)[:, None]
        for index, ids_TK in zip(here, rows.ids, strict=True):
            count_grouped(ids_TK, group_T, count, layers[index].experts, counts[index])
    top_k_L = np.array([layer.top_k for layer in layers], np.int64)
    routed_GL = np.array([c.sum(1) for c in counts], np.int64).reshape(len(layers), count).T
    cells = np.concatenate(counts, 1) if counts else np.zeros((count, 0), np.int64)
    rows_G = np.bincount(group_of[0], minlength=count).astype(np.uint32)
    columns = [
        pa.array(np.full(count, window, np.int32)),
        *(pa.array([name[0][i] for name in names], pa.string()) for i in range(len(LABELS))),
        pa.array([name[1] for name in names], pa.string()),
        pa.array([name[2] for name in names], pa.string()),
        pa.array(rows_G),
        list_array(tokens_GL, schema.field("tokens").type),
        list_array(
            (tokens_GL * top_k_L - routed_GL).astype(np.uint32), schema.field("unrouted").type
        ),
        list_array(cells.astype(np.uint32), schema.field("counts").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
