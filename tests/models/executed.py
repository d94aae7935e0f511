"""Which experts really ran for each token, found without looking at any router or hook argument.

A block is run again on the inputs it got, once for every expert, with that expert's weights
disturbed: the tokens whose output changes are those for which the expert ran. Everything else is
computed in the same order, so the other tokens' outputs stay equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NOISE = 10.0


class Replay:
    """A module with the inputs of its last forward pass, to be run again."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module = module
        self.width = width
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A cache would grow with each run.
        cacheless = {name: None if name == "past_key_values" else v for name, v in kwargs.items()}
        self.call = (args, cacheless)

    def release(self) -> None:
        self._handle.remove()

    def __call__(self) -> Tensor:
        """The output for each token row [T, width]."""
        assert self.call is not None, "the module did not run"
        args, kwargs = self.call
        output = self.module(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple | list) else output
        return hidden.reshape(-1, self.width)


def runnable(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, or the nearest around it that computes by being called.

    Experts alone would be handed the router's choice, so the block around them is taken.
    """
    if path.rpartition(".")[2] == "experts":
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def expert_weights(block: nn.Module, num_experts: int) -> list[Callable[[int], Tensor]]:
    """Functions from an expert's number to a view of one of its weight tensors."""
    found: list[Callable[[int], Tensor]] = []
    for name, parameter in block.named_parameters():
        if "shared" in name:
            continue
        stacked = parameter.ndim == 3 and parameter.shape[0] >= num_experts
        looked_up = name in ("down_embed.weight", "up_embed.weight")
        if stacked or looked_up:
            found.append(lambda e, p=parameter: p.data[e])
        elif name.startswith("experts.mlp.") and parameter.ndim == 2:  # dbrx: [E * F, D]
            rows = parameter.data.view(num_experts, -1, parameter.shape[1])
            found.append(lambda e, p=rows: p[e])
        elif ".expert_0." in f".{name}" and parameter.ndim == 2:
            found.append(
                lambda e, n=name: block.get_parameter(n.replace("expert_0", f"expert_{e}")).data
            )
    return found


@contextmanager
def disturbed(views: list[Tensor]) -> Iterator[None]:
    """Noise on some weights, and the old weights again afterwards."""
    before = [view.clone() for view in views]
    for view in views:
        view.add_(torch.randn(view.shape) * NOISE)
    try:
        yield
    finally:
        for view, old in zip(views, before, strict=True):
            view.copy_(old)


@torch.no_grad()
def executed_TE(replay: Replay, block: nn.Module, num_experts: int) -> Tensor:
    """True where expert e ran for token t: bool [T, E]."""
    weights = expert_weights(block, num_experts)
    assert weights, "no expert weights found"
    base = replay()
    assert torch.equal(base, replay()), "the block is not deterministic"
    columns = []
    for expert in range(num_experts):
        with disturbed([view(expert) for view in weights]):
            columns.append((replay() != base).any(dim=-1))
    return torch.stack(columns, dim=-1)
