"""A trace from arrays that were recorded elsewhere: `Trace.from_arrays`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from equipoise.errors import EquipoiseError
from equipoise.metrics.counting import raise_impossible
from equipoise.trace.batches import Labels, Rows, counts_batch, tokens_batch
from equipoise.trace.parts import MemoryPart
from equipoise.trace.schema import (
    LABELS,
    SEQUENCES_SCHEMA,
    WINDOW_TOKENS,
    Layer,
    Manifest,
    name_layers,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_COLUMNS = (*LABELS, "split", "name", "question", "answer", "choice", "correct")


def part_from_arrays(
    ids: Array,
    layers: Sequence[int] | None,
    num_experts: int | Sequence[int] | None,
    weights: Array | None,
    sequences: Array | None,
    labels: Mapping[str, Sequence[Any]] | None,
    meta: Mapping[str, Any] | None,
) -> MemoryPart:
    """One part in memory; arguments and errors of `Trace.from_arrays`."""
    ids_TLK = _checked_ids(ids)
    described = _layers(ids_TLK, layers, num_experts)
    order = [[d.name for d in described].index(d.name) for d in name_layers(described)]
    ids_TLK, described = ids_TLK[:, order], list(name_layers(described))
    _warn_of_filling(ids_TLK, described)
    sequence_T = _sequence_numbers(sequences, len(ids_TLK))
    weights_TLK = _weights(weights, ids_TLK.shape)
    if weights_TLK is not None:
        weights_TLK = weights_TLK[:, order]
    numbers, first = np.unique(sequence_T, return_index=True)
    table = _sequence_table(numbers, np.bincount(np.searchsorted(numbers, sequence_T)), labels)
    names: list[Labels] = list(
        zip(*(table.column(key).to_pylist() for key in LABELS), strict=True)
    ) or [(None, None, None)]
    distinct = list(dict.fromkeys(names))
    label_S = np.array([distinct.index(name) for name in names], np.int64)
    label_T = label_S[np.searchsorted(numbers, sequence_T)] if len(numbers) else sequence_T
    level = "ids" if weights_TLK is None else "full"
    manifest = Manifest(tuple(described), level=level, status="complete", meta=dict(meta or {}))
    part = MemoryPart(manifest, tokens_batches=[[]])
    position_T = _positions(sequence_T)
    for window, start in enumerate(range(0, max(len(ids_TLK), 1), WINDOW_TOKENS)):
        here = slice(start, start + WINDOW_TOKENS)
        rows = Rows(
            sequence_T[here],
            position_T[here],
            np.zeros_like(position_T[here], np.uint8),
            np.zeros_like(position_T[here], np.uint8),
            label_T[here],
            [_narrow(ids_TLK[here, i], layer) for i, layer in enumerate(described)],
        )
        if weights_TLK is not None:
            rows.weights = [weights_TLK[here, i] for i in range(len(described))]
            rows.margins = [np.full(len(rows), np.nan, np.float32) for _ in described]
        starting = (first >= start) & (first < start + WINDOW_TOKENS)
        part.counts_batches.append(counts_batch(window, [rows], described, distinct))
        part.tokens_batches[0].append(tokens_batch(rows, described, level))
        part.sequences_batches.append(table.filter(pa.array(starting)))
    return part


def _checked_ids(ids: Array) -> Array:
    ids = np.asarray(ids)
    if ids.ndim != 3:
        raise EquipoiseError(
            f"ids has shape {ids.shape}; wanted [T, L, K] (tokens, layers, selected experts)."
            " One layer is ids[:, None, :]."
        )
    if ids.dtype.kind not in "iu":
        raise EquipoiseError(f"ids are {ids.dtype}; wanted integers.")
    if not ids.shape[1] or not ids.shape[2]:
        raise EquipoiseError(f"ids has shape {ids.shape}: no layer, or no selected expert.")
    return ids


def _layers(
    ids_TLK: Array, layers: Sequence[int] | None, num_experts: int | Sequence[int] | None
) -> list[Layer]:
    _, count, top_k = ids_TLK.shape
    numbers = list(range(count))
    if layers is not None:
        numbers = [int(number) for number in np.atleast_1d(np.asarray(layers))]
    if len(numbers) != count or len(set(numbers)) != count:
        raise EquipoiseError(
            f"layers has {len(numbers)} numbers ({len(set(numbers))} distinct) and ids {count}"
            " layers: give each its true number once."
        )
    if num_experts is None:
        experts = [int(_largest(ids_TLK[:, i])) + 1 for i in range(count)]
        experts = [max(*experts, top_k, 1)] * count
    elif isinstance(num_experts, (int, np.integer)):
        experts = [int(num_experts)] * count
    else:
        experts = [int(number) for number in np.atleast_1d(np.asarray(num_experts))]
    if len(experts) != count or min(experts) < 1 or max(experts) > 65534:
        raise EquipoiseError(
            f"num_experts is {num_experts!r}; wanted one number from 1 to 65,534, or {count} of them."
        )
    if top_k > min(experts):
        raise EquipoiseError(
            f"ids has {top_k} experts per token, and num_experts is {min(experts)}: top-k cannot be"
            " more than the experts. Is the shape [T, L, K]?"
        )
    return [
        Layer(number, f"layers.{number}", experts[i], top_k, f"layer_{number}")
        for i, number in enumerate(numbers)
    ]


def _largest(ids_TK: Array) -> int:
    none = np.iinfo(ids_TK.dtype).max
    known = ids_TK[ids_TK != none] if ids_TK.dtype.kind == "u" else ids_TK
    return int(known.max(initial=0))


def _narrow(ids_TK: Array, layer: Layer) -> Array:
    """Ids in the type they are stored in; range-checked before, since a cast would wrap them."""
    raise_impossible(ids_TK, layer.experts)
    if ids_TK.dtype.kind == "u":
        none = np.iinfo(ids_TK.dtype).max
        ids_TK = np.where(ids_TK == none, -1, ids_TK.astype(np.int64))
    return np.ascontiguousarray(ids_TK.astype(layer.id_dtype))


def _warn_of_filling(ids_TLK: Array, layers: Sequence[Layer]) -> None:
    """One expert, K times, in every token, is no top-k: engines fill what they did not see so."""
    if len(ids_TLK) == 0 or ids_TLK.shape[2] < 2:
        return
    first_L = ids_TLK[0, :, 0]
    none = np.iinfo(ids_TLK.dtype).max if ids_TLK.dtype.kind == "u" else -1
    filled_L = (ids_TLK == first_L[:, None]).all((0, 2)) & (first_L != none)
    for layer in (layer for layer, filled in zip(layers, filled_L, strict=True) if filled):
        warnings.warn(
            f"Layer {layer.layer}: every token selects one and the same expert {layer.top_k} times,"
            " which no top-k does. Is it a dense layer, or one that the engine did not see and filled"
            " with zeros? Leave such layers out.",
            stacklevel=4,
        )


def _sequence_numbers(sequences: Array | None, tokens: int) -> Array:
    if sequences is None:
        return np.zeros(tokens, np.int64)
    numbers = np.asarray(sequences)
    if numbers.shape != (tokens,) or numbers.dtype.kind not in "iu":
        raise EquipoiseError(
            f"sequences has shape {numbers.shape} and type {numbers.dtype}; wanted integers [{tokens}],"
            " the sequence number of each token."
        )
    if tokens and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**32 - 1:
        raise EquipoiseError("Sequence numbers run from 0 to 4,294,967,294.")
    return numbers.astype(np.int64)


def _weights(weights: Array | None, shape: tuple[int, ...]) -> Array | None:
    if weights is None:
        return None
    weights = np.asarray(weights)
    if weights.shape != shape:
        raise EquipoiseError(f"weights has shape {weights.shape}; wanted that of ids, {shape}.")
    weights = weights.astype(np.float32)
    if np.isnan(weights).any():
        raise EquipoiseError("weights holds NaN: the recorded model did not compute numbers.")
    return weights


def _positions(sequence_T: Array) -> Array:
    """Position of each token in its sequence; rows of a sequence may be interleaved with others."""
    order = np.argsort(sequence_T, kind="stable")
    ordered = sequence_T[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(np.append(starts, len(ordered)))
    position_T = np.empty(len(ordered), np.int64)
    position_T[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return position_T


def _sequence_table(
    numbers: Array, tokens_S: Array, labels: Mapping[str, Sequence[Any]] | None
) -> pa.RecordBatch:
    labels = labels or {}
    for name, given in labels.items():
        if name not in _COLUMNS:
            raise EquipoiseError(f"No label {name!r}: allowed are {', '.join(_COLUMNS)}.")
        if len(given) != len(numbers):
            raise EquipoiseError(
                f"labels[{name!r}] has {len(given)} values for {len(numbers)} sequences."
            )
    columns = []
    values: Any
    for column in SEQUENCES_SCHEMA:
        if column.name == "sequence":
            values = numbers
        elif column.name == "tokens":
            values = tokens_S.astype(np.int32)
        else:
            values = labels.get(column.name, [None] * len(numbers))
        columns.append(pa.array(_plain(values), column.type))
    return pa.RecordBatch.from_arrays(columns, schema=SEQUENCES_SCHEMA)


def _plain(values: Any) -> Any:
    """numpy strings and scalars as Python's, which Arrow wants for its string columns."""
    array = np.asarray(values)
    return array.tolist() if array.ndim == 1 else list(values)
