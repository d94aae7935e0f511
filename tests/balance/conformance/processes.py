"""Starts the two processes of the parallel settings, and loads what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.balance.conformance import settings
from tests.torchrun import torchrun


def two_processes(folder: Path, name: str = "") -> list[dict[str, Any]]:
    """What two processes found, rank by rank: gradients and biases.

    Of every method in the parallel setting of this name, or of the tests' methods in each of them.
    """
    worker = ("-m", "tests.balance.conformance.worker", folder, *([name] if name else []))
    torchrun(*worker, seconds=600)
    with torch.serialization.safe_globals([settings.Outcome]):
        return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
