"""What the tests of routers share: inputs, and weights spread out to a table [T, E]."""

from __future__ import annotations

import torch

from equipoise.routing import NO_EXPERT

T, D, E = 7, 5, 8


def states(tokens=T, width=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)


def sharpened(router, seed=1):
    """The router in its training dtype with a weight large enough that scores differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return router


def dense(weights_TK, ids_TK, experts):
    """Weights as a table [T, E]; also checks that empty slots weigh 0 and no expert comes twice."""
    empty = ids_TK == NO_EXPERT
    assert (weights_TK[empty] == 0).all()
    count = torch.zeros(len(ids_TK), experts + 1, dtype=torch.int64)
    count.scatter_add_(1, ids_TK.masked_fill(empty, experts), torch.ones_like(ids_TK))
    assert (count[:, :experts] <= 1).all()
    table = weights_TK.new_zeros(len(ids_TK), experts + 1)
    return table.scatter_add(1, ids_TK.masked_fill(empty, experts), weights_TK)[:, :experts]


def loads(ids_TK, experts):
    return torch.bincount(ids_TK[ids_TK != NO_EXPERT], minlength=experts)


def gradients(table_TE, inputs, seed=2):
    """Gradients of a fixed random functional of a table."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(table_TE.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((table_TE * probe.to(table_TE.dtype)).sum(), inputs)
