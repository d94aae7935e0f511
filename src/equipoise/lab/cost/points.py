"""Points of the cost experiment in one file: sizes of each profile, and its times in rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.cost.imposed import counts_of
from equipoise.lab.folder import environment, machine_of, write_text
from equipoise.metrics import load

DEVICES = 2


@dataclass(frozen=True)
class Sizes:
    """What a step of a profile takes, on each process."""

    peak_bytes: list[int]
    """The largest moment of a few steps, above what is held between steps."""
    sent_bytes: list[list[int]]
    """By the experts' all-to-alls: to each process, from each process."""
    largest_bytes: list[int]
    """The largest message of one all-to-all, from each process."""
    held_bytes: list[int]
    """Weights and optimizer state."""


@dataclass
class Points:
    """What is measured so far."""

    config: dict[str, Any]
    device: str
    profiles: dict[str, list[float]]
    environment: dict[str, Any]
    commits: list[str]
    load_averages: list[float] = field(default_factory=list)
    """Of the machine before each start: processes that wanted to run."""
    sizes: dict[str, Sizes] = field(default_factory=dict)
    rounds: list[dict[str, list[list[float]]]] = field(default_factory=list)
    """Seconds of each timed step by profile: of the slower process; then processor time of each."""

    @classmethod
    def read(cls, path: Path) -> Points:
        """The file's; EquipoiseError where there is none, or something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            sizes = {name: Sizes(**size) for name, size in values.pop("sizes").items()}
            return cls(sizes=sizes, **values)
        except FileNotFoundError as error:
            raise EquipoiseError(f"{path} is not there: run it without --redraw first.") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise EquipoiseError(
                f"{path} holds no points ({error}): remove it, and measure anew."
            ) from error

    @classmethod
    def begin(
        cls, path: Path, config: Config, device: str, profiles: Mapping[str, tuple[float, ...]]
    ) -> Points:
        """The file's points to go on from, or none yet.

        Raises EquipoiseError for points of another setting or machine, whose times do not go with
        those that would be measured now.
        """
        made = environment()
        ratios = {name: list(ratios_E) for name, ratios_E in profiles.items()}
        settings = json.loads(config.to_json())
        new = cls(settings, device, ratios, made, [str(made["commit"])])
        if not path.exists():
            return new
        kept = cls.read(path)
        for name in ("config", "device", "profiles"):
            if getattr(kept, name) != getattr(new, name):
                raise EquipoiseError(
                    f"{path} holds points of another {name}: remove it to measure anew, or choose "
                    "another folder with --out."
                )
        if machine_of(kept.environment) != machine_of(made):
            raise EquipoiseError(
                f"{path} holds times of {machine_of(kept.environment)}, and this is {machine_of(made)}: "
                "remove it to measure anew, or choose another folder with --out."
            )
        kept.commits = sorted({*kept.commits, *new.commits})
        return kept

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def settings(self) -> Config:
        """The model, and the tokens of a step."""
        return Config.from_json(json.dumps(self.config))

    def counts(self, profile: str) -> NDArray[np.int64]:
        """Selections of each expert in one layer of a step, of all processes, [E]."""
        config = self.settings
        tokens = config.micro_rows * config.data.row_length
        return DEVICES * counts_of(self.profiles[profile], tokens, config.model.top_k)

    def max_vio(self, profile: str) -> float:
        """Of the experts."""
        return float(load.max_vio(self.counts(profile)))

    def seconds(self, profile: str) -> NDArray[np.float64]:
        """Median step of each round, [R]."""
        return np.array([np.median(turns[profile], axis=0)[0] for turns in self.rounds])

    def worked(self, profile: str) -> NDArray[np.float64]:
        """Median processor time of each process and round, [R, P]."""
        return np.array([np.median(turns[profile], axis=0)[1:] for turns in self.rounds])
