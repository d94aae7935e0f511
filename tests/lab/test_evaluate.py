"""Held-out text shared out over processes: the passes of one, each made once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.lab import Config, load_corpus
from equipoise.lab.batches import held_out_rows
from equipoise.lab.evaluate import ROWS, Evaluation, _dealt, evaluate
from equipoise.lab.model import LanguageModel

ROUTERS = ("softmax", "base", "expert_choice", "soft")


def process(rank: int, count: int, in_step: bool = False, total: Any = None) -> Any:
    """One of several, as far as an evaluation asks."""
    return SimpleNamespace(rank=rank, count=count, in_step=in_step, total=total)


@pytest.mark.parametrize("in_step", [False, True], ids=["apart", "in step"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_pass_of_one_process_is_made_by_one_of_several(count: int, in_step: bool) -> None:
    rows = [torch.arange(2 * n).view(n, 2) + 1000 * n for n in (5, 2 * ROWS, 3 * ROWS + 1)]
    alone = _dealt(rows, None)
    assert [len(part) for _, part in alone] == [5, ROWS, ROWS, ROWS, ROWS, ROWS, 1]
    made = [_dealt(rows, process(rank, count, in_step)) for rank in range(count)]
    if in_step:
        assert len({len(parts) for parts in made}) == 1
    together = [(d, part.tolist()) for parts in made for d, part in parts if len(part)]
    assert sorted(together) == sorted((d, part.tolist()) for d, part in alone)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_shares_of_processes_add_up_to_the_evaluation_of_one(
    configure: Callable[..., Config], router: str
) -> None:
    top_k = {"model__top_k": 1} if router == "base" else {}
    config = configure(model__router=router, data__held_out_tokens=1500, **top_k)
    torch.manual_seed(0)
    model, corpus = LanguageModel(config.model, config.data.vocab_size), load_corpus(config.data)
    whole = evaluate(model, corpus, 16)
    shares: list[list[torch.Tensor]] = []
    for rank in range(2):
        shares.append([])
        evaluate(model, corpus, 16, processes=process(rank, 2, True, shares[-1].append))
    losses_D, sums_DL, counts_DLE = (
        torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)
    )
    assert all(float(share[0].sum()) > 0 for share in shares)
    assert counts_DLE.tolist() == whole.counts.tolist()
    assert losses_D.numpy() / whole.tokens == pytest.approx(whole.losses, rel=1e-13)
    sums = whole.weight_sums * whole.tokens[:, None]
    assert sums_DL.numpy() == pytest.approx(sums, rel=1e-13)
    rows = torch.cat([held_out_rows(domain, 16) for domain in corpus.domains])
    assert whole.tokens.sum() == rows[:, 1:].numel()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_pass_without_rows_counts_nothing(configure: Callable[..., Config], router: str) -> None:
    top_k = {"model__top_k": 1} if router == "base" else {}
    config = configure(model__router=router, **top_k)
    model = LanguageModel(config.model, config.data.vocab_size).eval()
    none = torch.zeros(0, 16, dtype=torch.long)
    with torch.no_grad():
        assert model(none, none, reduction="none").shape == (0,)


def made(tokens: list[int], counts_DLE: np.ndarray) -> Evaluation:
    """An evaluation of made-up counts."""
    nothing = np.zeros(len(tokens))
    names = tuple("abcdefgh"[: len(tokens)])
    return Evaluation(names, nothing, np.array(tokens), nothing + 1, counts_DLE, nothing[:, None])


def test_every_pass_is_told(configure: Callable[..., Config]) -> None:
    config = configure(data__held_out_tokens=1500)
    corpus = load_corpus(config.data)
    model = LanguageModel(config.model, config.data.vocab_size)
    told: list[tuple[int, int]] = []
    evaluate(model, corpus, config.data.row_length, told=lambda *at: told.append(at))
    passes = sum(
        -(-len(held_out_rows(domain, config.data.row_length, 0)) // ROWS)
        for domain in corpus.domains
    )
    assert told == [(done, passes) for done in range(1, passes + 1)]


@pytest.mark.parametrize("tokens", [0, 100])
def test_bytes_per_token_are_of_the_tokens_predicted(
    configure: Callable[..., Config], tokens: int
) -> None:
    config = configure(data__domains="abc,digits")  # where no letter is cut in two
    corpus = load_corpus(config.data)
    model = LanguageModel(config.model, config.data.vocab_size)
    found = evaluate(model, corpus, 16, tokens=tokens)
    for domain, ratio in zip(corpus.domains, found.bytes_per_token, strict=True):
        targets = held_out_rows(domain, 16, tokens)[:, 1:].flatten()
        text = corpus.tokenizer().decode(targets.tolist(), skip_special_tokens=True)
        assert ratio == pytest.approx(len(text.encode()) / len(targets), rel=1e-12)


def test_domains_weigh_alike_in_max_vio_however_long_they_are() -> None:
    even = made([100, 300], np.array([[[100, 0]], [[0, 300]]]))
    assert even.max_vio == pytest.approx(0)
    assert even.max_vio == made([300, 300], np.array([[[300, 0]], [[0, 300]]])).max_vio
    # A router that gives one domain more experts a token: 2 and 1, as its tokens are trained on.
    assert made([10, 10], np.array([[[10, 10]], [[10, 0]]])).max_vio == pytest.approx(1 / 3)


def test_the_floor_is_that_of_uniform_routing_of_such_domains() -> None:
    generator, tokens, experts = np.random.default_rng(0), [200, 2000], 8
    drawn = [
        generator.multinomial(n, np.full(experts, 1 / experts), size=(3000, 1)) for n in tokens
    ]
    found = [made(tokens, np.stack(counts)).max_vio for counts in zip(*drawn, strict=True)]
    floor = made(tokens, np.stack([counts[0] for counts in drawn])).max_vio_floor(top_k=1)
    assert floor == pytest.approx(np.mean(found), rel=0.05)
