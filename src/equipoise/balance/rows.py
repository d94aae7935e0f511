"""The token rows of a pass: which sequence each belongs to, and random draws of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.balance.passes import Record
from equipoise.balance.scopes import Scope
from equipoise.balance.scopes import Sequence as SequenceScope
from equipoise.errors import EquipoiseError


class Rows:
    """What a book knows of the rows of the batch under way."""

    scopes: list[Scope]
    group: Any
    ranks: int
    device: torch.device
    segments: Tensor | None = None
    """The sequence of each token, as handle.batch() told."""
    packed: Tensor | None = None
    """The sequence of each token of a packed batch [B, S], from its position ids."""
    batch_rows: int | None = None
    """Rows of the batch that the model was called with."""

    def __init__(self) -> None:
        self.generators: dict[int, torch.Generator] = {}

    @property
    def _needs_segments(self) -> bool:
        return any(isinstance(scope, SequenceScope) for scope in self.scopes)

    def _segments(self, record: Record) -> tuple[Tensor, int]:
        """The sequence of each token row, as told, else the rows of the batch."""
        rows = len(record.ids_TK)
        told = self.segments if self.segments is not None else self.packed
        if told is not None and told.numel() == rows:
            flat = told.reshape(-1).to(record.ids_TK.device)
            return flat, int(flat.max()) + 1 if rows else 0
        batch = self.batch_rows or 1
        if rows % batch:
            raise EquipoiseError(
                f'scope="sequence": {rows} token rows do not divide into the {batch} rows of the '
                "batch. Say which sequence each token belongs to: handle.batch(segment_ids=...)."
            )
        width = max(rows // batch, 1)
        return torch.arange(rows, device=record.ids_TK.device) // width, batch

    def subset(self, rows: int, valid_T: Tensor | None, seed: int) -> Tensor:
        """Indices of random valid token rows, one in `ranks`, drawn without replacement."""
        among = torch.arange(rows) if valid_T is None else valid_T.nonzero()[:, 0].cpu()
        order = torch.randperm(len(among), generator=self.generator(seed))
        return among[order[: -(-len(among) // self.ranks)]].to(self.device)

    def generator(self, seed: int) -> torch.Generator:
        """The random numbers of this rank for a seed."""
        if seed not in self.generators:
            rank = dist.get_rank(self.group) if self.group is not None else 0
            self.generators[seed] = torch.Generator().manual_seed(seed * 1_000_003 + rank)
        return self.generators[seed]
