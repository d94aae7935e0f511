"""Starts the two processes of the parallel settings, and loads what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.balance.conformance import settings

ROOT = Path(__file__).resolve().parents[3]


def two_processes(folder: Path, name: str = "") -> list[dict[str, Any]]:
    """What two processes found, rank by rank: gradients and biases.

    Of every method in the parallel setting of this name, or of the tests' methods in each of them.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = ["--nproc-per-node", "2", "-m", "tests.balance.conformance.worker", str(folder)]
    worker += [name] if name else []
    done = subprocess.run(
        [*command, *worker],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
        },
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.serialization.safe_globals([settings.Outcome]):
        return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
