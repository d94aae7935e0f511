"""Start a command in several processes here: as torchrun does it, without its reports."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from typing import NoReturn

from equipoise.errors import EquipoiseError


def cores() -> int:
    """Of the machine, those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch(command: Sequence[str], processes: int) -> None:
    """Run a command in so many processes, and end as it ends: SystemExit where one of them fails.

    They find each other by torchrun's variables (RANK, WORLD_SIZE, ...). Ctrl-C and SIGTERM are handed
    on to them. Raises EquipoiseError where one was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each takes the threads of its config
    # An evaluation under way is ended before a stopped run saves; a second Ctrl-C does not wait for it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds, then SIGKILL
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise EquipoiseError(
                f"process {rank} of {processes} was ended by "
                f"{signal.Signals(-failure.exitcode).name}: out of memory, if nobody did it. The same "
                "command goes on from the last checkpoint."
            ) from None
        raise SystemExit(failure.exitcode) from None


def leave(code: int = 0) -> NoReturn:
    """End a process of several, at once, when all it had to do and to say is done.

    Threads of gloo may still want the interpreter when it is taken down, and that aborts the process
    ("terminate called without an active exception", torch 2.13): a run that is finished would have failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def meetings(processes: int) -> list[dict[str, str]]:
    """For each of several processes on this machine, the variables by which torchrun lets them meet."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(found.getsockname()[1])}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    common = {**place, **sizes, "OMP_NUM_THREADS": "1"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
