"""The chunked cross-entropy against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from equipoise.lab.loss import CHUNK, linear_cross_entropy


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients_are_those_of_torch(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(tokens, 12, dtype=dtype) * 5).requires_grad_()
    weight = torch.randn(40, 12, dtype=dtype, requires_grad=True)
    targets = torch.randint(40, (tokens,))
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(ours, theirs)
    mine = torch.autograd.grad(3 * ours, (hidden, weight))
    wanted = torch.autograd.grad(3 * theirs, (hidden, weight))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (5,))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight)
    )


def test_without_reduction_every_token_has_its_own() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(CHUNK + 7, 12), torch.randn(40, 12)
    targets = torch.randint(40, (CHUNK + 7,))
    found = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(
        found, F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    )


def test_logits_of_hundreds_do_not_overflow() -> None:
    hidden = torch.full((3, 4), 100.0, requires_grad=True)
    weight = torch.eye(4) * 50
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(loss, torch.tensor(4.0).log())


def test_under_autocast_only_the_products_are_rounded() -> None:
    torch.manual_seed(0)
    tokens = CHUNK + 7
    hidden, weight = (torch.randn(n, 12, requires_grad=True) for n in (tokens, 40))
    targets = torch.randint(40, (tokens,))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
        logits = F.linear(hidden, weight)
    wanted = F.cross_entropy(logits.float(), targets)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(found, (hidden, weight))
    theirs = torch.autograd.grad(wanted, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0.01 * float(other.abs().max()))


def test_the_loss_of_states_in_bfloat16_is_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(CHUNK + 7, 12).bfloat16().requires_grad_()
    weight = torch.randn(40, 12, requires_grad=True)
    targets = torch.randint(40, (CHUNK + 7,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        with torch.no_grad():
            wanted = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-6, atol=0)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
