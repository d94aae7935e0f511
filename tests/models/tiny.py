"""Tiny random models of every MoE architecture of transformers, and the inputs to run them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.models import RouterSite, valid_tokens
from equipoise.routing import NO_EXPERT, Routing

SPEC = json.loads((Path(__file__).parents[1] / "data" / "tiny_moe_configs.json").read_text())
LAYERS = 4
SHAPE = (2, 16)
PADS = 5
ROUTER_STD = 0.4
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


def model_class(arch: str, cls: str | None = None) -> Any:
    """The class tested for an architecture: as listed, else its causal language model."""
    module = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
    named = cls or SPEC["per_architecture"].get(arch, {}).get("cls")
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


def merged(values: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` over `values`, nested dicts merged where both have one."""
    out = dict(values)
    for name, value in extra.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out


def build(arch: str, cls: str | None = None, **extra: Any) -> Any:
    """A tiny model in evaluation mode; skips the test where transformers lacks the architecture."""
    if arch not in architectures():
        pytest.skip(f"this transformers has no {arch}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = model_class(arch, cls)
    given = SPEC["per_architecture"].get(arch, {}).get("kw", {}) if cls is None else {}
    values = merged(merged(tiny_values(made.config_class), given), extra)
    config = made.config_class(**values)
    torch.manual_seed(0)
    return made(config).eval()


def randomise_routing(model: nn.Module) -> None:
    """Routers that decide by token: sharp scores, biases U(-0.5, 0.5), random hash tables."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        *owners, last = name.split(".")
        if re.search(r"correction_bias|expert_bias|balancing_bias", last):
            tensor.data.uniform_(-0.5, 0.5, generator=generator)
        elif last == "tid2eid":
            draw = torch.rand(len(tensor), 8, generator=generator)
            tensor.data.copy_(draw.argsort(-1)[:, : tensor.shape[1]])
        elif tensor.ndim == 2 and {"gate", "router", "router_gate"} & set(owners):
            tensor.data.normal_(std=ROUTER_STD, generator=generator)


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Random tokens, the first row padded on the left."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 250, SHAPE, generator=generator)
    mask = torch.ones(SHAPE, dtype=torch.long)
    mask[0, :PADS] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        given["use_cache"] = False
    if "decoder_input_ids" in accepted:
        given["decoder_input_ids"] = ids.flip(1)
    if type(model).__name__ == "Ernie4_5_VLMoeTextModel":
        given["moe_mm_token_type_ids"] = (torch.rand(SHAPE, generator=generator) < 0.4).int()
    return given


@torch.no_grad()
def record(model: nn.Module, sites: list[RouterSite], **inputs: Any) -> list[Routing]:
    """The Routing of each site in one forward pass, in the order of the sites."""
    heard: dict[str, Routing] = {}
    handles = [
        site.observe(lambda routing: heard.update({routing.path: routing})) for site in sites
    ]
    try:
        with valid_tokens(inputs.get("attention_mask")):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [heard[site.path] for site in sites]


def selected_TE(routing: Routing, num_experts: int) -> Tensor:
    """True where a recorded id says that expert e was selected for token t: bool [T, E]."""
    ids = routing.expert_ids_TK.long()
    chosen = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool)
    return chosen.scatter_(1, ids.masked_fill(ids == NO_EXPERT, num_experts), True)[:, :-1]
