"""One process or several: how a model, its optimizer and its numbers are shared between them."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.lab.checks import check_shared
from equipoise.lab.config import Config
from equipoise.lab.model import LanguageModel
from equipoise.nn import ParallelExperts


class Processes:
    """The processes that train one model together, by Accelerate; alone, one.

    Several are started by `equipoise train --processes`, by `torchrun`, or on GPUs by
    `accelerate launch`.
    """

    def __init__(self, config: Config) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise EquipoiseError("training needs: pip install 'equipoise[lab]'.") from error
        _check_launched()
        cpu = not torch.cuda.is_available()
        # Autocast is ours: Accelerate refuses a second run of another precision in one process.
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.config, self.device = config, self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        if cpu:
            torch.set_num_threads(config.threads)
            _keep_memory()
        self._check_device()
        if config.processes not in (1, self.count):
            raise EquipoiseError(
                f"processes={config.processes}, and started were {self.count}: equipoise train starts as "
                "many by itself; a launcher has to be told as many, or the setting left at 1."
            )
        check_shared(config, self.count)

    def _check_device(self) -> None:
        kind = self.accelerator.distributed_type
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise EquipoiseError(
                f"accelerate is set up for {kind.value}, which this trainer leaves to its own "
                "parallel=ddp and parallel=fsdp2: launch with a plain multi-process setting."
            )
        if self.config.precision != "bfloat16" or self.device.type != "cuda":
            return
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise EquipoiseError(
                f"precision=bfloat16: {torch.cuda.get_device_name()} does not compute in it; use "
                "precision=float32."
            )

    def check_memory(self, parameters: int) -> None:
        """Raise EquipoiseError where weights, gradients and the optimizer's moments do not fit here."""
        shared = self.count if self.sharded or self.config.expert_parallel else 1
        numbers = 3 if self.config.optimizer.name == "muon" else 4  # of 4 bytes, for each parameter
        needed, held = 4 * numbers * parameters // shared, self._memory()
        if held is not None and needed > held:
            model = self.config.model
            raise EquipoiseError(
                f"model.hidden_size={model.hidden_size}, model.layers={model.layers}, model.experts="
                f"{model.experts} and model.expert_size={model.expert_size} make {parameters / 1e9:.1f} "
                f"billion parameters or more: with gradients and the optimizer's moments "
                f"{needed / 2**30:,.0f} GiB, and {self.device} has {held / 2**30:,.0f} GiB. Make one of "
                "them smaller."
            )

    def _memory(self) -> int | None:
        """Bytes of the device, or None where it does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[1])
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None

    @property
    def first(self) -> bool:
        """This process writes the files."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Parameters are cut up over the processes."""
        return self.count > 1 and self.config.parallel == "fsdp2"

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that share a batch, or None for one by itself."""
        return dist.group.WORLD if self.count > 1 else None

    @property
    def micro_batches(self) -> int:
        """Of this process, in one optimizer step."""
        return self.config.batch_rows // (self.config.micro_rows * self.count)

    @property
    def in_step(self) -> bool:
        """All processes have to make each forward pass together."""
        return self.sharded or self.config.expert_parallel

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        """The processes that share out the experts, or None."""
        return dist.group.WORLD if self.config.expert_parallel else None

    def wrap(self, model: LanguageModel) -> nn.Module:
        """The model as it is called in training."""
        model.to(self.device)
        if self.sharded:
            return self._shard(model)
        if self.config.expert_parallel:
            self._keep_apart(model)
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def _shard(self, model: LanguageModel) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def _keep_apart(self, model: LanguageModel) -> None:
        """Experts of this process alone: not averaged, their gradient is already of all tokens."""
        names = []
        for name, module in model.named_modules():
            if isinstance(module, ParallelExperts):
                for inner, parameter in module.named_parameters():
                    names.append(f"{name}.{inner}")
                    parameter.register_hook(lambda g: g / self.count)  # type: ignore[no-untyped-call]
                    parameter._expert_share = True  # type: ignore[attr-defined]
        ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, names)  # type: ignore[no-untyped-call]

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of a micro-batch: gradients are reduced in the last of a step."""
        if self.sharded:
            cast(Any, model).set_requires_gradient_sync(last)
        elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
            with model.no_sync():
                yield
            return
        yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of a forward pass."""
        bfloat16 = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def clip(self, model: nn.Module, largest: float) -> float:
        """Scale gradients to a norm of at most `largest` (0 does not); the norm over all processes."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        apart = [p.grad for p in model.parameters() if getattr(p, "_expert_share", False)]
        shares = grads if self.sharded else [grad for grad in apart if grad is not None]
        held = {id(grad) for grad in shares}
        square = _square([grad for grad in grads if id(grad) not in held], self.device)
        if self.sharded or self.config.expert_parallel:
            square = square + self.total(_square(shares, self.device))
        norm = math.sqrt(float(square))
        if largest > 0 and norm > largest:
            torch._foreach_mul_([_local(grad) for grad in grads], largest / norm)
        return norm

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def told(self, value: Any) -> list[Any]:
        """What each process says, in order of rank."""
        if self.count == 1:
            return [value]
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, value)
        return said

    @contextmanager
    def together(self) -> Iterator[None]:
        """An EquipoiseError on one process is raised on all, so that none waits for another."""
        if self.count == 1:
            yield
            return
        error: EquipoiseError | None = None
        try:
            yield
        except EquipoiseError as raised:
            error = raised
        said = [text for text in self.told(None if error is None else str(error)) if text]
        if said:
            raise EquipoiseError(said[0]) from error


def _check_launched() -> None:
    """Raise EquipoiseError where accelerate was asked for several processes, and started one."""
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    by_accelerate = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    if by_accelerate and not any(name in os.environ for name in sizes):
        raise EquipoiseError(
            "accelerate launch was asked for several processes and started one: without MPI it starts "
            "more on GPUs only (--multi_gpu). Use equipoise train --processes N ..."
        )


def _local(tensor: Any) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _square(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of this process's parts, float32."""
    parts = [_local(grad) for grad in grads]
    if not parts:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(parts)).square().sum()


def _keep_memory() -> None:
    """Let glibc keep what is freed: to give pages back and take them again costs time in every step."""
    if not sys.platform.startswith("linux"):
        return
    try:
        c = ctypes.CDLL("libc.so.6")
        c.mallopt(_MMAP_THRESHOLD, 1 << 30)
        c.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        return  # another C library


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As malloc.h numbers them."""
