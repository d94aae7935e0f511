"""Optimizers of recipes, and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.lab.config import OptimizerConfig
from equipoise.lab.model import LanguageModel


def make_optimizer(model: nn.Module, plain: LanguageModel, config: OptimizerConfig) -> Any:
    """AdamW or Muon over a model's parameters; `plain` is the model inside its wrapper.

    Vectors and scalars are not decayed; routers, and their noise, learn at `router_lr_scale` of the rate,
    and under Muon, as the embedding and the output layer, by AdamW.
    """
    routers = {id(p) for layer in plain.moe_layers() for p in layer.gate.parameters()}
    tables = {id(plain.embedding.weight), id(plain.head.weight)}
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "table": [], "vector": [], "router": []}
    for parameter in model.parameters():
        kind = "matrix" if parameter.ndim > 1 else "vector"
        if id(parameter) in routers:
            kind = "router"
        elif id(parameter) in tables:
            kind = "table"
        if parameter.requires_grad:
            kinds[kind].append(parameter)
    muon = config.name == "muon"
    groups = [
        {"params": kinds["matrix"], "lr": config.muon_lr if muon else config.lr, "muon": muon},
        {"params": kinds["table"], "lr": config.lr, "muon": False},
        {"params": kinds["vector"], "lr": config.lr, "weight_decay": 0.0, "muon": False},
        {"params": kinds["router"], "lr": config.lr * config.router_lr_scale, "muon": False},
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["highest"] = group["lr"]
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    if muon:
        return Muon(groups, lr=config.lr, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=decay, fused=True)


class Muon(torch.optim.AdamW):
    """AdamW for groups with `muon=False`; for the others Muon (Jordan et al. 2024), which may be
    stacks of matrices [..., m, n], each orthogonalised by itself: torch.optim.Muon takes one only.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both kinds."""
        aside: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if not group["muon"]:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    aside.append((parameter, parameter.grad))
                    self._orthogonal_step(parameter, group)
                    parameter.grad = None
        loss = super().step(closure)
        for parameter, grad in aside:
            parameter.grad = grad
        return loss

    def _orthogonal_step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            state["step"] = torch.zeros(())  # AdamW looks for it in every saved state
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - self.momentum)
        update = orthogonalised(parameter.grad.lerp(buffer, self.momentum))
        rows, columns = parameter.shape[-2:]
        scale = math.sqrt(max(1.0, rows / columns))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each matrix of [..., m, n] brought near U V^T of its singular value decomposition.

    Five Newton-Schulz iterations with Jordan's quintic (3.4445, -4.7750, 2.0315), in bfloat16:
    singular values end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of a step as a share of the highest: warm-up, then the schedule."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    last = max(1, steps - 1)
    if config.schedule == "wsd":
        start = max(warmup, round(steps * (1 - config.decay_share)))
        done = 0.0 if step < start else (step - start + 1) / max(1, steps - start)
        return 1.0 + (config.floor - 1.0) * done
    done = (step - warmup) / max(1, last - warmup)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rate(optimizer: Any, share: float) -> None:
    """Every group's learning rate, as a share of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["highest"] * share
