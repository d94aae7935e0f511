"""The meter of what routers select, against a count token by token."""

from __future__ import annotations

import pytest
import torch

from equipoise.lab.config import ModelConfig
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel


@pytest.mark.parametrize(
    ("router", "decides"),
    [
        ("softmax(weighting=scores)", False),
        ("expert_choice(chunk=8)", True),
        ("expert_threshold", True),
        ("relu", True),
    ],
)
def test_selections_and_tokens_without_an_expert_are_counted(router: str, decides: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 2, "experts": 6, "top_k": 1}
    model = LanguageModel(ModelConfig(**shape, expert_size=8, router=router), 50)
    chosen: list[list[set[int]]] = [[], []]
    for mine, layer in zip(chosen, model.moe_layers(), strict=True):
        layer.gate.register_forward_hook(
            lambda gate, args, out, mine=mine: mine.extend(
                {e for e in row if e >= 0} for row in out[2].tolist()
            )
        )
    with Meter(model) as meter:
        for _ in range(2):
            model(torch.randint(0, 50, (3, 16)))
        taken = meter.take()
        assert not meter.take().unchosen_L.any()
    counts = [[sum(e in row for row in rows) for e in range(6)] for rows in chosen]
    assert taken.counts_LE.tolist() == counts
    assert taken.unchosen_L.tolist() == [sum(not row for row in rows) for rows in chosen]
    assert bool(taken.unchosen_L.any()) == decides
