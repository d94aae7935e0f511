"""Starts what tests run in two processes, as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from equipoise.lab.launch import leave as end

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 20_000
"""Letters of what failed processes said: both tracebacks, and the launcher's report behind them."""


def leave() -> None:
    """The end of such a process, after the last that the two do together."""
    with suppress(RuntimeError):  # the other may be gone as soon as it has what it waited for
        dist.barrier()
    end()


def torchrun(*worker: str | Path, seconds: int = 300) -> None:
    """Run a script, or -m and a module, with its arguments in two processes that both have to end well.

    Where one does not, what it said is shown; of one that was aborted, the stacks of its threads.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2"),
            *map(str, worker),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": "1",
        },
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-SHOWN:]
