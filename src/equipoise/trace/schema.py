"""The trace format, version 1: names, Arrow schemas and the manifest. Specified in docs/trace-format.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa

from equipoise.errors import TraceError

FORMAT = "equipoise-trace"
VERSION = 1
LEVELS = ("counts", "ids", "full")
ROLES = ("none", "description", "few-shot", "question", "choices", "answer", "text")
PHASES = ("prefill", "decode")
LABELS = ("subject", "category", "domain")
OFF = ("off", "0", "false", "no")
"""Values of the environment variable EQUIPOISE_TRACE that make recording a no-op."""
WINDOW_TOKENS = 8192
"""A window closes with the first forward pass that brings it to this many rows."""
NO_SEQUENCE = 2**32 - 1
"""Sequence number of a row that belongs to no known sequence (a vision patch, say)."""


@dataclass(frozen=True)
class Layer:
    """One router of the recorded model; a trace's columns follow the order of its layers."""

    layer: int
    """True layer number in the model, dense layers counted."""
    path: str
    experts: int
    top_k: int
    name: str = ""
    """Column name, unique in the trace: layer_7, or layer_7:path where two routers share a number."""
    stack: str = ""
    """Routers of one stack see the same token rows."""
    score_function: str = "unknown"
    selection_bias: bool = False
    shared_experts: int = 0

    @property
    def id_dtype(self) -> Any:
        """numpy dtype of stored ids; its largest value stands for "no expert"."""
        import numpy as np

        return np.uint8 if self.experts <= 255 else np.uint16


def name_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Sort layers by number (stack order kept) and give each its unique column name."""
    ordered = sorted(layers, key=lambda layer: layer.layer)
    numbers = [layer.layer for layer in ordered]
    named = []
    for layer in ordered:
        unique = numbers.count(layer.layer) == 1
        name = f"layer_{layer.layer}" if unique else f"layer_{layer.layer}:{layer.path}"
        named.append(Layer(**{**asdict(layer), "name": name}))
    return tuple(named)


@dataclass
class Manifest:
    """`trace.json`: what one part of a trace is. A part is what one process wrote in one session."""

    layers: tuple[Layer, ...]
    level: str = "ids"
    every: int = 1
    window_tokens: int = WINDOW_TOKENS
    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    """Ranks with one data_rank saw the same tokens (tensor parallel) and are counted once."""
    session: int = 0
    run: str = ""
    status: str = "partial"
    meta: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Written at close: bytes and batches of each file."""
    totals: dict[str, Any] = field(default_factory=dict)
    """Written at close: windows, rows stored, tokens and selections of each layer."""

    @property
    def part(self) -> str:
        """Name of the part, which its files carry: r00000, or r00000-s001 after a resume."""
        tail = f"-s{self.session:03d}" if self.session else ""
        return f"r{self.rank:05d}{tail}"

    @property
    def file_name(self) -> str:
        """`trace.json` for the first rank's first session, `trace-<part>.json` for others."""
        return "trace.json" if self.part == "r00000" else f"trace-{self.part}.json"

    @property
    def stacks(self) -> tuple[str, ...]:
        """Stacks in order of first appearance; each has a tokens file of its own."""
        return tuple(dict.fromkeys(layer.stack for layer in self.layers))

    def tokens_file(self, stack: int) -> str:
        """File name of the token rows of the stack with this index."""
        return f"tokens-{self.part}.arrow" if stack == 0 else f"tokens-{self.part}-{stack}.arrow"

    def to_json(self) -> str:
        """Canonical JSON with a digest over everything else, so that edits by hand are noticed."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["digest"] = _digest(body)
        return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str) -> Manifest:
        """Parse and check a manifest; `name` is what an error calls it."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise TraceError(f"{name} is not JSON ({error}): damaged, or not a trace") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise TraceError(f"{name} is not the manifest of an Equipoise trace")
        if body.get("version") != VERSION:
            raise TraceError(
                f"{name} has trace format version {body.get('version')!r}; this Equipoise reads"
                f" version {VERSION}. Read it with the Equipoise that wrote it, or record again."
            )
        if body.pop("digest", None) != _digest(body):
            raise TraceError(
                f"{name} was changed after it was written (its digest does not match)."
                " Restore the original, or record again."
            )
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in body.items() if key in known}
        values["layers"] = tuple(Layer(**layer) for layer in values["layers"])
        return cls(**values)


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def counts_schema(layers: Sequence[Layer]) -> pa.Schema:
    """One row per window and group of rows that share labels, role and phase."""
    cells = sum(layer.experts for layer in layers)
    return pa.schema(
        [
            pa.field("window", pa.int32(), nullable=False),
            *(pa.field(name, pa.string()) for name in LABELS),
            pa.field("role", pa.string(), nullable=False),
            pa.field("phase", pa.string(), nullable=False),
            pa.field("rows", pa.uint32(), nullable=False),
            pa.field("tokens", _list_of(pa.uint32(), len(layers)), nullable=False),
            pa.field("unrouted", _list_of(pa.uint32(), len(layers)), nullable=False),
            pa.field("counts", _list_of(pa.uint32(), cells), nullable=False),
        ]
    )


def tokens_schema(layers: Sequence[Layer], level: str) -> pa.Schema:
    """One row per token; `layers` are those of one stack."""
    columns = [
        pa.field("sequence", pa.uint32(), nullable=False),
        pa.field("position", pa.uint32(), nullable=False),
        pa.field("phase", pa.uint8(), nullable=False),
        pa.field("role", pa.uint8(), nullable=False),
    ]
    for layer in layers:
        ids = pa.from_numpy_dtype(layer.id_dtype)
        columns.append(pa.field(layer.name, _list_of(ids, layer.top_k), nullable=False))
    if level == "full":
        for layer in layers:
            weights = _list_of(pa.float32(), layer.top_k)
            columns.append(pa.field(f"weights:{layer.name}", weights, nullable=False))
            columns.append(pa.field(f"margin:{layer.name}", pa.float32(), nullable=False))
    return pa.schema(columns)


ROLE_SPAN = pa.struct(
    [("role", pa.string()), ("start", pa.int32()), ("stop", pa.int32())],
)
SEQUENCES_SCHEMA = pa.schema(
    [
        pa.field("sequence", pa.int64(), nullable=False),
        *(pa.field(name, pa.string()) for name in LABELS),
        pa.field("split", pa.string()),
        pa.field("name", pa.string()),
        pa.field("question", pa.int32()),
        pa.field("tokens", pa.int32()),
        pa.field("roles", pa.list_(ROLE_SPAN)),
        pa.field("answer", pa.string()),
        pa.field("choice", pa.string()),
        pa.field("correct", pa.bool_()),
        pa.field("loglikelihoods", pa.list_(pa.float64())),
    ]
)


def _list_of(value: pa.DataType, length: int) -> pa.DataType:
    return pa.list_(pa.field("item", value, nullable=False), length)
