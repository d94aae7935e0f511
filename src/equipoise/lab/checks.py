"""What a config may not be, alone or together: refused with the values, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError
from equipoise.lab.terms import Call, balancing, one, parse

if TYPE_CHECKING:
    from equipoise.lab.config import Config, DataConfig

SMALLEST_VOCABULARY = 258
LARGEST_VOCABULARY = 2**16


def check(config: Config) -> None:
    """Raise EquipoiseError for values that cannot be, alone or together."""
    parts: dict[str, Any] = {
        "model": config.model,
        "data": config.data,
        "optimizer": config.optimizer,
        "": config,
    }
    for prefix, part in parts.items():
        for entry in fields(part):
            _in_range(f"{prefix}.{entry.name}".lstrip("."), getattr(part, entry.name))
    _shapes(config)
    _rows(config)
    _text(config.data)
    _methods(config)
    if config.processes > 1:
        check_shared(config, config.processes)


_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "model.hidden_size model.layers model.heads model.kv_heads model.experts model.top_k "
        "model.expert_size model.dense_size model.max_positions data.vocab_size "
        "data.held_out_tokens data.row_length data.block tokens batch_rows micro_rows",
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        "model.dense_layers model.shared_experts model.router_std optimizer.weight_decay "
        "optimizer.clip evaluate_every evaluation_tokens checkpoint_seconds",
        "0 or more",
        lambda value: 0 <= value < math.inf,
    ),
    (
        "model.rope_theta model.norm_eps model.init_std optimizer.lr optimizer.muon_lr "
        "optimizer.router_lr_scale",
        "above 0, and finite",
        lambda value: 0 < value < math.inf,
    ),
    (
        "optimizer.warmup_share optimizer.decay_share optimizer.floor",
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
    ),
    ("seed", "from 0 to below 2^63", lambda value: 0 <= value < 2**63),
    ("threads processes", "from 1 to 1024", lambda value: 1 <= value <= 1024),
    ("optimizer.beta1 optimizer.beta2", "from 0 to below 1", lambda value: 0 <= value < 1),
)


def _in_range(name: str, value: Any) -> None:
    for names, said, allowed in _RANGES:
        if name in names.split() and not allowed(value):
            raise EquipoiseError(f"{name}={value}; it has to be {said}.")


def _shapes(config: Config) -> None:
    model = config.model
    _divides("model.heads", model.heads, "model.hidden_size", model.hidden_size)
    _divides("model.kv_heads", model.kv_heads, "model.heads", model.heads)
    if model.hidden_size // model.heads % 2:
        raise EquipoiseError(
            f"model.hidden_size={model.hidden_size} over model.heads={model.heads}: rotary "
            "positions need heads of an even width."
        )
    if model.top_k > model.experts:
        raise EquipoiseError(
            f"model.top_k={model.top_k} is more than model.experts={model.experts}."
        )
    if model.dense_layers >= model.layers:
        raise EquipoiseError(
            f"model.dense_layers={model.dense_layers} of model.layers={model.layers} leaves no "
            "layer with experts."
        )


def _rows(config: Config) -> None:
    data, positions = config.data, config.model.max_positions
    _divides("micro_rows", config.micro_rows, "batch_rows", config.batch_rows)
    _divides("data.block", data.block, "batch_rows", config.batch_rows)
    if data.row_length > positions:
        raise EquipoiseError(
            f"data.row_length={data.row_length} is more than model.max_positions={positions}."
        )
    small, large = sorted((data.block, config.micro_rows))
    if data.arrangement == "domain" and large % small:
        raise EquipoiseError(
            f"data.arrangement=domain with data.block={data.block} and micro_rows="
            f"{config.micro_rows}: one has to be a multiple of the other, for micro-batches of one "
            "domain, or of whole blocks."
        )
    if config.tokens < config.step_tokens:
        raise EquipoiseError(
            f"tokens={config.tokens} is less than one step of {config.step_tokens} "
            f"(batch_rows={config.batch_rows} x data.row_length={data.row_length})."
        )


def _text(data: DataConfig) -> None:
    if not SMALLEST_VOCABULARY <= data.vocab_size <= LARGEST_VOCABULARY:
        raise EquipoiseError(
            f"data.vocab_size={data.vocab_size}; allowed is {SMALLEST_VOCABULARY} (256 bytes and "
            f"two marks) to {LARGEST_VOCABULARY} (tokens are kept in 16 bits)."
        )
    if data.held_out_tokens <= data.row_length:
        raise EquipoiseError(
            f"data.held_out_tokens={data.held_out_tokens} is not one row of data.row_length="
            f"{data.row_length} and its last target."
        )
    if len(set(data.domains)) < len(data.domains):
        raise EquipoiseError(f"data.domains={','.join(data.domains)} names a domain twice.")


def _methods(config: Config) -> None:
    model, optimizer = config.model, config.optimizer
    shares = optimizer.warmup_share + optimizer.decay_share
    if optimizer.schedule == "wsd" and shares > 1:
        raise EquipoiseError(
            f"optimizer.warmup_share={optimizer.warmup_share} and optimizer.decay_share="
            f"{optimizer.decay_share} are more than the whole run together."
        )
    terms = balancing(config.balance)
    if model.capacity != "none" and any(c.name == "capacity" for c in parse(config.balance)):
        raise EquipoiseError(
            f"model.capacity={model.capacity!r} and balance={config.balance!r} both limit the load."
        )
    from equipoise.lab.routers import check_balance, check_router

    router = one(model.router)
    check_router(model, router)
    check_balance(config.balance, router)
    _check_trained(config, router, terms)


def _check_trained(config: Config, router: Call, terms: Sequence[Any]) -> None:
    """Raise EquipoiseError for a router that nothing gives a gradient."""
    if dict(router.options).get("weighting") != "equal":
        return
    from equipoise.balance import Loss

    if not any(isinstance(term, Loss) for term in terms):
        raise EquipoiseError(
            f"model.router={str(router)!r} with balance={config.balance!r}: equal weights give the router "
            "no gradient, and no loss does. Take another weighting, or a loss such as "
            "balance='switch(weight=0.01)'."
        )


def check_shared(config: Config, count: int) -> None:
    """Raise EquipoiseError where a config cannot be shared out over so many processes."""
    if config.batch_rows % (config.micro_rows * count):
        raise EquipoiseError(
            f"batch_rows={config.batch_rows} cannot be shared out over {count} processes "
            f"in micro-batches of micro_rows={config.micro_rows}."
        )
    if config.parallel == "fsdp2" and count == 1:
        raise EquipoiseError(
            "parallel=fsdp2 cuts the weights over processes, and there is one: start the run with "
            "--processes N, or set it to ddp."
        )
    sharded = config.parallel == "fsdp2"
    if config.expert_parallel:
        if count == 1:
            raise EquipoiseError(
                "expert_parallel=true shares experts out over processes, and there is one: "
                "start the run with --processes N, or set it to false."
            )
        if sharded or config.model.experts % count:
            raise EquipoiseError(
                f"expert_parallel=true with parallel={config.parallel} and model.experts="
                f"{config.model.experts} over {count} processes: it takes parallel=ddp and "
                "a multiple of the processes."
            )
        if any(
            dict(call.options).get("overflow") == "pad" for call in parse(config.model.capacity)
        ):
            raise EquipoiseError(
                f"expert_parallel=true with model.capacity={config.model.capacity!r}: overflow=pad is for "
                "experts that are all here; use overflow=drop or reroute."
            )
    if one(config.model.router).name == "soft" and (sharded or config.expert_parallel):
        raise EquipoiseError(
            f"model.router={config.model.router!r} with parallel={config.parallel} and "
            f"expert_parallel={config.expert_parallel}: its layers take parallel=ddp, and every "
            "process all experts."
        )
    if sharded and config.optimizer.name == "muon":
        raise EquipoiseError(
            "optimizer.name=muon needs whole matrices, which parallel=fsdp2 cuts: use "
            "parallel=ddp or optimizer.name=adamw."
        )


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise EquipoiseError(f"{large_name}={large} is not a multiple of {small_name}={small}.")
