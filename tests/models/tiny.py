"""Tiny random models of every MoE architecture of transformers, and the inputs to run them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SPEC = json.loads((Path(__file__).parents[1] / "data" / "tiny_moe_configs.json").read_text())
LAYERS = 4
SHAPE = (2, 16)
PADS = 5
HIDDEN = SPEC["tiny_values"]["hidden_size"]


def modelings() -> Path:
    """The folder of transformers' models, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models"


@cache
def architectures() -> tuple[str, ...]:
    """Folders of transformers whose code routes: it records router logits or defines experts."""
    return tuple(sorted({f.parent.name for f in modelings().glob("*/modeling_*.py") if _routes(f)}))


def _routes(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    if "router_logits" not in text and "Experts" not in text and "NaiveMoe" not in text:
        return False
    return any(_routing_node(node) for node in ast.walk(ast.parse(text)))


def _routing_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Dict):
        return any(isinstance(k, ast.Constant) and k.value == "router_logits" for k in node.keys)
    if isinstance(node, ast.ClassDef):
        return node.name.endswith(("Experts", "NaiveMoe")) and "Shared" not in node.name
    return False


def model_class(arch: str) -> Any:
    """The class tested for an architecture: as listed, else its causal language model."""
    module = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
    named = SPEC["per_architecture"].get(arch, {}).get("cls")
    if named:
        return getattr(module, named)
    return next(getattr(module, n) for n in module.__all__ if n.endswith("ForCausalLM"))


def tiny_values(config_class: Any) -> dict[str, Any]:
    """The tiny value of every attribute that a config declares, nested configs as dicts."""
    declared = {field.name for field in dataclasses.fields(config_class)}
    values = {name: v for name, v in SPEC["tiny_values"].items() if name in declared}
    if "num_hidden_layers" in declared | set(config_class.attribute_map):
        values["num_hidden_layers"] = LAYERS
    if "kv_lora_rank" in declared:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if dataclasses.is_dataclass(part):
            values[name] = tiny_values(part)
    return values


def build(arch: str, **extra: Any) -> nn.Module:
    """A tiny model in evaluation mode; skips the test where transformers lacks the architecture."""
    if arch not in architectures():
        pytest.skip(f"this transformers has no {arch}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    cls = model_class(arch)
    given = SPEC["per_architecture"].get(arch, {}).get("kw", {})
    config = cls.config_class(**{**tiny_values(cls.config_class), **given, **extra})
    torch.manual_seed(0)
    model: nn.Module = cls(config).eval()
    return model
