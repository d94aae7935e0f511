"""Every MoE architecture of transformers: losses reach its router, biases act on its selection."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.balance import Bias, Loss, Sign, attach
from equipoise.balance.biases import own_bias
from equipoise.balance.places import holders
from equipoise.balance.probabilities import Scores
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, discover
from equipoise.models.scan import Scan

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny import (
    SPEC,
    architectures,
    build,
    inputs_for,
    model_class,
    modelings,
    randomise_routing,
    record,
    selected_TE,
)

pytestmark = pytest.mark.slow
REFUSED = {"nllb_moe", "vitpose_backbone"}
COVERED = [arch for arch in architectures() if arch not in REFUSED]
NO_LOSS = {"doge": "product keys"}
NO_BIAS = {"doge": "product keys", "phimoe": "at random"}
LIMITED = {"switch_transformers", "mistral4", "mistral_large4", "kolibri1"}
"""Capacity drops most tokens of a hot expert, or groups rule it out for some."""
OWN_LOSS_TESTED = (
    "dbrx deepseek_v4 doge ernie4_5_moe flex_olmo flint gpt_oss granitemoe granitemoe_swa "
    "granitemoehybrid granitemoeshared jamba jetmoe laguna mellum minimax minimax_m2 mixtral "
    "olmoe phimoe qwen2_moe qwen3_moe qwen3_next qwen4_exp"
)
OWN_LOSS: list[tuple[str, str | None]] = [
    *((arch, None) for arch in OWN_LOSS_TESTED.split()),
    ("ernie4_5_vl_moe", "Ernie4_5_VL_MoeForConditionalGeneration"),
    ("glm4v_moe", "Glm4vMoeForConditionalGeneration"),
    ("glm5_next", "Glm5NextForConditionalGeneration"),
    ("minimax_m3_vl", "MiniMaxM3VLForCausalLM"),
    ("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration"),
    ("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
    ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    ("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    ("qwen4_exp", "Qwen4ExpForConditionalGeneration"),
    ("switch_transformers", "SwitchTransformersForConditionalGeneration"),
]
"""Families that add a balancing loss to their own, and a class that does so where the tiny one does not.

Qwen3OmniMoe's talker is not among them: no tiny one can be made of these values."""
TOKENS = ("vision_start", "audio_start", "image", "video", "audio")
AROUND = {"qwen3_omni_moe": {f"{name}_token_id": 251 + i for i, name in enumerate(TOKENS)}}


def losses(arch: str) -> list[Loss]:
    logits = arch not in ("gemma4", "diffusion_gemma")
    return [Loss("switch", weight=1.0), *([Loss("z", weight=1e-2)] if logits else [])]


@pytest.mark.parametrize("arch", COVERED)
def test_routers_get_the_formulas_gradient(arch: str) -> None:
    model = build(arch)
    randomise_routing(model)
    inputs = inputs_for(model)
    if arch in NO_LOSS:
        with pytest.raises(EquipoiseError, match=NO_LOSS[arch]):
            attach(model, *losses(arch))
        return
    with attach(model, *losses(arch)) as handle:
        report = handle.check(**inputs)
    assert report.routers
    assert all(norm > 0 for name, norm in report.routers.items() if trains(name))
    assert report.difference < 1e-5


def trains(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name and "balancing" not in name


@pytest.mark.parametrize("arch", COVERED)
def test_a_bias_moves_the_selection_and_keeps_the_weighting_rule(arch: str) -> None:
    model = build(arch)
    randomise_routing(model)
    inputs = inputs_for(model)
    sites = [site for site in discover(model) if site.score_function != "hash"]
    before = record(model, sites, **inputs)
    first = sites.index(earliest(sites))
    cold = int(selected_TE(before[first], sites[first].num_experts).sum(0).argmin())
    if arch in NO_BIAS:
        with pytest.raises(EquipoiseError, match=NO_BIAS[arch]):
            attach(model, Bias(Sign()))
        return
    with attach(model, Bias(Sign())) as handle:
        own = [bias.own for bias in handle.biases]
        kept = [bias.read().clone() for bias in handle.biases]
        same = record(model, sites, **inputs)
        for bias in handle.biases:
            assert bias.read().dtype == torch.float32
            bias.write(bias.read() + 10.0 * one_hot(cold, len(bias.read())))
        moved = record(model, sites, **inputs)
        for bias, value in zip(handle.biases, kept, strict=True):
            bias.write(value)
    after = record(model, sites, **inputs)
    assert own == [site.selection_bias for site in sites]
    for site, was, still, now, again in zip(sites, before, same, moved, after, strict=True):
        assert torch.equal(was.expert_ids_TK, still.expert_ids_TK), "a bias of 0 changed something"
        assert torch.equal(was.weights_TK, still.weights_TK)
        assert torch.equal(was.expert_ids_TK, again.expert_ids_TK), "detach left something"
        chosen = selected_TE(now, site.num_experts)
        if site is earliest(sites):
            share = chosen[:, cold].float().mean()
            assert share > selected_TE(was, site.num_experts)[:, cold].float().mean()
            assert share == 1 or arch in LIMITED
            same_weighting(was, now)


def earliest(sites: list[RouterSite]) -> RouterSite:
    """The router that runs first; in jetmoe attention routes before the feed-forward."""
    return next((site for site in sites if "attention" in site.path), sites[0])


def one_hot(at: int, length: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(at), length).float()


def same_weighting(was, now) -> None:  # type: ignore[no-untyped-def]
    """Tokens that chose the same set before and after have the same weights for it."""
    a, order_a = was.expert_ids_TK.sort(dim=1)
    b, order_b = now.expert_ids_TK.sort(dim=1)
    equal = (a == b).all(1) & (a >= 0).all(1)
    assert torch.allclose(
        was.weights_TK.gather(1, order_a)[equal],
        now.weights_TK.gather(1, order_b)[equal],
        atol=1e-6,
    )


def test_sites_without_an_own_bias_get_their_weights_from_unbiased_scores() -> None:
    """Mixtral renormalises the selected probabilities: with a bias too, those of the scores."""
    model = build("mixtral")
    randomise_routing(model)
    inputs = inputs_for(model)
    sites = discover(model)
    with attach(model, Bias(Sign())) as handle:
        for bias in handle.biases:
            bias.write(torch.linspace(-0.3, 0.3, 8))
        for site, routing in zip(sites, record(model, sites, **inputs), strict=True):
            probs = torch.softmax(routing.scores_TE.float(), -1)
            ids = (probs + torch.linspace(-0.3, 0.3, 8)).topk(site.top_k).indices
            assert torch.equal(ids, routing.expert_ids_TK)
            wanted = probs.gather(1, ids)
            wanted = wanted / wanted.sum(-1, keepdim=True)
            assert torch.allclose(wanted, routing.weights_TK, atol=1e-6)


@pytest.mark.parametrize("arch", [a for a in COVERED if a not in NO_BIAS])
def test_what_the_top_k_compares_is_what_the_site_says(arch: str) -> None:
    """The table of routers that compare logits, against the values that reach torch.topk."""
    model = build(arch)
    randomise_routing(model)
    sites = [s for s in discover(model) if s.score_function != "hash"]
    spy = Spy({(s.num_experts + s.null_experts, s.top_k) for s in sites})
    with spy:
        model(**inputs_for(model))
    assert spy.seen, "no top-k over the experts was seen"
    if any(site.selection_bias for site in sites):
        assert any(biased_scores_in(model, site, spy.seen) for site in sites)
        return
    probabilities = all(bool(((x >= 0) & (x <= 1)).all()) for x in spy.seen)
    assert probabilities == (sites[-1].compares == "scores")


def biased_scores_in(model: nn.Module, site: RouterSite, seen: list[Tensor]) -> bool:
    """Whether a top-k compared the site's scores plus its bias, but for what groups rule out."""
    (routing,) = record(model, [site], **inputs_for(model))
    if routing.scores_TE is None:
        return False
    scores = Scores(site).compared(routing.scores_TE)
    found = own_bias(site, holders(Scan(model), site))
    assert found is not None
    wanted = scores + getattr(*found).detach().float().view(-1)
    for values in seen:
        x = values.reshape(-1, values.shape[-1])
        inside = torch.isfinite(x) & (x != 0)
        if x.shape == wanted.shape and torch.allclose(x[inside], wanted[inside], atol=1e-5):
            return True
    return False


class Spy(torch.overrides.TorchFunctionMode):
    def __init__(self, shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes, self.seen = shapes, []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2:
            k = kwargs.get("k", args[1] if len(args) > 1 else None)
            if name == "argmax":
                k = 1
            if name in ("topk", "argmax") and (x.shape[-1], k) in self.shapes:
                self.seen.append(x.detach())
        return func(*args, **kwargs)


@pytest.mark.parametrize(("arch", "cls"), OWN_LOSS, ids=lambda name: name)
def test_the_models_own_balancing_loss_is_off_while_attached(arch: str, cls: str | None) -> None:
    model = with_labels(arch, cls).train()
    randomise_routing(model)
    inputs = inputs_for(model)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])

    def loss(**extra: bool) -> float:
        torch.manual_seed(0)
        return float(model(**inputs, labels=labels, **extra).loss.detach())

    plain, with_its_own = loss(), loss(output_router_logits=True)
    assert with_its_own > plain * (1 + 1e-5)
    with attach(model):
        assert loss(output_router_logits=True) == pytest.approx(plain, rel=1e-6)
    assert loss(output_router_logits=True) == with_its_own


def test_every_family_with_a_loss_of_its_own_is_tested() -> None:
    """Of those whose code multiplies a balancing loss by a weight; nllb_moe has no router we hear."""
    weight = re.compile(r"(router_aux|aux_loss|router_z)\w* \*")
    found = {
        arch
        for arch in architectures()
        if weight.search((modelings() / arch / f"modeling_{arch}.py").read_text(encoding="utf-8"))
    }
    assert found - {"nllb_moe"} == {arch for arch, _ in OWN_LOSS} & set(architectures())


def with_labels(arch: str, cls: str | None) -> Any:
    """A tiny model of a class that computes a loss; those around a text model take its values."""
    if cls is None or arch not in architectures():
        return build(arch)
    extra: dict[str, Any] = dict(AROUND.get(arch, {}))
    if "text_config" in (model_class(arch, cls).config_class.sub_configs or {}):
        extra["text_config"] = SPEC["per_architecture"].get(arch, {}).get("kw", {})
    return build(arch, cls, **extra)
