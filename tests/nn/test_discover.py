"""`models.discover` and `balance.attach` on the reference layer, whatever its router."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from equipoise import nn as enn
from equipoise.balance import Adversarial, Bias, Capacity, Lifecycle, Loss, Sign, attach
from equipoise.errors import EquipoiseError, RoutingError
from equipoise.models import discover
from equipoise.routing import NO_EXPERT, Routing

WIDTH, EXPERTS, TOKENS = 16, 8, 64


class Stack(nn.Module):
    """Two MoE layers, as a model of one's own would hold them."""

    def __init__(self, **given: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            enn.MoELayer(WIDTH, 32, EXPERTS, 2, **{k: make() for k, make in given.items()})
            for _ in range(2)
        )

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_BSD = hidden_BSD + layer(hidden_BSD)
        return hidden_BSD


ROUTERS = {
    "top-k": lambda: enn.TopKRouter(WIDTH, EXPERTS, 2),
    "sigmoid": lambda: enn.TopKRouter(
        WIDTH, EXPERTS, 2, score_function="sigmoid", selection_bias=True
    ),
    "expert choice": lambda: enn.ExpertChoiceRouter(WIDTH, EXPERTS, 2),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_sites_are_described_without_a_config(name: str) -> None:
    model = Stack(router=ROUTERS[name])
    sites = discover(model)
    assert [site.layer for site in sites] == [0, 1]
    assert {site.num_experts for site in sites} == {EXPERTS}
    assert {site.score_function for site in sites} == {
        "sigmoid" if name == "sigmoid" else "softmax"
    }
    assert {site.selection_bias for site in sites} == {name == "sigmoid"}
    heard: list[Routing] = []
    with sites[0].observe(heard.append):
        model(torch.randn(1, TOKENS, WIDTH))
    assert int((heard[0].expert_ids_TK != NO_EXPERT).sum()) == TOKENS * 2


@pytest.mark.parametrize("name", ["top-k", "sigmoid"])
def test_the_reference_layer_gets_the_formulas_gradient_and_a_bias(name: str) -> None:
    model = Stack(router=ROUTERS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hidden = torch.randn(2, TOKENS, WIDTH) + 1.0
    terms = (Loss("switch", weight=1.0), Loss("z"), Bias(Sign(rate=0.01)))
    with attach(model, *terms, optimizer=optimizer) as handle:
        report = handle.check(hidden)
        assert report.difference < 1e-5
        assert len(report.routers) == 2
        for _ in range(40):
            model(hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if handle.metrics()["balance/step"] == 1:
                first = handle.metrics()["balance/max_vio"]
        assert handle.metrics()["balance/max_vio"] < first


def test_free_experts_are_heard_once_and_count_as_no_expert() -> None:
    model = Stack(
        router=lambda: enn.TopKRouter(WIDTH, EXPERTS, 2, null_experts=2),
        experts=lambda: enn.FreeExperts(enn.Experts(EXPERTS, WIDTH, 32), WIDTH, zero=1, copy=1),
    )
    sites = discover(model)
    assert [site.null_experts for site in sites] == [2, 2]
    heard: list[Routing] = []
    with sites[0].observe(heard.append):
        model(torch.randn(1, TOKENS, WIDTH))
    ids = heard[0].expert_ids_TK
    assert int(ids.max()) < EXPERTS
    assert bool((ids == NO_EXPERT).any())


def test_soft_mixtures_are_refused_by_name() -> None:
    model = nn.Sequential(enn.SoftMoE(WIDTH, enn.Experts(EXPERTS, WIDTH, 32)))
    with pytest.raises(RoutingError, match="nothing is selected"):
        discover(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: enn.ExpertChoiceRouter(WIDTH, EXPERTS, 2),
        lambda: enn.ReLURouter(WIDTH, EXPERTS, 2),
    ],
)
def test_a_bias_is_refused_where_it_could_not_act(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RoutingError, match="no selection bias can act here"):
        attach(Stack(router=make), Bias(Sign()))


@pytest.mark.parametrize("term", [Bias(Sign()), Loss("switch"), Adversarial(), Capacity()], ids=str)
def test_of_relu_routing_each_term_says_that_the_others_do_not_act_either(term: object) -> None:
    with pytest.raises(EquipoiseError) as stop:
        attach(Stack(router=lambda: enn.ReLURouter(WIDTH, EXPERTS, 2)), term)
    said = str(stop.value)
    assert "use a Loss" not in said
    assert "steers itself" in said or isinstance(term, Capacity)


def test_what_has_no_loss_needs_no_scores_that_are_known() -> None:
    model = Stack(router=lambda: enn.ReLURouter(WIDTH, EXPERTS, 2))
    hidden = torch.randn(1, TOKENS, WIDTH)
    model(hidden).square().mean().backward()
    alone = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    handle = attach(model, Lifecycle(patience=1))
    model(hidden).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(alone, model.parameters(), strict=True))
    handle.step()
    handle.detach()


def test_a_layer_refuses_hidden_states_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"takes floating numbers \[..., 16\]"):
        enn.MoELayer(WIDTH, 32, EXPERTS, 2)(torch.randn(4, 8))
