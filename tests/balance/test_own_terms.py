"""The model's own balancing loss: off in every forward pass while attached, its config never changed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise.balance import Bias, Loss, Sign, attach
from equipoise.nn import MoELayer

WIDTH, OWN = 8, 0.02


class Reader(nn.Module):
    """A model that reads the weight of its own loss from the config at every call."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = config or SimpleNamespace(router_aux_loss_coef=OWN)
        self.layers = nn.ModuleList(MoELayer(WIDTH, 8, 4, 2) for _ in range(2))
        self.inside: Any = None
        self.seen: list[float] = []

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, deeper: bool = False
    ) -> Tensor:
        hidden = inputs_embeds
        if deeper:
            hidden = self(hidden)
        if self.inside is not None:
            self.inside(hidden)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        self.seen.append(self.config.router_aux_loss_coef)
        return hidden


def states(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Reader:
    return Reader().train()


def test_the_config_says_zero_in_a_pass_and_only_there(model: Reader) -> None:
    with attach(model, Loss("switch")):
        model(states())
        assert model.config.router_aux_loss_coef == OWN
    model(states())
    assert model.seen == [0.0, OWN]


def test_a_value_set_while_attached_stays(model: Reader) -> None:
    with attach(model, Loss("switch")) as handle:
        model.config.router_aux_loss_coef = 0.5
        model(states())
        handle.discard()
        assert model.config.router_aux_loss_coef == 0.5
        model(states())
    assert model.config.router_aux_loss_coef == 0.5
    assert model.seen == [0.0, 0.0]


def test_a_nested_call_leaves_the_outer_one_hidden(model: Reader) -> None:
    with attach(model, Bias(Sign())):
        model(states(), deeper=True)
        assert model.seen == [0.0, 0.0]
        assert model.config.router_aux_loss_coef == OWN


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_leaves_nothing_behind(model: Reader, error: type) -> None:
    """torch runs no hook after a KeyboardInterrupt: the next pass, or detach(), clears up."""

    def breaks(_: Tensor) -> None:
        raise error

    mask = torch.ones(2, 6)
    mask[:, :4] = 0
    with attach(model, Bias(Sign())) as handle:
        for _ in range(2):
            model.inside = breaks
            with pytest.raises(error):
                model(states(), attention_mask=mask)
        handle.discard()
        model.inside = None
        model(states())
        handle.step()
        assert handle.tokens() == [12, 12], "the mask of the broken pass was taken"
        assert model.seen == [0.0]
        assert model.config.router_aux_loss_coef == OWN
        model.inside = breaks
        with pytest.raises(error):
            model(states())
    assert model.config.router_aux_loss_coef == OWN


def test_two_models_that_share_a_config_may_call_each_other(model: Reader) -> None:
    other = Reader(model.config).train()
    model.inside = lambda hidden: other(hidden)  # as no part of the model
    with attach(model, Loss("switch")), attach(other, Loss("switch")):
        model(states())
        assert model.seen == other.seen == [0.0]
        assert model.config.router_aux_loss_coef == OWN
    model(states())
    assert model.seen[1] == other.seen[1] == OWN


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_is_off_where_checkpointing_runs_the_whole_model_again(
    model: Reader, reentrant: bool
) -> None:
    with attach(model, Loss("switch")):
        hidden = states().requires_grad_()
        checkpoint(model, hidden, use_reentrant=reentrant).square().mean().backward()
        assert set(model.seen) == {0.0}  # non-reentrant, the second run ends early
        assert model.config.router_aux_loss_coef == OWN


def test_modules_that_took_the_weight_keep_zero_until_detached(model: Reader) -> None:
    model.layers[0].aux_loss_coef = 1
    config = copy.copy(model.config)
    handle = attach(model)
    assert model.layers[0].aux_loss_coef == 0
    assert type(model.layers[0].aux_loss_coef) is int
    handle.detach()
    assert model.layers[0].aux_loss_coef == 1
    assert model.config == config


def test_a_controller_that_fails_leaves_the_model_as_it_was(model: Reader) -> None:
    class Failing(Sign):
        def initial(self, **_: Any) -> Any:
            raise RuntimeError("no room")

    model.layers[0].aux_loss_coef = OWN
    before = hooks(model)
    with pytest.raises(RuntimeError, match="no room"):
        attach(model, Loss("switch"), Bias(Failing()))
    assert hooks(model) == before
    assert model.layers[0].aux_loss_coef == OWN
    model(states())
    assert model.seen == [OWN]
    attach(model, Loss("switch")).detach()


def hooks(model: nn.Module) -> list[int]:
    """How much hangs on each module."""
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(vars(m)) for m in model.modules()
    ]
