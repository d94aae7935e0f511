"""Which of several processes this one is, and whose tokens it sees."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from equipoise.errors import EquipoiseError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    """The lowest rank that sees the same tokens."""
    run: str = ""

    @property
    def leads(self) -> bool:
        """This rank's rows are the ones that count; others only check them."""
        return self.rank == self.data_rank


def find_ranks(model: nn.Module, data_rank: int | None) -> Ranks:
    """From torch.distributed, else from the environment that torchrun sets; no communication.

    Ranks of one tensor-parallel group see the same tokens: transformers gives the group's size as
    `model.tp_size`, and its groups are of neighbouring ranks.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if data_rank is None:
        size = int(getattr(model, "tp_size", None) or 1)
        data_rank = rank // size * size
    if not 0 <= data_rank <= rank:
        raise EquipoiseError(
            f"data_rank is {data_rank} on rank {rank}: it is the lowest rank that sees the same"
            f" tokens, so 0 to {rank}."
        )
    run = os.environ.get("TORCHELASTIC_RUN_ID", "") if world_size > 1 else ""
    return Ranks(rank, world_size, data_rank, run)
