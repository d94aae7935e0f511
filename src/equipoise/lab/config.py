"""What a run is: model, data, optimizer, balancing. A recipe is a function that returns a `Config`.

Values change by name, `config.change({"model.experts": 64})`; a `Config` that cannot be run is
refused when it is made, with both values that do not go together.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from equipoise.errors import EquipoiseError, nearest
from equipoise.lab.checks import check


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: rotary attention, RMSNorm, `nn.MoELayer`s."""

    hidden_size: int = 128
    layers: int = 4
    dense_layers: int = 0
    """The first so many layers have no experts."""
    heads: int = 4
    kv_heads: int = 4
    experts: int = 16
    top_k: int = 2
    expert_size: int = 64
    """Inner width of an expert."""
    dense_size: int = 256
    """Inner width of a layer without experts."""
    shared_experts: int = 0
    router: str = "softmax"
    """A router and its options: see `equipoise.lab.routers.ROUTERS`."""
    capacity: str = "none"
    """Limit of an expert's load, as `capacity(factor=1.25, overflow=drop)`; "none" drops nothing."""
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    norm_eps: float = 1e-5
    init_std: float = 0.02
    router_std: float = 0.02
    tied: bool = True
    """Embedding and output share their weights."""


@dataclass(frozen=True)
class DataConfig:
    """The text: a folder (a sub-folder or file per domain), a file, or the name of a data set."""

    source: str = "../shared/data/text"
    domains: tuple[str, ...] = ()
    """Those to use, in this order; all of the source if empty."""
    split: str = "train"
    """Of a data set from the hub."""
    text_field: str = "text"
    domain_field: str | None = None
    vocab_size: int = 1024
    """Of the byte-level BPE that is trained on the text."""
    held_out_tokens: int = 200_000
    """Of each domain, at least; never trained on."""
    row_length: int = 128
    """Tokens of a row; rows are packed, documents end with a token of their own."""
    block: int = 8
    """Rows that are drawn together from one domain."""
    arrangement: Literal["mixed", "domain"] = "mixed"
    """Blocks dealt out over the micro-batches of a step, or micro-batches of one domain each."""
    cache: str = "build/lab/data"


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    muon_lr: float = 2e-2
    """Of matrices under Muon; the rest takes `lr`."""
    router_lr_scale: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_share: float = 0.04
    decay_share: float = 0.2
    """Of the steps, at the end of "wsd"."""
    floor: float = 0.1
    """The last learning rate, as a share of the highest."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class Config:
    """A whole run. `name` labels it; two runs of equal configs, on as many processes and threads, give
    equal weights.
    """

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: str = "none"
    """Balancing terms: see `equipoise.lab.terms`."""
    tokens: int = 3_000_000
    """Trained on, in whole steps."""
    batch_rows: int = 64
    """Rows of an optimizer step, on all processes."""
    micro_rows: int = 16
    """Rows of a forward pass of one process."""
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights stay float32, and on a CPU attention and experts."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What several processes do with the model."""
    expert_parallel: bool = False
    """Experts are shared out over the processes."""
    processes: int = 1
    """That share out a step; 1 takes as many as a launcher started."""
    threads: int = 1
    """Of a CPU process."""
    evaluate_every: int = 0
    """Steps between evaluations on a small part of the held-out text; 0 only at the end."""
    evaluation_tokens: int = 0
    """Of each domain, at the end; 0 takes all of the held-out text."""
    checkpoint_seconds: float = 120.0
    trace: bool = True
    """Record the routing of the last evaluation."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch_rows * self.data.row_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, self.tokens // self.step_tokens)

    def change(self, values: Mapping[str, Any]) -> Self:
        """Another config, with values by dotted name; texts are read as the field's type."""
        _refuse_unknown(values, _names(self))
        return typing.cast(Self, _changed(self, dict(values), ""))

    def to_json(self) -> str:
        """All values, for the run folder."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A config as `to_json` wrote it."""
        return cls().change(dict(flat(json.loads(text))))


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of a nested mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names that differ, with both values."""
    mine = dict(flat(dataclasses.asdict(ours)))
    other = dict(flat(dataclasses.asdict(theirs)))
    return {key: (mine[key], other[key]) for key in mine if mine[key] != other[key]}


def _refuse_unknown(values: Iterable[str], names: list[str]) -> None:
    """EquipoiseError for a dotted name that there is not, with those of its part of the config."""
    for name in values:
        if name not in names:
            part = name.rpartition(".")[0]
            there = [n for n in names if n.rpartition(".")[0] == part] if part else names
            raise EquipoiseError(
                f"No setting {name!r}: there are {', '.join(there or names)}.{nearest(name, names)}"
            )


def _changed(config: Any, values: dict[str, Any], prefix: str) -> Any:
    types_of = typing.get_type_hints(type(config))
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            own[head] = _read(value, types_of[head], prefix + head)
    for head, below in inner.items():
        own[head] = _changed(getattr(config, head), below, f"{prefix}{head}.")
    return replace(config, **own)


def _names(config: Any) -> list[str]:
    found = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            found += [f"{entry.name}.{name}" for name in _names(value)]
        else:
            found.append(entry.name)
    return found


def _read(value: Any, wanted: Any, name: str) -> Any:
    """A value as the type of its field; texts come from the command line."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if value not in arguments:
            raise EquipoiseError(
                f"{name}={value!r} is not one of {', '.join(map(str, arguments))}."
                f"{nearest(str(value), arguments)}"
            )
        return value
    if origin is types.UnionType:
        return None if value in (None, "none") else _read(value, arguments[0], name)
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts if str(part).strip())
    try:
        return _as(value, wanted)
    except (TypeError, ValueError, OverflowError) as error:
        raise EquipoiseError(f"{name}={value!r} is not {_ARTICLE[wanted]}.") from error


_ARTICLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _whole(value: Any) -> int:
    """Exactly, however many digits; 1e6 is a whole number, too."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int):
        return value
    if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
        return int(value)
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _as(value: Any, wanted: Any) -> Any:
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if value not in ("true", "false"):
            raise ValueError
        return value == "true"
    if wanted is int:
        return _whole(value)
    if wanted is float:
        return float(value)
    if not isinstance(value, str):
        raise TypeError
    return value
