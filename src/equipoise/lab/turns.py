"""Step times of many configs, taken in turns in one process, so that noise meets all alike.

Runs of a grid share a machine with one another and with whatever else there is: their times on the
clock do not compare. Shapes: N rounds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.corpus import load_corpus
from equipoise.lab.folder import RunFolder, environment, write_text
from equipoise.lab.processes import Processes
from equipoise.lab.results import identity
from equipoise.lab.run import Run

ROUNDS, WARM_UP = 9, 2


@dataclass(frozen=True)
class Turns:
    """Seconds of a step of each config in each round: processor time, on a GPU on the clock."""

    environment: dict[str, Any]
    seconds: dict[str, list[float]]
    """By the identity of the config, [N]."""

    @classmethod
    def read(cls, path: Path) -> Turns:
        """The file's; none where there is no file. EquipoiseError for something else."""
        if not path.exists():
            return cls({}, {})
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise EquipoiseError(f"{path} holds no step times ({error}): remove it.") from error

    def of(self, config: Config) -> NDArray[np.float64] | None:
        """Seconds of a config, [N], if it was measured. The seed does not matter."""
        found = self.seconds.get(_key(config))
        return None if found is None else np.array(found)

    def ratio(self, config: Config, base: Config) -> tuple[float, float] | None:
        """Median over rounds of a config's time over that of `base`; half the middle spread."""
        mine, theirs = self.of(config), self.of(base)
        if mine is None or theirs is None:
            return None
        ratios_N = mine / theirs
        low, high = np.quantile(ratios_N, (0.25, 0.75))
        return float(np.median(ratios_N)), float(high - low) / 2


def _key(config: Config) -> str:
    return identity(config.change({"seed": 0}))


def measure(
    configs: Sequence[Config], path: Path, say: Callable[[str], None] = lambda _: None
) -> Turns:
    """Time the configs that `path` lacks, with all others, and keep the times there.

    Times of one file are of the same rounds: with a config that is new all are taken again. Those of
    several processes are left out: they wait for one another.
    """
    kept = Turns.read(path)
    distinct = {_key(c): c.change({"seed": 0}) for c in configs if c.processes == 1}
    if distinct.keys() <= kept.seconds.keys():
        return kept
    say(f"Timing {len(distinct)} configs in turns, {ROUNDS + WARM_UP} rounds of a step each.")
    seconds: dict[str, list[float]] = {key: [] for key in distinct}
    with TemporaryDirectory() as folder:
        runs = {key: _begun(config, Path(folder) / key) for key, config in distinct.items()}
        keys = list(runs)
        for turn in range(-WARM_UP, ROUNDS):
            shift = turn % len(keys)
            for key in keys[shift:] + keys[:shift]:
                took = _timed(runs[key])
                if turn >= 0:
                    seconds[key].append(took)
        for run in runs.values():
            run.close()
    found = Turns(environment(), seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"environment": found.environment, "seconds": seconds}) + "\n")
    return found


def _begun(config: Config, folder: Path) -> Run:
    run = Run(config, RunFolder(folder), Processes(config))
    run.begin(load_corpus(config.data))
    run.model.train()
    return run


def _timed(run: Run) -> float:
    """Seconds of the next step."""
    on_gpu = run.processes.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    begin = clock()
    run.advance()  # ends with counts on the CPU: nothing is under way on a GPU after it
    return clock() - begin
