"""What every router keeps to: float32 state, discovery, compilation, clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from equipoise.models import discover
from equipoise.nn import (
    Assignment,
    ExpertThresholdRouter,
    GroupLimited,
    LearnedNoise,
    Random,
    ReLURouter,
    Sinkhorn,
    TopK,
    TopKRouter,
)
from tests.nn.routing import D, E, sharpened, states


def deepseek_v3():
    router = TopKRouter(
        D,
        E,
        3,
        score_function="sigmoid",
        weighting="renormalized",
        selection=GroupLimited(4, 2),
        selection_bias=True,
    )
    return sharpened(router).double()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to"])
@pytest.mark.parametrize("kind", ["topk", "threshold", "relu"])
def test_adapted_buffers_stay_float32_through_casts_copies_and_loading(kind, cast) -> None:
    router = {
        "topk": lambda: TopKRouter(D, E, 2, selection_bias=True),
        "threshold": lambda: ExpertThresholdRouter(D, E, 2),
        "relu": lambda: ReLURouter(D, E, 2),
    }[kind]()
    names = [name for name in router.float32_buffers if getattr(router, name) is not None]
    for name in names:
        getattr(router, name).fill_(0.123456789)
    kept = {name: getattr(router, name).clone() for name in names}
    model = torch.nn.Sequential(copy.deepcopy(router))
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, value in kept.items():
        assert torch.equal(getattr(model[0], name), value)
        assert getattr(model[0], name).dtype == torch.float32
        assert torch.equal(model.state_dict()[f"0.{name}"], value)
    for assign in (False, True):
        router.load_state_dict(
            {k: v.bfloat16() for k, v in router.state_dict().items()}, assign=assign
        )
        assert all(getattr(router, name).dtype == torch.float32 for name in names)


def test_meta_materialisation_and_reset_give_a_working_router() -> None:
    with torch.device("meta"):
        router = TopKRouter(D, E, 2, selection_bias=True)
    router = router.to_empty(device="cpu")
    router.reset_parameters()
    assert (router.selection_bias == 0).all()
    assert torch.isfinite(router(states(dtype=torch.float32))[1]).all()


def test_no_tokens_give_empty_tensors_of_the_right_width() -> None:
    for selection in (TopK(), GroupLimited(4, 2), Sinkhorn(), Assignment(), Random()):
        for weighting in ("scores", "equal"):
            router = TopKRouter(D, E, 1, weighting=weighting, selection=selection, logit_norm=1.0)
            scores, weights, ids = router(states(0, dtype=torch.float32))
            assert scores.shape == (0, E)
            assert weights.shape == ids.shape == (0, 1)


def test_the_router_compiles_without_a_graph_break() -> None:
    router, hidden = deepseek_v3(), states()
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    for mine, theirs in zip(compiled(hidden), router(hidden), strict=True):
        torch.testing.assert_close(mine, theirs)


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = E
        self.up = torch.nn.Parameter(torch.randn(E, D, D))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class Block(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gate, self.experts = TopKRouter(D, E, 3, **options), Experts()

    def forward(self, hidden):
        _, weights, ids = self.gate(hidden)
        return self.experts(hidden, ids, weights)


def test_discovery_finds_and_hears_the_router_without_a_config() -> None:
    model = torch.nn.Sequential(Block(weighting="softmax"), Block(selection_bias=True))
    sites = discover(model)
    assert [(s.num_experts, s.top_k, s.selection_bias, s.compares) for s in sites] == [
        (E, 3, False, "logits"),
        (E, 3, True, "scores"),
    ]
    heard, hidden = [], states(dtype=torch.float32)
    with sites[1].observe(heard.append):
        model(hidden)
    scores, _, ids = model[1].gate(hidden)
    assert torch.equal(heard[0].scores_TE, scores)
    assert torch.equal(heard[0].expert_ids_TK, ids)


REFUSED = {
    "more than there are": ({"top_k": 9}, "top_k=9 of 8 experts; allowed is 1 to 8"),
    "none": ({"top_k": 0}, "top_k=0 of 8"),
    "groups": ({"top_k": 2, "selection": GroupLimited(3, 1)}, "groups=3 does not divide 8"),
    "limit": ({"top_k": 2, "selection": GroupLimited(4, 5)}, "limit=5 of 4 groups"),
    "per group": (
        {"top_k": 2, "selection": GroupLimited(4, 2, 3)},
        "per_group=3, but a group has 2",
    ),
    "too few left": ({"top_k": 5, "selection": GroupLimited(4, 2)}, "hold only 4"),
    "null in groups": (
        {"top_k": 2, "selection": GroupLimited(4, 2), "null_experts": 1},
        "does not divide 9",
    ),
    "base": ({"top_k": 2, "selection": Assignment()}, "BASE assigns one expert"),
    "iterations": ({"top_k": 2, "selection": Sinkhorn(0)}, "iterations=0"),
    "bias unread": (
        {"top_k": 2, "selection": Sinkhorn(), "selection_bias": True},
        "Sinkhorn does not read a selection bias",
    ),
    "no gradient": ({"top_k": 1, "weighting": "renormalized"}, "the router gets no gradient"),
    "softmax of": (
        {"top_k": 2, "weighting": "softmax", "score_function": "sigmoid"},
        "is for score_function='softmax', not 'sigmoid'",
    ),
    "function": ({"top_k": 2, "score_function": "tanh"}, "score_function='tanh'; allowed are"),
    "weighting": ({"top_k": 2, "weighting": "sum"}, "weighting='sum'; allowed are"),
    "temperature": ({"top_k": 2, "temperature": 0.0}, "temperature=0.0"),
    "norm": ({"top_k": 2, "logit_norm": 0.0}, "logit_norm=0.0"),
    "jitter": ({"top_k": 2, "jitter": 1.0}, "jitter=1.0"),
    "second": ({"top_k": 1, "random_second": True}, "random_second needs a second"),
    "noise": (
        {"top_k": 1, "null_experts": 1, "noise": LearnedNoise(D, E)},
        r"noise for \[8, 5\], but the router's weight is \[9, 5\]",
    ),
    "null": ({"top_k": 1, "null_experts": -1}, "null_experts=-1"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_an_impossible_configuration_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, E, **options)


def test_hidden_states_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3, 5\]; this router takes \[tokens, 5\]"):
        TopKRouter(D, E, 2)(torch.zeros(2, 3, D))
