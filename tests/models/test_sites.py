"""Watching a model: what is delivered, when, and that nothing stays behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from executed import Replay, executed_TE
from tiny import (
    HIDDEN,
    build,
    inputs_for,
    model_class,
    randomise_routing,
    record,
    selected_TE,
)
from torch import Tensor, nn

from equipoise.errors import RoutingError
from equipoise.models import RouterSite, check_routing, discover, is_moe_config, valid_tokens
from equipoise.models.compiled import is_compiled
from equipoise.models.scan import clean, split
from equipoise.routing import NO_EXPERT, Routing


def ids_of(routings: list[Routing]) -> list[Tensor]:
    return [routing.expert_ids_TK for routing in routings]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def heard_during(sites: list[RouterSite], run: Any) -> dict[str, list[Tensor]]:
    """All ids [T, K] that each site delivered while `run` ran, by path."""
    heard: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    handles = [s.observe(lambda r: heard[r.path].append(r.expert_ids_TK.clone())) for s in sites]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return heard


def test_importing_models_loads_torch_but_not_transformers() -> None:
    code = "import equipoise.models, sys; assert 'torch' in sys.modules; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_dense_model_has_no_sites() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    assert discover(LlamaForCausalLM(config)) == []
    assert discover(nn.Linear(2, 2)) == []
    assert not is_moe_config(config)


def test_site_describes_its_router() -> None:
    site = discover(build("deepseek_v3"))[0]
    assert (site.layer, site.path, site.stack) == (1, "model.layers.1.mlp", "model.layers")
    assert (site.num_experts, site.top_k, site.shared_experts, site.null_experts) == (8, 2, 1, 0)
    assert (site.score_function, site.selection_bias, site.family) == (
        "sigmoid",
        True,
        "deepseek_v3",
    )


def test_routing_carries_ids_weights_scores_and_padding() -> None:
    model = build("mixtral")
    inputs = inputs_for(model)
    routing = record(model, discover(model), **inputs)[2]
    assert (routing.layer, routing.path) == (2, "model.layers.2.mlp")
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (32, 2)
    assert routing.weights_TK.sum(-1).allclose(torch.ones(32))
    assert torch.equal(routing.scores_TE.topk(2).indices, routing.expert_ids_TK)
    assert torch.equal(routing.valid_T, inputs["attention_mask"].reshape(-1).bool())


def test_a_mask_of_another_size_is_not_taken() -> None:
    model = build("mixtral")
    site = discover(model)[0]
    heard: list[Routing] = []
    with site.observe(heard.append), valid_tokens(torch.ones(2, 9)):
        model(input_ids=torch.ones(2, 16, dtype=torch.long))
    model(input_ids=torch.ones(2, 16, dtype=torch.long))
    assert [routing.valid_T for routing in heard] == [None]


def test_removing_the_last_handle_leaves_no_hook() -> None:
    model = build("mixtral")
    before = hooks(model)
    site = discover(model)[0]
    first, second = site.observe(lambda _: None), discover(model)[0].observe(lambda _: None)
    assert hooks(model) == before + 2
    first.remove()
    first.remove()
    assert hooks(model) == before + 2
    second.remove()
    assert hooks(model) == before


def test_an_exception_takes_the_hooks_away() -> None:
    model = build("mixtral")
    before = hooks(model)

    def fail(_: Routing) -> None:
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"), discover(model)[1].observe(fail):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert hooks(model) == before


def test_two_observers_hear_the_same() -> None:
    model = build("mixtral")
    site = discover(model)[0]
    one: list[Routing] = []
    two: list[Routing] = []
    with site.observe(one.append), site.observe(two.append):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert len(one) == len(two) == 1
    assert one[0].expert_ids_TK.data_ptr() == two[0].expert_ids_TK.data_ptr()


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_other_experts_implementations_are_heard_as_executed(
    arch: str, implementation: str
) -> None:
    model = build(arch)
    randomise_routing(model)
    sites = discover(model)
    eager = ids_of(record(model, sites, **inputs_for(model)))
    model.set_experts_implementation(implementation)
    replay = Replay(model.get_submodule(sites[-1].path), HIDDEN)
    routings = record(model, sites, **inputs_for(model))
    replay.release()
    assert all(torch.equal(a, b) for a, b in zip(eager, ids_of(routings), strict=True))
    executed = executed_TE(replay, replay.module, sites[-1].num_experts)
    assert torch.equal(selected_TE(routings[-1], sites[-1].num_experts), executed)


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "jetmoe", "llama4"])
def test_cached_generation_routes_as_the_whole_sequence_does(arch: str) -> None:
    model = build(arch, **({} if arch != "llama4" else {"cls": "Llama4ForCausalLM"}))
    randomise_routing(model)
    sites = discover(model)
    prompt = torch.randint(3, 250, (1, 7), generator=torch.Generator().manual_seed(3))
    out: list[Tensor] = []
    steps = heard_during(
        sites,
        lambda: out.append(
            model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
        ),
    )
    whole = heard_during(sites, lambda: model(input_ids=out[0][:, :-1], use_cache=False))
    for site in sites:
        assert [len(ids) for ids in steps[site.path]] == [7, 1, 1, 1, 1]
        assert torch.equal(torch.cat(steps[site.path]), whole[site.path][0])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mixtral", "zaya"])
def test_compiled_model_delivers_what_the_eager_one_does(arch: str) -> None:
    model = build(arch, num_hidden_layers=2)
    randomise_routing(model)
    sites = discover(model)
    inputs = {"input_ids": torch.randint(3, 250, (2, 16)), "use_cache": False}
    eager = record(model, sites, **inputs)
    torch.compiler.reset()
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            compiled(**inputs)
        after = discover(compiled)
        assert [site.path for site in after] == [site.path for site in sites]
        first = record(compiled, after, **inputs)
        heard: list[Routing] = []
        sites[0].observe(heard.append).remove()
        with torch.no_grad():
            compiled(**inputs)
    finally:
        torch.compiler.reset()
    assert heard == []
    for a, b in zip(eager, first, strict=True):
        assert torch.equal(a.expert_ids_TK, b.expert_ids_TK)
        assert a.scores_TE.allclose(b.scores_TE, atol=1e-5)
        assert a.weights_TK.allclose(b.weights_TK, atol=1e-5)


def test_every_way_to_compile_is_noticed() -> None:
    model = build("mixtral")
    assert not any(is_compiled(module) for module in model.modules())
    assert is_compiled(torch.compile(model))
    paths = [site.path for site in discover(model)]
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert [site.path for site in discover(model)] == paths
    assert any(is_compiled(module) for module in model.modules())
    whole, forward = build("mixtral"), build("mixtral")
    whole.compile()
    forward.forward = torch.compile(forward.forward)
    assert is_compiled(whole)
    assert is_compiled(forward)


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload"])
def test_offloaded_weights_change_nothing(place: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("qwen3_moe")
    want = ids_of(record(model, discover(model), **inputs_for(model)))
    if place == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    got = ids_of(record(model, discover(model), **inputs_for(model)))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_towers_with_the_same_layer_numbers_have_paths_and_stacks_of_their_own() -> None:
    undeclared = {
        "text_config": {"shared_expert_intermediate_size": 32},
        "spatial_merge_size": 2,
    }
    model = build(
        "qwen3_omni_moe", cls="Qwen3OmniMoeForConditionalGeneration", talker_config=undeclared
    )
    sites = discover(model)
    stacks = {site.stack for site in sites}
    assert stacks == {"thinker.model.language_model.layers", "talker.model.layers"}
    assert len({site.path for site in sites}) == len(sites)
    for stack in stacks:
        assert [site.layer for site in sites if site.stack == stack] == [0, 1, 2, 3]
    talker = [site for site in sites if site.stack.startswith("talker")]
    assert talker[0].shared_experts == 1
    rows = torch.randn(1, 5, HIDDEN)
    heard = heard_during(sites, lambda: model.talker.model(inputs_embeds=rows))
    assert all(len(ids) == (path.startswith("talker")) for path, ids in heard.items())


def test_full_size_towers_are_found_with_their_own_numbers_of_experts() -> None:
    cls = model_class("dots3_note", "Dots3NoteForConditionalGeneration")
    with torch.device("meta"):
        sites = discover(cls(cls.config_class()))
    text = [site for site in sites if "language_model" in site.stack]
    vision = [site for site in sites if "vision" in site.stack]
    assert [site.layer for site in text] == list(range(1, 46))
    assert {(site.num_experts, site.top_k) for site in text} == {(256, 8)}
    assert [site.num_experts for site in vision][:3] == [4, 8, 12]
    assert len({site.path for site in sites}) == 45 + 17


def test_deepseek_v3_has_58_routers_of_256_experts_from_layer_3_on() -> None:
    cls = model_class("deepseek_v3")
    with torch.device("meta"):
        sites = discover(cls(cls.config_class()))
    assert [site.layer for site in sites] == list(range(3, 61))
    assert {(site.num_experts, site.top_k) for site in sites} == {(256, 8)}


def test_rows_split_by_modality_reach_the_router_that_served_them() -> None:
    model = build("ernie4_5_vl_moe")
    sites = discover(model)
    inputs = inputs_for(model)
    vision = int(inputs["moe_mm_token_type_ids"].sum())
    for site, routing in zip(sites, record(model, sites, **inputs), strict=True):
        assert len(routing.expert_ids_TK) == (vision if "vision" in site.path else 32 - vision)
        assert routing.valid_T is None


def test_ids_that_do_not_fit_the_configuration_stop_the_forward_pass() -> None:
    model = build("mixtral")
    site = discover(model)[0]
    site.top_k = 3
    with pytest.raises(RoutingError, match=r"2 experts per token were routed.*configured for 3"):
        record(model, [site], **inputs_for(model))
    experts = model.model.layers[0].mlp.experts
    with (
        pytest.raises(RoutingError, match=r"dtype torch.float32; integers"),
        discover(model)[0].observe(lambda _: None),
    ):
        experts(torch.randn(4, HIDDEN), torch.rand(4, 2), torch.rand(4, 2))


@pytest.mark.parametrize("bad", [8, -2])
def test_an_id_out_of_range_is_named(bad: int) -> None:
    model = build("mixtral")
    site = discover(model)[0]
    routing = record(model, [site], **inputs_for(model))[0]
    check_routing(routing, site)
    routing.expert_ids_TK[0, 0] = NO_EXPERT
    check_routing(routing, site)
    routing.expert_ids_TK[0, 0] = bad
    with pytest.raises(RoutingError, match=f"expert id {bad} .* experts 0 to 7"):
        check_routing(routing, site)


@pytest.mark.parametrize(
    ("path", "stack", "layer"),
    [
        ("model.layers.11.mlp", "model.layers", 11),
        ("encoder.block.1.layer.2.mlp", "encoder.block", 1),
        ("mlp", "", 0),
    ],
)
def test_layer_number_is_the_first_in_the_path(path: str, stack: str, layer: int) -> None:
    assert split(path) == (stack, layer)


def test_wrappers_leave_no_name_in_a_path() -> None:
    assert clean("_orig_mod.model.layers.0._orig_mod.mlp") == "model.layers.0.mlp"


def test_scores_are_heard_only_while_somebody_wants_them() -> None:
    model = build("olmoe")
    site = discover(model)[0]
    inputs = inputs_for(model)
    without: list[bool] = []
    with_scores: list[bool] = []
    with torch.no_grad():
        plain = site.observe(lambda r: without.append(r.scores_TE is None), scores=False)
        assert hooks(model) == 1
        model(**inputs)
        other = site.observe(lambda r: with_scores.append(r.scores_TE is None))
        model(**inputs)
        other.remove()
        plain.remove()
    assert without == [True, False]
    assert with_scores == [False]
    assert hooks(model) == 0
