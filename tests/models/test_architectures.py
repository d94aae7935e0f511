"""Every MoE architecture of transformers: what is recorded is what the experts executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from executed import Replay, executed_TE, runnable
from tiny import HIDDEN, architectures, build, inputs_for, randomise_routing, record, selected_TE
from torch import nn

from equipoise.errors import RoutingError
from equipoise.models import check_routing, discover, is_moe_config
from equipoise.models.configs import moe_layers
from equipoise.routing import NO_EXPERT

pytestmark = pytest.mark.slow

REFUSED = {"nllb_moe": "experts 0 and 1", "vitpose_backbone": "dataset_index"}
RECORDED = [arch for arch in architectures() if arch not in REFUSED]
NULLS = {"zaya", "longcat_flash", "switch_transformers"}
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.mark.parametrize("arch", RECORDED)
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
        assert len(selected.unique(dim=0)) > 1, "the tokens agree: this shows nothing"
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


def blocks_with_experts(model: nn.Module) -> list[str]:
    """Paths of MoE blocks by what modules are called in transformers, whatever they take."""
    named = dict(model.named_modules())
    kinds = {path: type(module).__name__ for path, module in named.items()}
    found = [
        p.rpartition(".")[0] for p in named if p.endswith(".experts") and "MoA" not in kinds[p]
    ]
    return found + [
        p for p, kind in kinds.items() if kind in ("DogeCDMoE", "JetMoeMoE", "JetMoeMoA")
    ]


@pytest.mark.parametrize("arch", RECORDED)
def test_every_configured_moe_layer_has_its_site(arch: str) -> None:
    model = build(arch)
    sites = discover(model)
    assert is_moe_config(model.config)
    assert len(sites) == len(blocks_with_experts(model))
    numbers = {int(re.search(r"\d+", path).group()) for path in blocks_with_experts(model)}
    assert {site.layer for site in sites} == numbers
    configured = moe_layers(model.config)
    assert configured is None or configured == numbers
    assert [s.layer for s in sites if s.stack == sites[0].stack] == sorted(
        s.layer for s in sites if s.stack == sites[0].stack
    )


@pytest.mark.parametrize("arch", REFUSED)
def test_architecture_whose_routing_cannot_be_recorded_is_refused_by_name(arch: str) -> None:
    model = build(arch)
    with pytest.raises(RoutingError, match=f"cannot be recorded.*{REFUSED[arch]}"):
        discover(model)


def test_nllb_moe_runs_two_experts_whatever_its_router_says() -> None:
    model = build("nllb_moe", decoder_sparse_step=2)
    block = model.encoder.layers[1].ffn
    replay = Replay(block, HIDDEN)
    with torch.no_grad():
        model(**inputs_for(model))
    replay.release()
    ran = executed_TE(replay, block, num_experts=8).any(0)
    assert ran.tolist() == [True, True] + [False] * 6


@pytest.mark.parametrize("arch", ["deepseek_v3", "glm4_moe", "lfm2_moe", "zaya"])
def test_top_k_of_the_scores_is_not_what_biased_routers_select(arch: str) -> None:
    model = build(arch)
    randomise_routing(model)
    sites = discover(model)
    assert all(site.selection_bias for site in sites)
    for site, routing in zip(sites, record(model, sites, **inputs_for(model)), strict=True):
        plain = routing.scores_TE.topk(site.top_k).indices.sort().values
        assert not torch.equal(plain, routing.expert_ids_TK.sort().values)


def test_disturbing_experts_finds_a_wrong_record() -> None:
    model = build("mixtral")
    site = discover(model)[0]
    replay = Replay(runnable(model, site.path), HIDDEN)
    routing = record(model, [site], **inputs_for(model))[0]
    executed = executed_TE(replay, model.get_submodule(site.path), site.num_experts)
    routing.expert_ids_TK[3, 0] = (routing.expert_ids_TK[3, 0] + 1) % site.num_experts
    assert not torch.equal(selected_TE(routing, site.num_experts), executed)


def test_hash_layers_say_so_and_follow_the_table() -> None:
    model = build("deepseek_v4")
    randomise_routing(model)
    sites = discover(model)
    assert [site.score_function for site in sites] == ["hash"] + ["sqrtsoftplus"] * 3
    inputs = inputs_for(model)
    routing = record(model, sites[:1], **inputs)[0]
    table = model.get_submodule(sites[0].path).gate.tid2eid
    assert torch.equal(routing.expert_ids_TK, table[inputs["input_ids"].reshape(-1)])


def test_slots_without_an_expert_are_marked() -> None:
    for arch in sorted(NULLS):
        model = build(arch)
        randomise_routing(model)
        sites = discover(model)
        routings = record(model, sites, **inputs_for(model))
        assert any((r.expert_ids_TK == NO_EXPERT).any() for r in routings), arch
        assert all((r.expert_ids_TK != NO_EXPERT).any() for r in routings), arch
    assert discover(build("longcat_flash"))[0].null_experts == 2


def test_the_page_lists_every_architecture_that_this_transformers_routes() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("<!-- table")[2].partition("<!-- end")[0]
    rows = re.findall(r"^\| (\w+) \|", table, re.MULTILINE)
    listed = [row for row in rows if row != "architecture"]
    new = sorted(set(architectures()) - set(listed))
    assert not new, f"transformers has MoE architectures that docs/architectures.md lacks: {new}"
    assert len(listed) == len(set(listed)) == 73
