"""One process or several: how a model, its optimizer and its numbers are shared between them."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.model import LanguageModel
from equipoise.nn import ParallelExperts


class Processes:
    """The processes that train one model together, by Accelerate; alone, one.

    Started by `accelerate launch` or `torchrun`, or not at all.
    """

    def __init__(self, config: Config) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise EquipoiseError("training needs: pip install 'equipoise[lab]'.") from error
        cpu = not torch.cuda.is_available()
        precision = "bf16" if config.precision == "bfloat16" else "no"
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
        self.config, self.device = config, self.accelerator.device
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        if cpu:
            torch.set_num_threads(config.threads)
        self.check()

    def check(self) -> None:
        """Raise EquipoiseError where the config does not fit so many processes."""
        config = self.config
        if config.batch_rows % (config.micro_rows * self.count):
            raise EquipoiseError(
                f"batch_rows={config.batch_rows} cannot be shared out over {self.count} processes "
                f"in micro-batches of micro_rows={config.micro_rows}."
            )
        if config.expert_parallel:
            if self.count == 1:
                raise EquipoiseError(
                    "expert_parallel=true shares experts out over processes, and there is one: "
                    "start the run with torchrun --nproc-per-node N, or set it to false."
                )
            if config.parallel == "fsdp2" or config.model.experts % self.count:
                raise EquipoiseError(
                    f"expert_parallel=true with parallel={config.parallel} and model.experts="
                    f"{config.model.experts} over {self.count} processes: it takes parallel=ddp and "
                    "a multiple of the processes."
                )
        if self.count > 1 and config.parallel == "fsdp2" and config.optimizer.name == "muon":
            raise EquipoiseError(
                "optimizer.name=muon needs whole matrices, which parallel=fsdp2 cuts: use "
                "parallel=ddp or optimizer.name=adamw."
            )

    @property
    def first(self) -> bool:
        """This process writes the files."""
        return self.rank == 0

    @property
    def micro_batches(self) -> int:
        """Of this process, in one optimizer step."""
        return self.config.batch_rows // (self.config.micro_rows * self.count)

    @property
    def expert_group(self) -> Any:
        """The processes that share out the experts, or None."""
        return dist.group.WORLD if self.config.expert_parallel else None

    def wrap(self, model: LanguageModel) -> nn.Module:
        """The model as it is called in training."""
        model.to(self.device)
        if self.count > 1 and self.config.parallel == "fsdp2":
            return self._sharded(model)
        if self.config.expert_parallel:
            self._keep_apart(model)
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def _sharded(self, model: LanguageModel) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        kind = torch.bfloat16 if self.config.precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def _keep_apart(self, model: LanguageModel) -> None:
        """Experts of this process alone: not averaged, their gradient is already of all tokens."""
        names = []
        for name, module in model.named_modules():
            if isinstance(module, ParallelExperts):
                for inner, parameter in module.named_parameters():
                    names.append(f"{name}.{inner}")
                    parameter.register_hook(lambda grad: grad / self.count)
                    parameter._expert_share = True  # type: ignore[attr-defined]
        ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, names)

    def waiting(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Hold gradients back until the last micro-batch of a step."""
        if last or self.count == 1:
            return nullcontext()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync()  # type: ignore[no-any-return]
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of a forward pass."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def clip(self, model: nn.Module, largest: float) -> float:
        """Scale gradients to a norm of at most `largest` (0 does not); the norm over all processes."""
        whole, shares = [], []
        for parameter in model.parameters():
            if parameter.grad is not None:
                apart = getattr(parameter, "_expert_share", False)
                (shares if apart else whole).append(parameter.grad)
        square = _square(whole)
        if self.config.expert_parallel:
            theirs = _square(shares)
            dist.all_reduce(theirs)
            square = square + theirs
        norm = math.sqrt(float(square))
        if largest > 0 and norm > largest:
            torch._foreach_mul_([*whole, *shares], largest / norm)
        return norm

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()


def _square(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    square = torch.stack([norm * norm for norm in torch._foreach_norm(grads)]).sum()
    return square.full_tensor() if hasattr(square, "full_tensor") else square


def launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
