"""The lab's own backward passes, against autograd on the plain formulas."""

from __future__ import annotations

import pytest
import torch

from equipoise.lab import fused
from equipoise.lab.fused import RMSNorm, rotary_heads

ROWS, LENGTH, WIDTH = 3, 5, 8


def test_rotary_heads_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    angles = torch.rand(LENGTH, WIDTH // 2, dtype=torch.float64).repeat(1, 2)
    weights = [torch.randn(ROWS, heads, LENGTH, WIDTH, dtype=torch.float64) for heads in (4, 2, 2)]
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(fused, "_worthwhile", lambda _: False)
        torch.manual_seed(1)
        joint = torch.randn(ROWS, LENGTH, 8 * WIDTH, dtype=torch.float64, requires_grad=True)
        outs = rotary_heads(joint, angles.cos(), angles.sin(), heads=4, kv_heads=2)
        sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward()  # type: ignore[union-attr]
        found.append([*outs, joint.grad])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(*found, strict=True))


def test_rotary_heads_turn_pairs_of_halves() -> None:
    angle = torch.tensor([[0.3, 0.3]])
    joint = torch.tensor([[[1.0, 0.0, 0.0, 1.0, 5.0, 6.0]]])
    query, key, value = rotary_heads(joint, angle.cos(), angle.sin(), heads=1, kv_heads=1)
    cos, sin = angle.cos()[0, 0], angle.sin()[0, 0]
    assert torch.allclose(query.flatten(), torch.stack([cos, sin]))
    assert torch.allclose(key.flatten(), torch.stack([-sin, cos]))
    assert value.flatten().tolist() == [5.0, 6.0]


def test_the_norm_has_the_gradient_of_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(WIDTH, eps=1e-5).double(), torch.nn.RMSNorm(WIDTH, eps=1e-5).double()
    for norm in (ours, theirs):
        norm.weight.data = torch.linspace(0.5, 2, WIDTH, dtype=torch.float64)
    inputs = [torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64) for _ in range(2)]
    grads = []
    for norm in (ours, theirs):
        x = inputs[0].clone().requires_grad_()
        (norm(x) * inputs[1]).sum().backward()
        grads.append((x.grad, norm.weight.grad))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*grads, strict=True))
