"""What each of two processes runs: every parallel setting, each rank on its own rows.

    torchrun --nproc-per-node 2 -m tests.balance.conformance.worker FOLDER [SETTING]

With the name of a setting, every method in that one; else the tests' methods in all.
Writes FOLDER/rank-<n>.pt; gradients and biases are whole, so those of rank 0 are enough, but both
ranks write theirs: they have to agree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from equipoise.balance import Bias, Loss, Sign, attach
from equipoise.errors import EquipoiseError
from tests.balance.conformance.controllers import run_bias, run_weights, tried_in
from tests.balance.conformance.models import FAMILIES, batch, build
from tests.balance.conformance.settings import (
    PARALLEL,
    TESTED_PARALLEL,
    Setting,
    Wrap,
    chunks,
    run,
    terms_of,
)
from tests.torchrun import leave


def wrapper(setting: Setting) -> Wrap:
    """Wraps a model for data parallel training."""
    if setting.parallel == "ddp":
        return _summed if setting.reduction == "sum" else nn.parallel.DistributedDataParallel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(model: Any) -> nn.Module:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if setting.reduction == "sum":
            for module in (*model.model.layers, model):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other to divide by
        return model  # type: ignore[no-any-return]

    return wrap


def _summed(model: nn.Module) -> nn.Module:
    """DDP that adds gradients up."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(None, lambda _, bucket: _sum_of(bucket))
    return wrapped


def _sum_of(bucket: Any) -> Any:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def losses(setting: Setting, family: str, every: bool) -> dict[tuple[str, str, int], Any]:
    """Outcomes by setting, family and number of the term."""
    wrap, rank = wrapper(setting), dist.get_rank()
    found, number = {}, 0
    for chunk in chunks(terms_of(setting, every)):
        for outcome in run(family, setting, chunk, rank=rank, wrap=wrap):
            found[setting.name, family, number] = outcome
            number += 1
    return found


def controlled(setting: Setting, family: str, every: bool) -> dict[tuple[str, str, str], Any]:
    """What controllers made, by setting, family and name of the controller."""
    wrap, rank = wrapper(setting), dist.get_rank()
    return {
        (setting.name, family, name): (run_bias if tried.is_bias else run_weights)(
            tried, family, setting, rank=rank, wrap=wrap
        )
        for name, tried in tried_in(setting, every).items()
    }


def refused(scope: str) -> str:
    """What each rank says when the scores of rank 1 alone are NaN."""
    model = nn.parallel.DistributedDataParallel(build("mixtral"))
    handle = attach(model, Loss("switch", scope), Bias(Sign(0.1)))
    if dist.get_rank() == 1:
        model.module.model.layers[1].mlp.gate.weight.data.fill_(float("nan"))
    data = batch("full", 0)
    data.main_loss(model(**data.given).logits).backward()
    try:
        handle.step()
    except EquipoiseError as error:
        return str(error)
    return "nothing"


def main(folder: str, name: str = "") -> None:
    """Run one setting, or all, and leave the outcomes in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    every = bool(name)
    found: dict[str, Any] = {"losses": {}, "controllers": {}}
    if not every:
        found["refused"] = {scope: refused(scope) for scope in ("micro", "global")}
    for setting in [s for s in PARALLEL if s.name == name] if every else TESTED_PARALLEL:
        for family in FAMILIES:
            found["losses"] |= losses(setting, family, every)
            found["controllers"] |= controlled(setting, family, every)
    torch.save(found, Path(folder) / f"rank-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
