"""Zero, copy and constant experts, and soft MoE, with loops over tokens beside them."""

from __future__ import annotations

import pytest
import torch

from equipoise.nn import FreeExperts, SoftMoE, TopKRouter, naive_routers
from equipoise.routing import NO_EXPERT
from tests.nn.routing import D, sharpened, states

COMPUTING = 3


class Linear(torch.nn.Module):
    """The simplest experts: one matrix each, looped over."""

    def __init__(self, num_experts=COMPUTING):
        super().__init__()
        self.num_experts = num_experts
        self.weight = torch.nn.Parameter(states(num_experts * D, D).view(num_experts, D, D))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows = []
        for x, ids, weights in zip(hidden_states, top_k_index, top_k_weights, strict=True):
            row = torch.zeros_like(x)
            for e, w in zip(ids.tolist(), weights, strict=True):
                assert NO_EXPERT <= e < self.num_experts
                if e != NO_EXPERT:
                    row = row + w * (self.weight[e] @ x)
            rows.append(row)
        return torch.stack(rows)


def free(**kinds):
    torch.manual_seed(0)
    layer = FreeExperts(Linear(), D, **kinds).double()
    with torch.no_grad():
        layer.constant_ED.normal_()
        layer.mix_ED.normal_()
    return layer


def naive_free(layer, kinds, hidden, ids_TK, weights_TK):
    rows = []
    for x, ids, weights in zip(hidden, ids_TK.tolist(), weights_TK, strict=True):
        row = torch.zeros_like(x)
        for e, w in zip(ids, weights, strict=True):
            if e == NO_EXPERT:
                continue
            if e < COMPUTING:
                row = row + w * (layer.experts.weight[e] @ x)
                continue
            kind, at = kinds[e - COMPUTING]
            if kind == "copy":
                row = row + w * x
            elif kind == "constant":
                a, b = naive_routers.softmax([m @ x for m in layer.mix_ED[2 * at : 2 * at + 2]])
                row = row + w * (a * x + b * layer.constant_ED[at])
        rows.append(row)
    return torch.stack(rows)


MIXES = {
    "zero": {"zero": 2},
    "copy": {"copy": 3},
    "constant": {"constant": 2},
    "all": {"zero": 1, "copy": 2, "constant": 2},
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_free_experts_add_what_their_kind_says_with_the_same_gradients(mix) -> None:
    layer = free(**mix)
    kinds = [(kind, at) for kind, count in mix.items() for at in range(count)]
    router = sharpened(TopKRouter(D, COMPUTING, 3, null_experts=layer.null_experts)).double()
    hidden = states(30).requires_grad_()
    _, weights, ids = router(hidden)
    ids = ids.clone()
    ids[0, 0], ids[1, 2] = NO_EXPERT, NO_EXPERT
    assert set(range(COMPUTING, COMPUTING + len(kinds))) <= set(ids.flatten().tolist())
    got, expected = layer(hidden, ids, weights), naive_free(layer, kinds, hidden, ids, weights)
    torch.testing.assert_close(got, expected)
    inputs = [hidden, router.weight, layer.experts.weight]
    inputs += [layer.constant_ED, layer.mix_ED] if "constant" in mix else []
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), inputs, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_free_experts_refuse_what_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="one has to be above 0"):
        FreeExperts(Linear(), D)
    with pytest.raises(ValueError, match="zero=-1"):
        FreeExperts(Linear(), D, zero=-1, copy=2)
    with pytest.raises(ValueError, match="Linear does not say num_experts"):
        FreeExperts(torch.nn.Linear(2, 2), D, zero=1)


def soft(slots=2):
    torch.manual_seed(0)
    layer = SoftMoE(D, Linear(), slots).double()
    with torch.no_grad():
        layer.scale.fill_(3.0)
    return layer


def naive_soft(layer, hidden_SD):
    dispatch, combine = naive_routers.soft_mixing(hidden_SD, layer.weight_PD, layer.scale)
    outputs = []
    for p in range(len(layer.weight_PD)):
        mixed = sum(dispatch[t][p] * hidden_SD[t] for t in range(len(hidden_SD)))
        outputs.append(layer.experts.weight[p // layer.slots] @ mixed)
    return torch.stack([sum(w * y for w, y in zip(row, outputs, strict=True)) for row in combine])


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_moe_is_its_naive_twin_for_each_sequence(slots) -> None:
    layer, hidden = soft(slots), states(2 * 4).view(2, 4, D).requires_grad_()
    got = layer(hidden)
    expected = torch.stack([naive_soft(layer, sequence) for sequence in hidden])
    torch.testing.assert_close(got, expected)
    inputs = [hidden, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_naive_soft_mixing_passes_gradcheck() -> None:
    layer = soft(1)

    def mixing(hidden, weight, scale):
        tables = naive_routers.soft_mixing(hidden, weight, scale)
        return torch.stack([torch.stack(row) for table in tables for row in table])

    assert torch.autograd.gradcheck(
        mixing, (states(3).requires_grad_(), layer.weight_PD, layer.scale)
    )


def test_padding_enters_no_slot_of_soft_moe() -> None:
    layer, hidden = soft(), states(6).view(1, 6, D)
    valid = torch.tensor([[True, True, False, True, False, True]])
    kept = layer(hidden, valid)[valid]
    torch.testing.assert_close(kept, layer(hidden[:, valid[0]])[0])
    assert (layer(hidden)[valid] - kept).abs().max() > 1e-3
    dispatch, _ = layer.mixing(hidden, valid)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(1, 6).double())
    assert (dispatch[~valid] == 0).all()


def test_soft_moe_is_not_causal() -> None:
    layer, hidden = soft(), states(5).view(1, 5, D)
    changed = hidden.clone()
    changed[0, -1] += 1.0
    assert (layer(hidden) - layer(changed))[0, 0].abs().max() > 1e-3


def test_soft_moe_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="slots=0"):
        SoftMoE(D, Linear(), 0)
    with pytest.raises(ValueError, match="Linear does not say num_experts"):
        SoftMoE(D, torch.nn.Linear(2, 2))
