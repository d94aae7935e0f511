"""Every MoE architecture of transformers: what is recorded is what the experts executed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from executed import Replay, executed_TE, runnable
from tiny import HIDDEN, PADS, SHAPE, architectures, build
from torch import Tensor, nn

from equipoise.errors import RoutingError
from equipoise.models import RouterSite, check_routing, discover, valid_tokens
from equipoise.routing import NO_EXPERT, Routing

REFUSED = {"nllb_moe": "experts 0 and 1", "vitpose_backbone": "dataset_index"}
NULLS = {"zaya", "longcat_flash", "switch_transformers"}


def randomise_routing(model: nn.Module) -> None:
    """Selection biases U(-0.5, 0.5), hash tables of random distinct experts."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        last = name.rpartition(".")[2]
        if re.search(r"correction_bias|expert_bias|balancing_bias", last):
            tensor.data.uniform_(-0.5, 0.5, generator=generator)
        elif last == "tid2eid":
            draw = torch.rand(len(tensor), 8, generator=generator)
            tensor.data.copy_(draw.argsort(-1)[:, : tensor.shape[1]])


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
    handles = [site.observe(lambda routing: heard.update({routing.path: routing})) for site in sites]
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


@pytest.mark.parametrize("arch", [a for a in architectures() if a not in REFUSED])
def test_recorded_selection_is_what_the_experts_executed(arch: str) -> None:
    model = build(arch)
    randomise_routing(model)
    sites = discover(model)
    assert sites
    assert len({site.path for site in sites}) == len(sites)
    replays = [Replay(runnable(model, site.path), HIDDEN) for site in sites]
    routings = record(model, sites, **inputs_for(model))
    for replay in replays:
        replay.release()

    for site, routing, replay in zip(sites, routings, replays, strict=True):
        check_routing(routing, site)
        block = model.get_submodule(site.path)
        executed = executed_TE(replay, block, site.num_experts)
        selected = selected_TE(routing, site.num_experts)
        if site.path.endswith("self_attention.experts"):
            # An attention expert multiplies the zeros that padding attends to: no trace in outputs.
            selected, executed = selected[routing.valid_T], executed[routing.valid_T]
        assert torch.equal(selected, executed), f"{site.path}: recorded and executed differ"
        none = routing.expert_ids_TK == NO_EXPERT
        chosen = selected_TE(routing, site.num_experts).sum(-1)
        assert torch.equal(chosen, site.top_k - none.sum(-1)), "an id comes twice"
        assert arch in NULLS or not none.any()
        assert routing.weights_TK is not None
        assert routing.weights_TK.shape == routing.expert_ids_TK.shape
