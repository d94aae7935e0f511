"""Capacity at the experts' call of attached models, against a plain count slot by slot."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise.nn
from equipoise.balance import Bias, Capacity, Loss, Sign, attach
from equipoise.balance.passes import KEPT
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, discover
from equipoise.models.experts import argument_names, forward_arguments
from equipoise.nn.naive import limit as naive_limit
from equipoise.routing import NO_EXPERT

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny import architectures, build, inputs_for, randomise_routing

pytestmark = pytest.mark.slow

REFUSED = {
    "llama4": "all experts run",
    "jetmoe": "dispatch order",
    "doge": "product keys",
    "switch_transformers": "capacity of its own",
}
UNROUTED = {"nllb_moe", "vitpose_backbone"}
ODD = {"longcat_flash", "zaya", "ernie4_5_vl_moe", "phimoe"}
"""Choices without an expert, rows of two kinds, random draws: under tests of their own, or none."""
PLAIN = [a for a in architectures() if a not in {*REFUSED, *UNROUTED, *ODD}]
SOME = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_moe", "dbrx")


def trained(arch: str) -> tuple[nn.Module, dict[str, Any]]:
    model = build(arch).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    randomise_routing(model)
    inputs = inputs_for(model)
    return model, inputs


def room_of(settings: Capacity, tokens: int, site: RouterSite) -> list[int]:
    buckets = settings.groups or site.num_experts
    return [math.ceil(settings.factor * tokens * site.top_k / buckets - 1e-9)] * buckets


class Naive:
    """Hooks that zero the weights of overflowing slots, found one slot at a time."""

    def __init__(self, model: nn.Module, settings: Capacity, mask: Tensor) -> None:
        self.settings, self.mask = settings, mask.reshape(-1).bool()
        self.kept: dict[str, list[list[int]]] = {}
        self.dropped: dict[str, float] = {}
        self.handles = [
            self._hook(site) for site in discover(model) if site.score_function != "hash"
        ]

    def _hook(self, site: RouterSite) -> Any:
        names = forward_arguments(site.module)
        ids_name, weights_name = argument_names(site.module) or ("", "")

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            ids, weights = given[ids_name], given[weights_name]
            valid = self.mask if len(self.mask) == len(ids) else torch.ones(len(ids)).bool()
            kept, lost = naive_limit(
                ids.tolist(),
                weights.tolist(),
                [],
                valid.tolist(),
                num_experts=site.num_experts,
                room=room_of(self.settings, int(valid.sum()), site),
                by=self.settings.by,
                groups=self.settings.groups,
            )
            self.kept[site.path], self.dropped[site.path] = kept, lost
            stays = (torch.tensor(kept) != NO_EXPERT) | ~valid.unsqueeze(1)
            given[weights_name] = weights * stays.to(weights.dtype)
            listed = tuple(given.pop(name) for name in names[: len(args)])
            return listed, given

        return site.module.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def ids_at_experts(model: nn.Module) -> Iterator[list[tuple[Tensor, int]]]:
    """What each experts module is really called with, after every other hook."""
    seen: list[tuple[Tensor, int]] = []
    undo: list[Callable[[], None]] = []
    for site in discover(model):
        module, inner = site.module, site.module.forward
        names = forward_arguments(module)
        ids_name = (argument_names(module) or ("",))[0]

        def forward(
            *args: Any, inner=inner, names=names, ids_name=ids_name, site=site, **kwargs: Any
        ):  # type: ignore[no-untyped-def]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            seen.append((given[ids_name].detach(), site.num_experts + site.null_experts))
            return inner(*args, **kwargs)

        module.forward = forward
        undo.append(lambda module=module: vars(module).pop("forward"))
    try:
        yield seen
    finally:
        for take_off in undo:
            take_off()


def outcome(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one pass."""
    model.zero_grad()
    torch.manual_seed(3)
    found = model(**inputs)
    output = found[0] if "loss" not in found else found["logits"]
    slope = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output.float() * slope).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.allclose(a[0], b[0], atol=1e-5)
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        assert torch.allclose(grad, b[1][name], atol=1e-4, rtol=1e-4), name


def compare(arch: str, settings: Capacity) -> None:
    model, inputs = trained(arch)
    free = outcome(model, inputs)
    naive = Naive(model, settings, inputs["attention_mask"])
    wanted = outcome(model, inputs)
    naive.remove()
    assert not torch.allclose(free[0], wanted[0], atol=1e-5), "nothing was dropped"
    with attach(model, settings) as handle, ids_at_experts(model) as seen:
        same(wanted, outcome(model, inputs))
        handle.step()
        metrics = handle.metrics()
        for site in handle.sites:
            names = (f"balance/{n}/dropped_share" for n in (f"layer_{site.layer}", site.path))
            found = next(metrics[name] for name in names if name in metrics)
            assert found == pytest.approx(naive.dropped[site.path], abs=1e-6)
    assert len(seen) >= len(handle.sites)
    assert all(int(ids.min()) >= 0 and int(ids.max()) < width for ids, width in seen)
    same(free, outcome(model, inputs))


@pytest.mark.parametrize("arch", PLAIN)
def test_a_drop_is_a_weight_of_zero_in_every_architecture(arch: str) -> None:
    compare(arch, Capacity(factor=0.75))


@pytest.mark.parametrize("arch", SOME)
@pytest.mark.parametrize(
    "settings",
    [
        Capacity(factor=1.0, by="probability"),
        Capacity(factor=1.0, by="choice"),
        Capacity(factor=0.6, groups=4),
    ],
    ids=["probability", "choice", "groups"],
)
def test_every_rule_drops_what_a_plain_count_drops(arch: str, settings: Capacity) -> None:
    compare(arch, settings)


@pytest.mark.parametrize("arch", sorted(REFUSED))
def test_families_it_cannot_act_on_are_refused_by_name(arch: str) -> None:
    with pytest.raises(EquipoiseError, match=f"{arch}.*{REFUSED[arch]}"):
        attach(build(arch), Capacity())


def two_batches(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch, and one with other tokens and other padding."""
    mask = torch.ones_like(inputs["attention_mask"])
    mask[1, :9] = 0
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1) % 97 + 3, "attention_mask": mask}
    return inputs, other


def both_in_flight(
    model: nn.Module, batches: tuple[dict[str, Any], ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Two forward passes before the first backward pass, which comes in reverse order."""
    model.zero_grad()
    logits = [model(**batch).logits for batch in batches]
    slope = torch.linspace(-1, 1, logits[0].numel()).view_as(logits[0])
    for one in reversed(logits):
        (one * slope).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(logits).detach(), grads


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen_router"])
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_recomputation_drops_the_same_slots(reentrant: bool, frozen: bool, overflow: Any) -> None:
    model, inputs = trained("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.endswith("gate.weight")))
    batches = two_batches(inputs)
    terms = (Loss("switch", weight=1.0, count="kept"), Capacity(factor=0.75, overflow=overflow))
    with attach(model, *terms, accumulation=2) as handle:
        wanted = both_in_flight(model, batches)
        handle.step()
        metrics = handle.metrics()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = both_in_flight(model, batches)
        assert all(not layer.capacity._held for layer in handle.layers)
        handle.step()
        again = handle.metrics()
    same(wanted, found)
    assert again["balance/dropped_share"] == metrics["balance/dropped_share"] > 0


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_compiled_equals_eager(arch: str, overflow: Any) -> None:
    model, inputs = trained(arch)
    terms = (Loss("switch", weight=1.0), Capacity(factor=0.75, overflow=overflow))
    with attach(model, *terms) as handle:
        wanted = outcome(model, inputs)
        handle.step()
        metrics = handle.metrics()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        logits = compiled(**inputs).logits
        model.zero_grad()
        slope = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits * slope).sum().backward()
        handle.step()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        same(wanted, (logits.detach(), grads))
        assert handle.metrics()["balance/dropped_share"] == metrics["balance/dropped_share"] > 0


@torch.no_grad()
def test_evaluation_drops_nothing_unless_told() -> None:
    model, inputs = trained("olmoe")
    model.eval()
    free = model(**inputs).logits
    with attach(model, Capacity(factor=0.5)):
        assert torch.equal(model(**inputs).logits, free)
    naive = Naive(model, Capacity(factor=0.75), inputs["attention_mask"])
    limited = model(**inputs).logits
    naive.remove()
    with attach(model, Capacity(factor=3.0, eval_factor=0.75)):
        assert torch.allclose(model(**inputs).logits, limited, atol=1e-5)
    assert not torch.allclose(free, limited, atol=1e-3)


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "gemma4"])
def test_rerouted_slots_go_to_the_next_best_expert_with_its_own_weight(arch: str) -> None:
    """At the first layer, whose input no capacity has changed; ids by rounds of offers in lists."""
    model, inputs = trained(arch)
    mask = inputs["attention_mask"].reshape(-1).bool()
    heard: list[Any] = []
    settings = Capacity(factor=0.75, overflow="reroute")
    site = next(s for s in discover(model) if s.score_function != "hash")
    with site.observe(heard.append):
        model(**inputs)
        with attach(model, settings):
            model(**inputs)
    was, now = heard
    scores_TE, ids_TK = was.scores_TE.detach().float(), was.expert_ids_TK
    gates_TE = {"sigmoid": torch.sigmoid, "softmax": torch.exp}[site.score_function](scores_TE)
    gates_TE = scores_TE if site.scores_are == "probabilities" else gates_TE
    wanted, _ = naive_limit(
        ids_TK.tolist(),
        was.weights_TK.tolist(),
        scores_TE.tolist(),
        mask.tolist(),
        num_experts=site.num_experts,
        room=room_of(settings, int(mask.sum()), site),
        overflow="reroute",
    )
    wanted_TK = torch.where(mask.unsqueeze(1), torch.tensor(wanted), ids_TK)
    kept_TK = wanted_TK != NO_EXPERT
    moved_TK = kept_TK & (wanted_TK != ids_TK)
    assert moved_TK.any()
    assert torch.equal(now.expert_ids_TK, torch.where(kept_TK, wanted_TK, ids_TK))
    ratio_TK = gates_TE.gather(1, wanted_TK.clamp(min=0)) / gates_TE.gather(1, ids_TK)
    weights_TK = torch.where(moved_TK, was.weights_TK * ratio_TK, was.weights_TK)
    assert torch.allclose(now.weights_TK, weights_TK * kept_TK, atol=1e-6)


def test_counts_before_and_after_the_capacity_are_told_apart() -> None:
    model, inputs = trained("qwen3_moe")
    settings = Capacity(factor=0.75)
    naive = Naive(model, settings, inputs["attention_mask"])
    model(**inputs)
    naive.remove()
    with attach(model, settings, Loss("switch", weight=1.0, count="kept"), Bias(Sign())) as handle:
        assert handle.check(**inputs).difference < 1e-4
        model(**inputs)
        handle.step()
        bank = handle.book.layout.counts(handle.steps.last, KEPT, 0)
        tokens = int(inputs["attention_mask"].sum())
        for site, kept_E, counts_E in zip(handle.sites, bank, handle.counts(), strict=True):
            ids = torch.tensor(naive.kept[site.path]).reshape(-1)
            wanted = torch.bincount(ids[ids >= 0], minlength=site.num_experts)
            assert torch.equal(kept_E, wanted.double())
            assert counts_E.sum() == tokens * site.top_k > kept_E.sum()


def test_kept_counts_of_sequences_leave_dropped_slots_out() -> None:
    """One sequence, by position: the loads of both counts differ, and so do the gradients."""
    model, inputs = trained("mixtral")
    grads = []
    for count in ("selected", "kept"):
        loss = Loss("switch", "sequence", weight=1.0, count=count)
        with attach(model, loss, Capacity(factor=0.5)) as handle:
            grads.append(outcome(model, inputs)[1])
            handle.step()
    first = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(grads[0][first], grads[1][first], rtol=1e-3)


def test_the_capacity_follows_the_recent_load_at_the_steps_end_only() -> None:
    model, inputs = trained("mixtral")
    settings = Capacity(factor=0.5, recent=0.0)
    with attach(model, settings) as handle:
        first, second = (model(**inputs).logits for _ in range(2))
        assert torch.equal(first, second)
        handle.step()
        share_E = handle.layers[0].capacity.limiter.share_E
        assert torch.allclose(
            share_E.float(), handle.counts()[0].float() / handle.counts()[0].sum()
        )
        third = model(**inputs).logits
        handle.step()
        assert not torch.equal(second, third)
        state = handle.state_dict()
        fourth = model(**inputs).logits
    with attach(model, settings) as resumed:
        resumed.load_state_dict(state)
        assert torch.equal(model(**inputs).logits, fourth)


class Net(nn.Module):
    """One layer of equipoise.nn between an embedding and a sum."""

    def __init__(self, capacity: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = equipoise.nn.MoELayer(8, 16, 8, 2, capacity=capacity)

    def forward(self, hidden_BSD: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        found: Tensor = self.moe(hidden_BSD, valid_BS)
        return found


def test_reference_layers_leave_dropped_slots_out() -> None:
    hidden = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    own = Net(equipoise.nn.Capacity(factor=0.75))
    wanted = own(hidden)
    model = Net()
    model.load_state_dict(own.state_dict())
    with attach(model, equipoise.nn.Capacity(factor=0.75)) as handle, ids_at_experts(model) as seen:
        assert torch.allclose(model(hidden), wanted, atol=1e-6)
        handle.step()
        dropped = handle.metrics()["balance/dropped_share"]
    assert dropped == pytest.approx(float(own.moe.dropped_share))
    assert float((seen[0][0] == NO_EXPERT).float().mean()) == pytest.approx(dropped)
    with pytest.raises(EquipoiseError, match="one of its own"):
        attach(own, Capacity())


def test_an_expert_that_is_chosen_by_none_keeps_choices_beyond_the_experts() -> None:
    """LongCat's zero experts take no room and keep their weight; ids stay in range."""
    model, inputs = trained("longcat_flash")
    heard: list[tuple[Tensor, Tensor]] = []
    first = discover(model)[0]

    def listen(ids: Tensor, weights: Tensor, _: Tensor | None) -> None:
        heard.append((ids.clone(), weights.detach().clone()))

    with first.listen(listen):  # type: ignore[arg-type]
        model(**inputs)
        with attach(model, Capacity(factor=0.5)) as handle:
            model(**inputs)
            handle.step()
            assert handle.counts()[0].sum() > 0
    (ids, weights), (ids_now, weights_now) = heard
    free = ids >= first.num_experts
    assert free.any()
    assert torch.equal(ids, ids_now)
    assert torch.equal(weights[free], weights_now[free])
    assert (weights_now == 0).any()


def test_settings_that_cannot_be_are_refused() -> None:
    model = build("mixtral")
    with pytest.raises(EquipoiseError, match=r"'pad'.*own buffers"):
        Capacity(overflow="pad")
    with pytest.raises(EquipoiseError, match="'pad'"):
        attach(model, equipoise.nn.Capacity(overflow="pad"))
    with pytest.raises(EquipoiseError, match="eval_factor=0"):
        Capacity(eval_factor=0)
    with pytest.raises(EquipoiseError, match="groups=3 does not divide 8"):
        attach(model, Capacity(groups=3))
    with pytest.raises(EquipoiseError, match="2 terms of one kind"):
        attach(model, Capacity(), Capacity(factor=2.0))
