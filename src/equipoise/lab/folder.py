"""A run's folder: its config, what it measured, its weights, and what a stopped run goes on from.

| file | holds |
|---|---|
| `config.json` | every setting |
| `environment.json` | versions, commit, machine, digest of the tokens, terms; `later`: others that went on |
| `metrics.parquet` | a row per optimizer step: loss, rate, time, gradient norm, counts [L x E] |
| `evaluations.json` | losses and counts by domain, for each evaluation |
| `result.json` | written last: what the run came to |
| `checkpoint-<step>-<rank>of<ranks>.pt` | while it is not finished |
| `run.lock` | while a process trains it |
| `model/`, `weights.safetensors` | for transformers; where no architecture of its fits, for this package |
| `trace/` | routing of the last evaluation |
| `figures/` | loss and load over training |
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import EquipoiseError, counted
from equipoise.lab.config import Config, differences
from equipoise.lab.saving import replacing
from equipoise.lab.spelt import changed
from equipoise.lock import Lock

LOCK = "run.lock"
OWN = (
    "checkpoint-*", "metrics.parquet", "evaluations.json", "result.json", "weights.safetensors",
    "model", "trace", "figures", "tensorboard", "wandb", "environment.json", "config.json",
)  # fmt: skip
"""What `--force` removes, in this order: a folder is known for a run's by the last two."""
SECTIONS = {"model", "data", "optimizer", "balance"}
"""Of a run's `config.json`."""
MEASURED = ("max_vio", "max_vio_floor", "experts_per_token")
"""Numbers of a result that a model without selections has not."""
LABELS = ("name", "checkpoint_seconds", "threads", "data.cache", "data.source")
"""Settings that may differ between a run and its resumption: they change no number of it, but for
the rounding of sums under another number of threads. The text itself is compared by its digest."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        """The run came to its end."""
        return (self.path / "result.json").exists()

    def hold(self) -> Lock:
        """Keep other processes out of the folder, which is made; HeldError where one is in it."""
        self._refuse_a_file()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return Lock(self.path / LOCK, self.path)
        except OSError as error:
            raise EquipoiseError(f"{self.path} cannot be written ({error}).") from error

    def _refuse_a_file(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise EquipoiseError(f"{self.path} is a file; choose a folder with --out.")

    def check(self, config: Config, *, force: bool = False) -> None:
        """Raise EquipoiseError where the folder holds something else, or a run of other settings.

        force: a run of other settings may be there; what is no run's may not.
        """
        self._refuse_a_file()
        if not self._of_a_run:
            if self.path.exists() and any(file.name != LOCK for file in self.path.iterdir()):
                raise EquipoiseError(
                    f"{self.path} is not empty and is no run's folder; choose another with --out."
                )
            return
        if force:
            return
        other = differences(config, self.config())
        told = {key: values for key, values in other.items() if key not in LABELS}
        if told:
            key, (ours, theirs) = next(iter(told.items()))
            more = f", and {counted(len(told) - 1, 'more setting')}" if len(told) > 1 else ""
            raise EquipoiseError(
                f"{self.path} holds a run with {key}={theirs}, not {ours}{more}: choose another "
                "folder with --out, or --force to begin anew here."
            )

    def _check_text(self, digest: str) -> None:
        before = self.read("environment.json")["tokens"] if self._described else digest
        if before != digest:
            raise EquipoiseError(
                f"{self.path} was begun on other text ({before}) than is there now ({digest}): "
                "choose another folder with --out, or --force to begin anew here."
            )

    def other_terms(self, terms: Any) -> str:
        """What the setting of balance stood for when the run was begun, if not for these, `spelt`."""
        before = self.read("environment.json").get("balance") if self._described else None
        return "" if before is None else changed(before, terms)

    def _check_terms(self, terms: Any) -> None:
        if other := self.other_terms(terms):
            raise EquipoiseError(
                f"{self.path} was begun where its setting of balance stood for something else ({other}): "
                "choose another folder with --out, or --force to begin anew here."
            )

    def begin(self, config: Config, digest: str, *, terms: Any = (), force: bool = False) -> None:
        """Begin in the folder held, or find that it is of this same run; EquipoiseError where not.

        terms: what the setting of balance stands for, `spelt`. force: throw away the run that is there.
        """
        self.check(config, force=force)
        if force:
            self._remove()
        self._check_text(digest)
        self._check_terms(terms)
        if not (self.path / "config.json").exists():
            write_text(self.path / "config.json", config.to_json())
        here = environment()
        if not self._described:
            self.write("environment.json", {**here, "tokens": digest, "balance": list(terms)})
        elif not self.finished:
            self._went_on(here)

    def _went_on(self, here: dict[str, Any]) -> None:
        """Note another commit, machine or version that goes on with the run."""
        first = self.read("environment.json")
        later = first.pop("later", [])
        kept = {name: first.pop(name) for name in ("tokens", "balance") if name in first}
        here = json.loads(json.dumps(here))
        if here not in (first, *later):
            later.append(here)
            self.write("environment.json", {**first, **kept, "later": later})

    @property
    def _of_a_run(self) -> bool:
        """Other folders have a config.json, too: transformers' for one."""
        return "tokens" in self._keys("environment.json") or self._keys("config.json") >= SECTIONS

    def _keys(self, name: str) -> set[str]:
        """Of a JSON file; none where there is no such file, or another."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return set()
        return set(found) if isinstance(found, dict) else set()

    @property
    def _described(self) -> bool:
        return (self.path / "environment.json").exists()

    def _remove(self) -> None:
        """The run's own files; what else is there stays."""
        try:
            for name in OWN:
                for file in (*self.path.glob(name), *self.path.glob(f"{name}.tmp")):
                    if file.is_dir() and not file.is_symlink():
                        shutil.rmtree(file)
                    else:
                        file.unlink()
        except OSError as error:
            raise EquipoiseError(f"{self.path} cannot be cleared ({error}).") from error

    def config(self) -> Config:
        """The settings of the run that is there."""
        file = self.path / "config.json"
        if not file.exists():
            raise EquipoiseError(f"{self.path} is no run's folder: it has no config.json.")
        with self.readable(file):
            return Config.from_json(file.read_text(encoding="utf-8"))

    def write(self, name: str, values: Any) -> None:
        """A JSON file, whole or not at all; numbers that are none become null."""
        write_text(self.path / name, json.dumps(without_nan(values), indent=1, allow_nan=False))

    def read(self, name: str) -> Any:
        """A JSON file."""
        file = self.path / name
        with self.readable(file):
            return json.loads(file.read_text(encoding="utf-8"))

    def result(self) -> dict[str, Any]:
        """What the run came to; NaN where it has no load to measure."""
        found = dict(self.read("result.json"))
        return {**found, **{name: math.nan for name in MEASURED if found.get(name) is None}}

    @contextmanager
    def readable(self, file: Path) -> Iterator[None]:
        """Turns what a damaged file raises into one line."""
        try:
            yield
        except EquipoiseError:
            raise
        except Exception as error:  # torch, pyarrow and json have errors of their own
            raise EquipoiseError(
                f"{file} cannot be read ({type(error).__name__}: {error}): the folder is damaged. "
                "Remove it, or begin anew there with --force."
            ) from error

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """`metrics.parquet`, whole or not at all; what a row lacks is null."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        with replacing(self.path / "metrics.parquet") as unfinished:
            pq.write_table(table, unfinished, compression="zstd")

    def metrics(self) -> Any:
        """A table with a row per optimizer step."""
        import pyarrow.parquet as pq

        file = self.path / "metrics.parquet"
        with self.readable(file):
            return pq.read_table(file)

    def save_checkpoint(self, state: Mapping[str, Any], rank: int = 0, ranks: int = 1) -> None:
        """What one process goes on from, after step `state["step"]`; earlier ones stay."""
        file = self.path / f"checkpoint-{state['step']:08d}-{rank}of{ranks}.pt"
        with replacing(file) as unfinished:
            torch.save(state, unfinished)

    def keep_checkpoint(self, step: int, rank: int = 0, ranks: int = 1) -> None:
        """Remove a process's checkpoints of other steps, once all processes have that of `step`."""
        for file in self.path.glob(f"checkpoint-*-{rank}of{ranks}.*"):
            if file.name != f"checkpoint-{step:08d}-{rank}of{ranks}.pt":
                file.unlink()

    def load_checkpoint(self, rank: int = 0, ranks: int = 1) -> Any | None:
        """The last checkpoint that all `ranks` processes have, that of `rank`; or None.

        Raises EquipoiseError where the run was begun with another number of processes.
        """
        found: dict[tuple[int, str], int] = {}
        for file in self.path.glob("checkpoint-*of*.pt"):
            _, step, place = file.stem.split("-")
            key = int(place.split("of")[1]), step
            found[key] = found.get(key, 0) + 1
        whole = {key for key, files in found.items() if files == key[0]}
        if not whole:
            return None
        steps = [step for begun, step in whole if begun == ranks]
        if not steps:
            raise EquipoiseError(
                f"{self.path} was begun with {min(whole)[0]} processes, and this is {ranks}: start "
                "it with as many."
            )
        file = self.path / f"checkpoint-{max(steps)}-{rank}of{ranks}.pt"
        with self.readable(file):
            return torch.load(file, map_location="cpu", weights_only=False)

    def remove_checkpoints(self) -> None:
        """The run is finished."""
        for file in self.path.glob("checkpoint-*"):
            file.unlink()


def without_nan(value: Any) -> Any:
    """For strict JSON: what cannot be measured, such as a load without selections, is null."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


MACHINE = ("processor", "gpu", "cpus")


def machine_of(environment: Mapping[str, Any]) -> str:
    """What times depend on, beside the code."""
    parts = [f"{name} {environment[name]}" for name in MACHINE if environment.get(name)]
    return ", ".join([*parts, f"torch {environment['versions']['torch']}"])


def environment() -> dict[str, Any]:
    """Versions, commit and machine."""
    from equipoise.capture.provenance import provenance

    return {
        **provenance(),
        "commit": commit(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The commit of the package's own checkout, "+" where it was changed since; None outside one."""
    if not _git("ls-files", Path(__file__).name):  # installed into somebody's environment
        return None
    return _git("describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
