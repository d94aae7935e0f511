"""torchtitan's MoE layer, where it is installed (`pip install torchtitan triton`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from equipoise.balance import Bias, Loss, Sign, attach
from equipoise.errors import EquipoiseError
from equipoise.models import discover
from equipoise.routing import Routing

moe = pytest.importorskip(
    "torchtitan.models.common.moe", reason="torchtitan is not installed", exc_type=ImportError
)
WIDTH, EXPERTS = 32, 8


class Stack(nn.Module):
    """Two torchtitan MoE layers."""

    def __init__(self, score: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer(score) for _ in range(2))

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        for one in self.layers:
            hidden_BSD = hidden_BSD + one(hidden_BSD)
        return hidden_BSD


def layer(score: str) -> nn.Module:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    made = moe.MoE(
        moe.MoE.Config(
            num_experts=EXPERTS,
            routed_experts=moe.RoutedExperts.Config(
                inner_experts=moe.GroupedExperts.Config(
                    dim=WIDTH, hidden_dim=32, num_experts=EXPERTS
                ),
                token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=2),
            ),
            router=moe.TokenChoiceTopKRouter.Config(
                num_experts=EXPERTS,
                gate=Linear.Config(in_features=WIDTH, out_features=EXPERTS, bias=False),
                top_k=2,
                score_func=score,
            ),
        )
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_torchtitan_layers_are_found_balanced_and_checked(score: str) -> None:
    model = Stack(score).train()
    hidden = torch.randn(2, 64, WIDTH) + 0.5
    sites = discover(model)
    assert [(s.layer, s.num_experts, s.top_k, s.selection_bias) for s in sites] == [
        (0, EXPERTS, 2, True),
        (1, EXPERTS, 2, True),
    ]
    heard: list[Routing] = []
    with sites[0].observe(heard.append):
        model(hidden)
    mine = torch.bincount(heard[0].expert_ids_TK.reshape(-1), minlength=EXPERTS)
    assert torch.equal(mine.float(), model.layers[0].tokens_per_expert_E)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    terms = (Loss("switch", weight=1.0), Bias(Sign(rate=0.02)))
    with attach(model, *terms, optimizer=optimizer) as handle:
        assert handle.check(hidden).difference < 1e-4
        seen = []
        for _ in range(30):
            model(hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(handle.metrics()["balance/max_vio"])
        assert seen[-1] < seen[0] / 2
        assert model.layers[0].expert_bias_E.abs().max() > 0


def test_a_loss_on_logits_is_refused_because_the_router_gives_none() -> None:
    with pytest.raises(EquipoiseError, match="gates"):
        attach(Stack("sigmoid"), Loss("z"))
