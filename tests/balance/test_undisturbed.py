"""`check()` and `discard()` leave no trace: not in controllers that gather scores, not in the book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.balance import Bias, Handle, Loss, Quantile, QuantileHistogram, Sign, attach
from tests.torchrun import torchrun

from .test_attach_api import backward, batch
from .test_trainer import mixtral

CONTROLLERS = {
    "Quantile": Quantile(ema=0.5),
    "QuantileHistogram": QuantileHistogram(adaptive=True),
    "Sign": Sign(rate=0.1),
}


def attached(name: str, **options: Any) -> Handle:
    return attach(mixtral().train(), Loss("switch", weight=0.1), Bias(CONTROLLERS[name]), **options)


def remembered(handle: Handle) -> dict[str, Any]:
    """All that a controller and the book carry."""
    states = {
        f"{i}/{n}": t for i, state in enumerate(handle.steps.states) for n, t in state.items()
    }
    scopes = {f"{k}/{n}": t for k, state in handle.book.states.items() for n, t in state.items()}
    counts = {"local": handle.book._local, "total": handle.book._total}
    sums = {"values": handle.book.meters.values, "scores": handle.book.meters.sums}
    return {k: v.clone() for k, v in {**states, **scopes, **counts, **sums}.items()}


def assert_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def two_steps(handle: Handle) -> torch.Tensor:
    for number in (0, 1):
        backward(handle, number)
        handle.step()
    return torch.stack(handle.bias())


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("broken", ["once", "between steps"])
def test_a_discarded_step_changes_nothing(name: str, broken: str) -> None:
    wanted = two_steps(attached(name))
    handle = attached(name)
    if broken == "between steps":
        backward(handle, 0)
        handle.step()
    before = remembered(handle)
    backward(handle, 3)
    assert any(not torch.equal(t, before[n]) for n, t in remembered(handle).items() if n in before)
    handle.discard()
    assert_equal(before, remembered(handle))
    if broken == "between steps":
        backward(handle, 1)
        handle.step()
        assert torch.equal(torch.stack(handle.bias()), wanted)
    else:
        assert torch.equal(two_steps(handle), wanted)
    assert wanted.any()


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("within", [False, True], ids=["between steps", "within a step"])
def test_a_check_changes_nothing(name: str, within: bool) -> None:
    biases = []
    for checked in (False, True):
        handle = attached(name, accumulation=2)
        backward(handle, 0)
        if not within:
            backward(handle, 1)
            handle.step()
        if checked:
            before, drawn = remembered(handle), torch.get_rng_state()
            handle.check(**batch(3))
            assert_equal(before, remembered(handle))
            assert torch.equal(torch.get_rng_state(), drawn)
        for number in (1,) if within else (2, 3):
            backward(handle, number)
        handle.step()
        biases.append(torch.stack(handle.bias()))
    assert torch.equal(*biases)
    assert biases[0].any()


WORKER = """
import sys, torch, torch.distributed as dist
from equipoise.balance import Bias, Loss, QuantileHistogram, attach
from equipoise.errors import EquipoiseError
from tests.balance.test_attach_api import batch
from tests.balance.test_trainer import mixtral
from tests.torchrun import leave
torch.set_num_threads(1)
early = attach(mixtral().train(), Loss("switch"), group=dist.group.WORLD)  # None: not yet begun
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
try:
    early.model(**batch(rank))
except EquipoiseError as error:
    found["early"] = str(error)
early.bind(group=dist.group.WORLD)
early.model(**batch(rank)).loss.backward()
early.step()
found["bound"] = early.tokens()
for broken in (False, True):
    model = mixtral().train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    handle = attach(wrapped, Loss("switch", weight=0.1), Bias(QuantileHistogram()))
    if broken:
        wrapped(**batch(2 + rank)).loss.backward()
        handle.discard()
        if rank == 1:  # a pass that broke off on one rank only, after its first layer
            model.model.layers[0].mlp(torch.randn(1, 4, 16))
        else:
            model(**batch(2))
        handle.discard()
        model.zero_grad()
    wrapped(**batch(rank)).loss.backward()
    handle.step()
    found[broken] = torch.stack(handle.bias()), torch.stack(handle.counts())
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
leave()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_discard_together_and_none_counts_alone(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun(script, tmp_path, seconds=120)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        assert "2 processes run, but attach() came before" in found["early"]
        assert found["bound"] == [96, 96]
        for one, other, first in zip(found[False], found[True], ranks[0][False], strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, first)
