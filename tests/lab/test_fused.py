"""The lab's own backward passes, against autograd on the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from equipoise.lab import fused
from equipoise.lab.fused import RMSNorm, Rotary, rotary_heads

ROWS, LENGTH, WIDTH = 3, 5, 8
HEADS, KV_HEADS, HIDDEN = 4, 2, 6


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("rows", [0, ROWS])
def test_attention_on_rotary_heads_is_that_of_autograd(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    torch.manual_seed(0)
    angles_SC = torch.rand(LENGTH, WIDTH // 2, dtype=torch.float64).repeat(1, 2)
    rotary = Rotary.of(angles_SC, HEADS, KV_HEADS)
    leaves = drawn(rows, LENGTH, HIDDEN), drawn((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN)
    weight_BHSC = drawn(rows, HEADS, LENGTH, WIDTH)
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(fused, "_worthwhile", lambda _: False)
        hidden_BSD, weight_RD = (leaf.clone().requires_grad_() for leaf in leaves)
        query, key, value = rotary_heads(
            hidden_BSD, weight_RD, rotary, heads=HEADS, kv_heads=KV_HEADS
        )
        mixed_BHSC = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        (mixed_BHSC * weight_BHSC).sum().backward()
        found.append([mixed_BHSC, value, hidden_BSD.grad, weight_RD.grad])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*found, strict=True))


def test_under_autocast_only_the_products_of_rotary_heads_are_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    rotary = Rotary.of(torch.rand(LENGTH, WIDTH // 2).repeat(1, 2), HEADS, KV_HEADS)
    leaves = (
        0.5 * torch.randn(ROWS, LENGTH, HIDDEN),
        torch.randn((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN),
    )
    found = []
    for plain, autocast in ((False, True), (True, True), (False, False)):
        monkeypatch.setattr(fused, "_worthwhile", lambda _, plain=plain: not plain)
        hidden_BSD, weight_RD = (leaf.clone().requires_grad_() for leaf in leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            query, key, value = rotary_heads(
                hidden_BSD, weight_RD, rotary, heads=HEADS, kv_heads=KV_HEADS
            )
        mixed_BHSC = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        mixed_BHSC.square().sum().backward()
        found.append([mixed_BHSC.detach(), value.detach(), hidden_BSD.grad, weight_RD.grad])
    assert all(tensor.dtype == torch.float32 for tensors in found for tensor in tensors)
    for fast, slow, exact in zip(*found, strict=True):
        assert 1e-4 < apart(fast, exact) < 0.02
        assert apart(fast, slow) < 0.01


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


def test_rotary_heads_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    angles_SC = torch.rand(LENGTH, WIDTH // 2, dtype=torch.float64).repeat(1, 2)
    rotary = Rotary.of(angles_SC, HEADS, KV_HEADS)
    size = (HEADS + 2 * KV_HEADS) * WIDTH
    heads = HEADS, KV_HEADS, KV_HEADS
    weights = [drawn(ROWS, n, LENGTH, WIDTH) for n in heads]
    joint = drawn(ROWS, LENGTH, size)
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(fused, "_worthwhile", lambda _: False)
        hidden = joint.clone().requires_grad_()
        eye = torch.eye(size, dtype=torch.float64)
        outs = list(rotary_heads(hidden, eye, rotary, heads=HEADS, kv_heads=KV_HEADS))
        if not plain:  # elements of queries and keys back in their places
            place_C = rotary.order_R[:WIDTH].argsort()
            outs = [outs[0][..., place_C], outs[1][..., place_C], outs[2]]
        sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward()  # type: ignore[union-attr]
        found.append([*outs, hidden.grad])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_rotary_heads_turn_pairs_of_halves() -> None:
    angle = torch.tensor([[0.3, 0.3]])
    joint = torch.tensor([[[1.0, 0.0, 0.0, 1.0, 5.0, 6.0]]])
    rotary = Rotary.of(angle, heads=1, kv_heads=1)
    query, key, value = rotary_heads(joint, torch.eye(6), rotary, heads=1, kv_heads=1)
    cos, sin = angle.cos()[0, 0], angle.sin()[0, 0]
    assert torch.allclose(query.flatten(), torch.stack([cos, sin]))
    assert torch.allclose(key.flatten(), torch.stack([-sin, cos]))
    assert value.flatten().tolist() == [5.0, 6.0]


def test_first_positions_are_turned_as_in_the_whole() -> None:
    torch.manual_seed(0)
    rotary = Rotary.of(torch.rand(LENGTH, WIDTH // 2).repeat(1, 2), heads=1, kv_heads=1)
    hidden_BSD = torch.randn(ROWS, LENGTH, 3 * WIDTH)
    eye = torch.eye(3 * WIDTH, requires_grad=True)
    whole = rotary_heads(hidden_BSD, eye, rotary, heads=1, kv_heads=1)
    part = rotary_heads(hidden_BSD[:, :2], eye, rotary.first(2), heads=1, kv_heads=1)
    assert all(torch.equal(a[:, :, :2], b) for a, b in zip(whole, part, strict=True))


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


def test_autocast_leaves_the_norm_alone() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(WIDTH, eps=1e-5)
    norm.weight.data = torch.linspace(0.5, 2, WIDTH)
    inputs = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(ROWS, LENGTH, WIDTH)
    grads = []
    for autocast in (False, True):
        norm.weight.grad = None
        x = inputs[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (norm(x) * inputs[1]).sum().backward()
        grads.append((x.grad, norm.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
