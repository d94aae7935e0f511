"""Named configs, each a function; they derive from one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, nearest
from equipoise.lab.config import Config

EIGHT = (
    "c_code",
    "chinese",
    "formal_math",
    "legal_de",
    "literature_en",
    "math_word",
    "medical",
    "python",
)
"""Domains of the CPU tier."""


def small() -> Config:
    """The CPU tier: about 2 M parameters, 16 experts top-2, 3 M tokens of eight domains."""
    return Config(name="small").change({"data.domains": EIGHT, "model.init_std": 0.06})


def small_switch() -> Config:
    """`small` with the Switch loss over the global batch."""
    return small().change({"name": "small_switch", "balance": "switch(scope=global, weight=0.01)"})


def small_loss_free() -> Config:
    """`small` with a sigmoid router and the sign-controlled bias of DeepSeek-V3."""
    return small().change(
        {"name": "small_loss_free", "model.router": "sigmoid", "balance": "sign(rate=0.001)"}
    )


def tiny() -> Config:
    """A run of a minute, to see that everything works."""
    return small().change(
        {
            "name": "tiny",
            "tokens": 100_000,
            "model.hidden_size": 64,
            "model.layers": 2,
            "model.expert_size": 32,
            "model.dense_size": 128,
            "evaluation_tokens": 10_000,
        }
    )


def gpu() -> Config:
    """The GPU tier: 64 + 2 experts, top-6, about 40 M active parameters, 100 M tokens."""
    return small().change(
        {
            "name": "gpu",
            "precision": "bfloat16",
            "tokens": 100_000_000,
            "batch_rows": 128,
            "micro_rows": 32,
            "data.vocab_size": 8192,
            "data.row_length": 1024,
            "data.domains": (),
            "model.hidden_size": 512,
            "model.init_std": 0.02,
            "model.layers": 9,
            "model.dense_layers": 1,
            "model.heads": 8,
            "model.kv_heads": 8,
            "model.experts": 64,
            "model.top_k": 6,
            "model.shared_experts": 2,
            "model.expert_size": 256,
            "model.dense_size": 1536,
            "model.router": "sigmoid",
            "optimizer.lr": 1e-3,
            "threads": 8,
        }
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe for recipe in (tiny, small, small_switch, small_loss_free, gpu)
}


def recipe(name: str, values: Mapping[str, Any] | None = None) -> Config:
    """A recipe's config, with values changed by dotted name.

    Another `data.source` without `data.domains` brings its own domains, unless it has the recipe's.
    """
    if name not in RECIPES:
        raise EquipoiseError(
            f"No recipe {name!r}: there are {', '.join(RECIPES)}.{nearest(name, RECIPES)}"
        )
    values = values or {}
    config = RECIPES[name]().change(values)
    brings = "data.source" in values and "data.domains" not in values
    return reading(config, config.data.source) if brings else config


def reading(config: Config, source: str) -> Config:
    """The config with another text: the domains it asks for where that has them all, else all there are."""
    root = Path(source).expanduser()
    there = all(
        (root / name).is_dir() or any(root.glob(f"{name}.*")) for name in config.data.domains
    )
    return config.change(
        {"data.source": source, "data.domains": config.data.domains if there else ()}
    )
