"""Hash routing: a table from token id to experts, fixed before training."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from equipoise.nn.routers import TopKRouter

_TOKEN_IDS_T: ContextVar[Tensor | None] = ContextVar("token_ids_T", default=None)


@contextmanager
def token_ids(input_ids_BS: Tensor) -> Iterator[None]:
    """Tell every HashRouter the token ids of the forward passes inside.

    For layers that call their router with the hidden states alone. Where activation checkpointing
    runs the layers again, `backward()` belongs inside too.
    """
    token = _TOKEN_IDS_T.set(input_ids_BS.reshape(-1))
    try:
        yield
    finally:
        _TOKEN_IDS_T.reset(token)


class HashRouter(TopKRouter):
    """Experts by token id (Hash layers, arXiv 2106.04426; the first layers of DeepSeek-V4).

    forward(hidden_TD, token_ids_T); without the second, the ids of the `token_ids` context are
    taken. `tid2eid` [V, K] holds the experts of each token id, see `hash_table`. `weighting`
    "equal", the default, is the hash layer of the paper, and the weight gets no gradient;
    score_function="sqrtsoftplus" with weighting="renormalized" is DeepSeek-V4's.
    Token ids have to lie in the table; on a GPU, torch reports others without naming the router.
    """

    tid2eid: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, tid2eid_VK: Tensor, **options: Any
    ) -> None:
        _check_table(tid2eid_VK, num_experts)
        unread = {"selection", "selection_bias", "null_experts"} & options.keys()
        if unread:
            raise ValueError(f"{', '.join(sorted(unread))}: not for a router that reads a table")
        options.setdefault("weighting", "equal")
        super().__init__(hidden_size, num_experts, tid2eid_VK.shape[1], **options)
        self.weight.requires_grad_(options["weighting"] != "equal")
        self.register_buffer("tid2eid", tid2eid_VK.to(torch.int64))

    def forward(
        self, hidden_TD: Tensor, token_ids_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], routing weights [T, K] and expert ids [T, K]."""
        if token_ids_T is None:
            token_ids_T = _TOKEN_IDS_T.get()
        if token_ids_T is None:
            raise ValueError(
                "a HashRouter needs token ids: pass them as the second argument, or run the model "
                "inside `with equipoise.nn.token_ids(input_ids):`"
            )
        if token_ids_T.shape != hidden_TD.shape[:1]:
            raise ValueError(
                f"{token_ids_T.numel()} token ids for {len(hidden_TD)} rows of hidden states"
            )
        logits_TE, _, scores_TE = self._score(hidden_TD)
        ids_TK = self.tid2eid[token_ids_T]
        return logits_TE, *self._weigh(scores_TE, ids_TK, hidden_TD.dtype)


def hash_table(
    vocab_size: int,
    num_experts: int,
    top_k: int = 1,
    *,
    counts_V: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """A table [V, K] of different experts per token id: at random, or balanced by `counts_V`.

    Balanced: ids in order of falling count each take the K experts with the least load so far.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} of {num_experts} experts; allowed is 1 to {num_experts}")
    if counts_V is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(vocab_size, num_experts, generator=generator).topk(top_k, dim=1).indices
    if counts_V.shape != (vocab_size,):
        raise ValueError(f"counts of shape {list(counts_V.shape)} for {vocab_size} token ids")
    table_VK = torch.empty(vocab_size, top_k, dtype=torch.int64)
    counts = counts_V.tolist()
    heap = [(0.0, expert) for expert in range(num_experts)]
    for token in counts_V.argsort(descending=True, stable=True).tolist():
        taken = [heapq.heappop(heap) for _ in range(top_k)]
        table_VK[token] = torch.tensor([expert for _, expert in taken])
        for load, expert in taken:
            heapq.heappush(heap, (load + counts[token], expert))
    return table_VK


def _check_table(tid2eid_VK: Tensor, num_experts: int) -> None:
    if tid2eid_VK.ndim != 2 or tid2eid_VK.is_floating_point() or not tid2eid_VK.numel():
        raise ValueError(
            f"a table of {tid2eid_VK.dtype} and shape {list(tid2eid_VK.shape)}; integers of shape "
            "[vocabulary, experts per token] are needed"
        )
    low, high = int(tid2eid_VK.min()), int(tid2eid_VK.max())
    if low < 0 or high >= num_experts:
        raise ValueError(f"the table names experts {low} to {high}; there are {num_experts}")
