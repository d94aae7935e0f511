"""Life cycle and adversary on two processes: both ranks do the same, and what one process would do.

    torchrun --nproc-per-node 2 -m tests.balance.test_two_processes FOLDER

is what the tests start, once; each rank writes FOLDER/rank-<n>.pt.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance import (
    Adversarial,
    Bias,
    Handle,
    Lifecycle,
    Loss,
    Sign,
    TargetMaxVio,
    attach,
)
from equipoise.errors import EquipoiseError
from tests.balance.conformance.models import ROWS, batch, build
from tests.torchrun import leave, torchrun

pytestmark = pytest.mark.distributed

STEPS, DEAD = 6, 3
FAMILIES = ("mixtral", "deepseek_v3")
Wrap = Callable[[Any], Any]
LIFE = Lifecycle(patience=2, noise=0.05, freeze={1: [5]}, asleep=2, awake=1)
ADVERSARY = Adversarial(weight=0.1, below=0.9, rate=1e-2)
TERMS: dict[str, list[Any]] = {
    "life": [LIFE, Loss("switch", weight=0.1, controller=TargetMaxVio(0.5)), Bias(Sign(1e-3))],
    "adversary": [ADVERSARY],
}
CASES = [(kind, family, "ddp") for kind in TERMS for family in FAMILIES]
CASES += [("adversary", "mixtral", "fsdp2")]


# -- one run, on one process or on each of two ---------------------------------------------------------


def trained(kind: str, family: str, wrap: Wrap, rank: int, ranks: int) -> list[dict[str, Any]]:
    """What there is after each step. One process takes the ranks' rows as the definitions say:

    counts and switch losses are of the whole batch, discriminators see each rank's micro-batch.
    """
    model = wrap(build(family))
    micro = 2 if kind == "adversary" and ranks == 1 else 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, *TERMS[kind], optimizer=optimizer, accumulation=micro)
    if kind == "life":
        _kill(handle)
    return [_step(handle, optimizer, number, rank, ranks, micro) for number in range(STEPS)]


def _kill(handle: Handle) -> None:
    """No token selects the expert until its bias is lifted."""
    for bias in handle.biases:
        bias_E = bias.read().clone()
        bias_E[bias_E.isfinite()] = 0.0
        bias_E[DEAD] = -1.0
        bias.write(bias_E)


def _step(
    handle: Handle, optimizer: Any, number: int, rank: int, ranks: int, micro: int
) -> dict[str, Any]:
    size = ROWS // ranks // micro
    for m in range(micro):
        piece = batch("full", number % 2).rows((rank + m) * size, (rank + m + 1) * size)
        main = piece.main_loss(handle.model(**piece.given).logits) * ranks
        (main * 1e3).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = handle.state_dict()
    discriminators = state["parts"].get("adversarial", {}).get("nets", {})
    return {
        "parameters": {n.removeprefix("module."): _whole(p) for n, p in _named(handle.model)},
        "moments": [_whole(s) for s in _moments(optimizer)],
        "biases": copy.deepcopy(state["biases"]),
        "weights": [weight.clone() for _, weight in state["weights"]],
        "counts": handle.counts(),
        "events": [asdict(event) for event in handle.events],
        "discriminators": copy.deepcopy(dict(discriminators)),
        "value": handle.metrics().get("balance/adversarial", 0.0),
    }


def _named(model: Any) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def _moments(optimizer: Any) -> list[Tensor]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["exp_avg_sq"] for p in held if p in optimizer.state]


def _whole(tensor: Any) -> Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()  # type: ignore[no-any-return]


# -- the two processes ---------------------------------------------------------------------------------


def _sharded(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _refused(term: Lifecycle) -> str:
    model = _sharded(build("mixtral"))
    try:
        attach(model, term)
    except EquipoiseError as error:
        return str(error)
    return "nothing"


def _frozen_when_sharded(rank: int) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Events, and counts of the last step, of a freeze under FSDP2."""
    model = _sharded(build("mixtral"))
    with attach(model, Lifecycle(dead="freeze", freeze={1: [5]}, asleep=2, awake=1)) as handle:
        for number in range(3):
            piece = batch("full", number % 2).rows(rank * 4, rank * 4 + 4)
            piece.main_loss(model(**piece.given).logits).backward()
            handle.step()
        return [asdict(event) for event in handle.events], handle.counts()


def main(folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)  # ranks must not agree by drawing alike
    wraps: dict[str, Wrap] = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": _sharded}
    found: dict[Any, Any] = {}
    for kind, family, how in CASES:
        torch.rand(rank * 7)
        found[kind, family, how] = trained(kind, family, wraps[how], rank, 2)
    found["refused"] = _refused(Lifecycle())
    found["frozen"] = _frozen_when_sharded(rank)
    torch.save(found, Path(folder) / f"rank-{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    torchrun("-m", "tests.balance.test_two_processes", folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


# -- tests ---------------------------------------------------------------------------------------------


def tensors(found: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a step by name, but those of this rank alone."""
    named = {**found["parameters"], **{f"net {n}": t for n, t in found["discriminators"].items()}}
    for name in ("moments", "biases", "weights", "counts"):
        named |= {f"{name} {n}": t for n, t in enumerate(found[name])}
    return named


@pytest.mark.parametrize(("kind", "family", "how"), CASES)
def test_both_ranks_are_the_same_after_each_step(
    kind: str, family: str, how: str, ranks: list[dict[Any, Any]]
) -> None:
    for mine, theirs in zip(*(rank[kind, family, how] for rank in ranks), strict=True):
        assert mine["events"] == theirs["events"]
        here, there = tensors(mine), tensors(theirs)
        assert here.keys() == there.keys()
        assert all(torch.equal(t, there[name]) for name, t in here.items())


@pytest.mark.parametrize(("kind", "family", "how"), CASES)
def test_two_ranks_do_what_one_process_does(
    kind: str, family: str, how: str, ranks: list[dict[Any, Any]]
) -> None:
    """From the same start on; weights agree to the rounding of sums in another order."""
    alone = trained(kind, family, lambda model: model, 0, 1)
    for step, (one, *two) in enumerate(
        zip(alone, *(rank[kind, family, how] for rank in ranks), strict=True)
    ):
        assert one["events"] == two[0]["events"]
        assert one["value"] == pytest.approx((two[0]["value"] + two[1]["value"]) / 2, rel=1e-4)
        here, there = tensors(one), tensors(two[0])
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            close = 1e-4 * float(tensor.abs().nan_to_num(posinf=0.0).max())
            torch.testing.assert_close(
                there[name], tensor, rtol=0, atol=close, msg=f"step {step}: {name}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dead_expert_is_revived_and_gets_tokens(
    family: str, ranks: list[dict[Any, Any]]
) -> None:
    """Once in each layer, from one of the two busiest on both ranks together; the frozen come and go."""
    steps = ranks[0]["life", family, "ddp"]
    revived = [e for e in steps[-1]["events"] if e["what"] == "revived" and e["expert"] == DEAD]
    assert [e["step"] for e in revived] == [1, 1]
    for layer, event in enumerate(revived):
        assert event["donor"] in steps[1]["counts"][layer].topk(2).indices.tolist()
        assert not any(step["counts"][layer][DEAD] for step in steps[:2])
        assert steps[2]["counts"][layer][DEAD] > 0
    assert {"frozen", "woken", "revived"} <= {e["what"] for e in steps[-1]["events"]}
    biases = [torch.stack(step["biases"]) for step in steps]
    assert not any(torch.equal(a, b) for a, b in pairwise(biases))
    assert not torch.equal(steps[0]["weights"][0], steps[-1]["weights"][0])


def test_the_discriminators_learn_from_both_ranks(ranks: list[dict[Any, Any]]) -> None:
    """Each rank's own loss is its own; the weights that follow are common."""
    for family in FAMILIES:
        mine, theirs = (rank["adversary", family, "ddp"] for rank in ranks)
        assert [step["value"] for step in mine] != [step["value"] for step in theirs]
        first, last = mine[0]["discriminators"], mine[-1]["discriminators"]
        assert not any(torch.equal(first[name], last[name]) for name in first)


def test_under_fsdp2_reviving_is_refused_and_freezing_works(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert "weights are sharded (FSDP2, DTensor)" in rank["refused"]
        assert "dead='freeze'" in rank["refused"]
        assert rank["frozen"][0] == ranks[0]["frozen"][0]
        assert [e["what"] for e in rank["frozen"][0]] == ["frozen", "woken", "frozen"]
        counts = torch.stack(rank["frozen"][1])
        assert torch.equal(counts, torch.stack(ranks[0]["frozen"][1]))
        assert counts.sum() == 2 * 2 * batch("full", 0).valid_BS.numel()


if __name__ == "__main__":
    main(sys.argv[1])
