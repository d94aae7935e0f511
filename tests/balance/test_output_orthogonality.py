"""Output orthogonality attached: experts get the gradient of the formula, counted once, refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.balance import Capacity, Loss, attach
from equipoise.balance.outputs import SlotBySlot, SlotOutputs
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, discover
from equipoise.nn import MoELayer, TopKRouter

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny import architectures, inputs_for, randomise_routing
from tiny import build as tiny

from tests.balance.conformance.models import LENGTH, ROWS, batch, build

WEIGHT = 0.7
DIM, EXPERTS, TOP_K = 16, 8, 2
FAMILIES = ("mixtral", "deepseek_v3", "MoELayer")
UNKNOWN = {"nllb_moe", "vitpose_backbone"}
"""Refused before any term is looked at."""


class Stack(nn.Module):
    """Two residual MoELayers behind an embedding, called as a model of transformers is."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, DIM)
        self.layers = nn.ModuleList(MoELayer(DIM, 8, EXPERTS, TOP_K, **given) for _ in range(2))
        self.head = nn.Linear(DIM, 64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def made(family: str, **given: Any) -> Any:
    if family != "MoELayer":
        return build(family)
    torch.manual_seed(0)
    model = Stack(**given)
    for layer in model.layers:
        nn.init.normal_(layer.gate.weight, std=0.4)
    return model.train()


def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    out = model(**given)
    return out if isinstance(out, Tensor) else out.logits


def loss(scope: str = "micro") -> Loss:
    return Loss("output_orthogonality", scope, weight=WEIGHT)


# -- the formula, written down from weights and hidden states ----------------------------------------


def by_hand(experts: Any, hidden_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """What each selected expert gives [T, K, D]."""
    rows = []
    for hidden_D, ids_K in zip(hidden_TD, ids_TK.tolist(), strict=True):
        for expert in ids_K:
            gate, up = (experts.gate_up_proj[expert] @ hidden_D).chunk(2)
            rows.append(experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
    return torch.stack(rows).view(*ids_TK.shape, -1)


def projections(outputs_KD: Tensor) -> Tensor:
    """Mean length of the projection of one output of a token on another."""
    each = list(outputs_KD)
    pairs = [(a, b) for a in each for b in each if a is not b]
    return torch.stack([(a @ b / (b @ b) * b).norm() for a, b in pairs]).mean()


def wanted(model: Any, pieces: list[Any]) -> dict[str, Tensor]:
    """Plain autograd of main loss + weight x mean over micro-batches, layers and valid tokens."""
    total = torch.zeros(())
    sites = discover(model)
    held: dict[nn.Module, tuple[Tensor, ...]] = {}
    taps = [site.module.register_forward_pre_hook(held.__setitem__) for site in sites]
    for piece in pieces:
        total = total + piece.main_loss(logits_of(model, piece.given))
        valid_T = piece.valid_BS.reshape(-1)
        for module, (hidden_TD, ids_TK, *_) in held.items():
            outputs_TKD = by_hand(module, hidden_TD[valid_T], ids_TK[valid_T])
            value = torch.stack([projections(outputs_KD) for outputs_KD in outputs_TKD]).mean()
            total = total + WEIGHT * value / len(sites) / len(pieces)
    for tap in taps:
        tap.remove()
    total.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters(model)}
    model.zero_grad()
    return found


def parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(n.removeprefix("_orig_mod."), p) for n, p in model.named_parameters()]


def same(model: Any, right: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    largest = max(float(g.abs().max()) for g in right.values())
    for name, parameter in parameters(model):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not float((grad - right[name]).abs().max()) <= tolerance * largest:
            return False
    return True


def train(model: Any, pieces: list[Any], **how: Any) -> Any:
    """One step of `pieces`, with the loss attached; the gradients stay on the model."""
    handle = attach(model, loss(), accumulation=len(pieces), **how)
    for piece in pieces:
        piece.main_loss(logits_of(model, piece.given)).backward()
    handle.step()
    return handle


PIECES = [batch("padded", 0).rows(0, ROWS // 2), batch("padded", 0).rows(ROWS // 2, ROWS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_plain_autograd_over_two_micro_batches(family: str) -> None:
    """Experts, router and all below get it; padding counts nothing."""
    right = wanted(made(family), PIECES)
    model = made(family)
    handle = train(model, PIECES)
    assert same(model, right)
    value = handle.metrics()["balance/loss/output_orthogonality_micro"]
    assert value > 0
    handle.detach()
    model.zero_grad()
    for piece in PIECES:
        piece.main_loss(logits_of(model, piece.given)).backward()
    assert not same(model, right)
    assert not any(site.module._forward_hooks for site in discover(model))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_checkpointing_counts_once(family: str, reentrant: bool) -> None:
    right = wanted(made(family), PIECES)
    model = made(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    handle = train(model, PIECES)
    assert same(model, right)
    plain = train(made(family), PIECES)
    assert handle.metrics() == pytest.approx(plain.metrics(), nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "MoELayer"])
def test_compiled_code_gets_the_same_gradient(family: str) -> None:
    right = wanted(made(family), PIECES)
    model = torch.compile(made(family), backend="aot_eager", fullgraph=True)
    train(model, PIECES)
    assert same(model, right)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_and_the_random_state_are_the_models_own(family: str) -> None:
    model, piece = made(family), PIECES[0]
    free = logits_of(model, piece.given)
    with attach(model, loss()):
        drawn = torch.get_rng_state()
        assert torch.equal(logits_of(model, piece.given), free)
        assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_counts_nothing_and_costs_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(family)
    model.eval()
    right = wanted_without(model, PIECES[0])
    with attach(model, loss()) as handle:
        monkeypatch.setattr(SlotOutputs, "_outputs", None)  # a call would raise
        PIECES[0].main_loss(logits_of(model, PIECES[0].given)).backward()
        assert same(model, right, 0.0)
        model.train()
        with torch.no_grad():
            model(**PIECES[0].given)
        assert handle.book.passes == 0


def wanted_without(model: Any, piece: Any) -> dict[str, Tensor]:
    piece.main_loss(logits_of(model, piece.given)).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters(model)}
    model.zero_grad()
    return found


def test_passes_of_evaluation_between_change_nothing() -> None:
    right = wanted(made("mixtral"), PIECES)
    model = made("mixtral")
    handle = attach(model, loss(), accumulation=2)
    for piece in PIECES:
        main = piece.main_loss(logits_of(model, piece.given))
        model.eval()
        model(**PIECES[0].given)
        model.train()
        main.backward()
    handle.step()
    assert same(model, right)


@pytest.mark.parametrize("family", FAMILIES)
def test_check_proves_it_by_running_slot_after_slot(family: str) -> None:
    model = made(family)
    with attach(model, loss("global"), Loss("switch", weight=0.1)) as handle:
        given = PIECES[0].given
        report = handle.check(**given) if family != "MoELayer" else handle.check(given["input_ids"])
    assert report.difference < 1e-5


def test_check_under_checkpointing() -> None:
    model = made("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, loss()) as handle:
        assert handle.check(**PIECES[0].given).difference < 1e-5


def test_check_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner = made("mixtral"), SlotOutputs._outputs
    monkeypatch.setattr(SlotOutputs, "_outputs", lambda *args: 1.01 * inner(*args))
    with attach(model, loss()) as handle, pytest.raises(EquipoiseError, match="the formula"):
        handle.check(**PIECES[0].given)


def test_a_dropped_slot_takes_no_part() -> None:
    """With a capacity only tokens with both experts have anything to compare."""
    for family in ("mixtral", "MoELayer"):
        model = made(family)
        with attach(model, loss(), Capacity(factor=0.5)) as handle:
            report = handle.check(**PIECES[0].given)
            assert report.difference < 1e-5
            slots = SlotBySlot(handle.sites[0])
            logits_of(model, PIECES[0].given)
            slots.remove()
            capacity = handle.layers[0].capacity
            assert capacity is not None
            assert capacity.last is not None
            dropped = capacity.last.kept == -1
            assert slots.outputs_TKD is not None
            assert dropped.any()
            assert not slots.outputs_TKD[dropped].any()
            assert slots.outputs_TKD[~dropped].any(-1).all()


def test_scope_exact_makes_every_token_count_the_same() -> None:
    """Two micro-batches with unequal padding give what one batch gives."""
    whole = batch("padded", 0)
    model = made("mixtral")
    right = wanted(made("mixtral"), [whole])
    handle = attach(model, loss("exact"), accumulation=2)
    with handle.preview(), torch.no_grad():
        for piece in PIECES:
            model(**piece.given)
    for piece in PIECES:
        piece.main_loss(logits_of(model, piece.given)).backward()
    handle.step()
    assert same(model, right)
    assert handle.tokens()[0] == int(whole.valid_BS.sum()) < ROWS * LENGTH


def test_weight_zero_and_a_frozen_router_are_fine() -> None:
    model, piece = made("mixtral"), PIECES[0]
    right = wanted_without(model, piece)
    with attach(model, Loss("output_orthogonality", weight=0.0)):
        piece.main_loss(logits_of(model, piece.given)).backward()
    assert same(model, right)
    frozen = made("mixtral")
    for layer in frozen.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    expected = wanted(frozen, [piece])
    train(frozen, [piece])
    assert same(frozen, expected)


def test_a_grad_scaler_scales_it_like_the_main_loss() -> None:
    right = wanted(made("mixtral"), PIECES[:1])
    model, scaler = made("mixtral"), torch.amp.GradScaler("cpu", init_scale=64.0)
    attach(model, loss(), scaler=scaler)
    main = PIECES[0].main_loss(logits_of(model, PIECES[0].given))
    scaler.scale(main).backward()
    assert same(model, {name: 64.0 * grad for name, grad in right.items()})


ALONE = {"doge", "jetmoe", "llama4", "longcat_flash", "switch_transformers", "zaya"}
"""Families whose experts' outputs are not to be had one by one."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in architectures() if a not in UNKNOWN])
def test_weighted_outputs_of_the_slots_add_up_to_the_experts_output(arch: str) -> None:
    """In every family: so that they are the outputs that the layer is made of."""
    model = tiny(arch).train()
    randomise_routing(model)
    if arch in ALONE:
        with pytest.raises(EquipoiseError, match=r"output_orthogonality|product keys"):
            attach(model, loss())
        return
    with attach(model, loss()) as handle:
        layer = handle.layers[-1]
        hook, slots, heard = SlotOutputs(layer), SlotBySlot(layer.site), []
        module = layer.site.module
        module.register_forward_hook(
            lambda _, args, kwargs, output: heard.append((hook._outputs(args, kwargs), output)),
            with_kwargs=True,
        )
        weights: list[Tensor] = []
        layer.site.observe(lambda routing: weights.append(routing.weights_TK))
        model(**inputs_for(model))
    (outputs_TKD, output), (weights_TK,) = heard[0], weights
    assert slots.outputs_TKD is not None
    torch.testing.assert_close(outputs_TKD, slots.outputs_TKD)
    summed_TD = (outputs_TKD * weights_TK.unsqueeze(2)).sum(1)
    torch.testing.assert_close(summed_TD, output.reshape(summed_TD.shape))


class Site:
    """Enough of a site for a refusal."""

    def __init__(self, **changed: Any) -> None:
        vars(self).update(vars(discover(made("mixtral"))[0]), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"module": nn.Linear(2, 2)}, "Linear is not called with ids and weights"),
        ({"top_k": 1}, "its tokens have one expert each"),
        ({"variable_top_k": True}, "any number of experts"),
        ({"null_experts": 2}, "2 of its choices compute nothing"),
    ],
)
def test_where_single_outputs_are_not_to_be_had_it_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    from equipoise.balance.outputs import refuse_without_outputs

    site: RouterSite = Site(**changed)  # type: ignore[assignment]
    with pytest.raises(EquipoiseError, match=message):
        refuse_without_outputs(site, "output_orthogonality")


def test_attach_refuses_before_anything_is_changed() -> None:
    torch.manual_seed(0)
    router = TopKRouter(DIM, 4, 1, weighting="scores")
    model = nn.Sequential(MoELayer(DIM, 8, 4, 1, router=router))
    with pytest.raises(EquipoiseError, match=r"output_orthogonality.*one expert each"):
        attach(model, loss())
    assert not any(module._forward_hooks for module in model.modules())
