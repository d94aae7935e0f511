"""What an experiment is: its runs, and the page made from their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.lab import figures
from equipoise.lab.config import Config
from equipoise.lab.folder import machine_of
from equipoise.lab.results import Result, mean_interval, smooth
from equipoise.lab.turns import Turns

Results = Mapping[str, Sequence[Result]]
"""Finished runs by the name of their config, one for each seed."""
Draw = Callable[[Path], None]
Measure = Callable[[Path, str, Callable[[str], None]], None]
"""Of the folder of runs, a tier, and what to tell of progress."""


@dataclass
class Page:
    """An experiment's page under way: Markdown blocks, and figures to draw beside it."""

    name: str
    runs: Path = Path()
    """The folder of runs, for experiments that keep a file of their own there."""
    turns: Turns = field(default_factory=lambda: Turns({}, {}))
    """Step times of the runs' configs, if they were taken."""
    blocks: list[str] = field(default_factory=list)
    figures: dict[str, Draw] = field(default_factory=dict)

    @property
    def markdown(self) -> str:
        """The whole page."""
        return "\n\n".join(self.blocks) + "\n"

    def text(self, *paragraphs: str) -> None:
        """Paragraphs."""
        self.blocks += [" ".join(p.split()) for p in paragraphs]

    def heading(self, title: str) -> None:
        """A heading of the second level."""
        self.blocks.append(f"## {title}")

    def bullets(self, *items: str) -> None:
        """A list."""
        self.blocks.append("\n".join(f"- {' '.join(item.split())}" for item in items))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers come as texts. Columns of dashes alone, not measured, are left out."""
        kept = [n for n, _ in enumerate(head) if any(str(row[n]) != "–" for row in rows)]
        head, rows = [head[n] for n in kept], [[row[n] for n in kept] for row in rows]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        self.blocks.append("\n".join(lines))

    def step_time(self, run: Result, base: Sequence[Result] | None) -> str:
        """A step's time over that of `base`, both in turns; a dash where one was not timed."""
        found = self.turns.ratio(run.config, base[0].config) if base else None
        return "–" if found is None else f"{found[0]:.2f} ± {found[1]:.2f}"

    def step_times(self, base: str) -> None:
        """What the column of step times says; nothing where none were taken."""
        if self.turns.seconds:
            made = self.turns.environment
            time = "time" if made["gpu"] else "processor time"
            self.text(
                f"""Step times: {time} of a run's first steps over that of {base}, all taken in
                turns; median, and half the range of the middle half of the rounds, which is no interval.
                Taken at commit {made["commit"]} ({machine_of(made)})."""
            )

    def figure(self, name: str, caption: str, draw: Draw) -> None:
        """A figure, drawn to <page>-<name>.svg."""
        file = f"{self.name}-{name}.svg"
        self.figures[file] = draw
        caption = " ".join(caption.split())
        self.blocks.append(f"![{caption}]({file})\n\n*{caption}*")


@dataclass(frozen=True)
class Experiment:
    """Runs of a tier, and how their results are told."""

    name: str
    title: str
    claim: str
    """What was published, with its source."""
    configs: Callable[[str, int], list[Config]]
    """Of a tier and a number of seeds."""
    write: Callable[[Page, Results], None]
    """The page between its claim and what may not be concluded."""
    limits: tuple[str, ...]
    """What may not be concluded."""
    measure: Measure | None = None
    """What is done in place of training runs: its points go to <page>.json in the folder of runs."""
    timed: bool = True
    """The page tells step times: they are taken in turns when the grid is done."""


def draw_load(
    panels: Mapping[str, Mapping[str, Result]], path: Path, *, window: int, width: float = 8.0
) -> None:
    """MaxVio_batch over training, mean of `window` steps: a panel for each title, a line a run."""
    figure, axes = figures.panels(len(panels), width=width, height=4.2)
    names = [name for runs in panels.values() for name in runs]
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        curves = {n: (r.tokens / 1e6, smooth(r.max_vio_batch, window)) for n, r in runs.items()}
        floor = next(iter(runs.values())).step_floor
        figures.lines(
            axis, curves, title=title, x="million tokens", y="MaxVio_batch",
            floor=floor, log=True, names=names,
        )  # fmt: skip
    figures.legend(figure, axes)
    figures.save(figure, path)


def seeded(configs: Sequence[Config], seeds: int) -> list[Config]:
    """Every config with seeds 0, 1, ...: seed by seed, so that a stopped grid has whole seeds."""
    return [config.change({"seed": seed}) for seed in range(seeds) for config in configs]


def first_seed(results: Results) -> dict[str, Result]:
    """The run of seed 0, of the names that have one."""
    return {name: run for name, runs in results.items() for run in runs if run.seed == 0}


def average(values: Sequence[float], digits: int = 2) -> str:
    """Mean, with its 95 % interval where there is one; a dash for what is not there."""
    mean, half = mean_interval(values)
    return number(mean, digits) + spread(half, digits)


def spread(half: float, digits: int = 3) -> str:
    """Half an interval, to stand behind a mean; nothing for one value's."""
    return "" if half != half else f" ± {half:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """Of a difference; +0.000 for all that rounds to it."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def number(value: float, digits: int = 2) -> str:
    """For a table; a dash for what is not there."""
    return "–" if value != value else f"{value:.{digits}f}"
