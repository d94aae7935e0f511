"""An experiment run as a whole: its grid, then its page in Markdown with figures beside it."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from equipoise.errors import EquipoiseError, counted, nearest
from equipoise.lab.config import Config
from equipoise.lab.experiments import EXPERIMENTS
from equipoise.lab.experiments.base import Experiment, Page, Results
from equipoise.lab.folder import write_text
from equipoise.lab.grid import Grid, interrupted_by
from equipoise.lab.launch import cores
from equipoise.lab.recipes import reading
from equipoise.lab.results import Result
from equipoise.lab.turns import Turns, measure

Say = Callable[[str], None]
TIERS = ("cpu", "gpu")


def find(name: str) -> Experiment:
    """An experiment by name; EquipoiseError where there is none."""
    if name not in EXPERIMENTS:
        raise EquipoiseError(
            f"No experiment {name!r}: there are {', '.join(EXPERIMENTS)}.{nearest(name, EXPERIMENTS)}"
        )
    return EXPERIMENTS[name]


def check(
    name: str,
    *,
    tier: str = "cpu",
    seeds: int = 1,
    workers: int | None = None,
    data: str | None = None,
    redraw: bool = False,
) -> Experiment:
    """The experiment, where it can be run so; EquipoiseError, before any work, where not."""
    experiment = find(name)
    _check_tier(tier)
    trains = experiment.measure is None
    if not trains and (seeds != 1 or data is not None or workers is not None):
        raise EquipoiseError(f"{name!r} trains nothing: leave out --seeds, --data and --workers.")
    if trains and tier == "gpu" and not redraw and not torch.cuda.is_available():
        raise EquipoiseError("--tier gpu needs a GPU, and torch sees none: use --tier cpu.")
    return experiment


def run_experiment(
    name: str,
    out: str | Path = "docs/lab",
    *,
    tier: str = "cpu",
    seeds: int = 1,
    workers: int | None = None,
    redraw: bool = False,
    data: str | None = None,
    say: Say = lambda _: None,
) -> Path:
    """Run what is missing of an experiment's grid in `out`/runs, and write `out`/<name>.md.

    redraw: run nothing; make the page from the runs that are there. data: another place of the text, or
    other text by domain, of which all domains are taken. workers: runs at a time; one for each core, or
    on a GPU one. An experiment that measures rather than trains takes neither seeds nor data, nor
    workers.
    Raises EquipoiseError for an unknown experiment or tier, for tier gpu without a GPU, and for a
    redraw without runs.
    """
    experiment = check(name, tier=tier, seeds=seeds, workers=workers, data=data, redraw=redraw)
    pool = Path(out) / "runs"
    if experiment.measure is not None:
        if not redraw:
            experiment.measure(pool, tier, say)
        return write_page(experiment, [], Path(out), tier)
    configs = _configs(experiment, tier, seeds, data)
    if redraw:
        if not _finished(configs, pool):
            raise EquipoiseError(
                f"{pool} holds no finished run of {name!r} for tier {tier} and seeds={seeds}: run it "
                "without --redraw first."
            )
        return write_page(experiment, configs, Path(out), tier, seeds)
    try:
        with interrupted_by(signal.SIGTERM):
            Grid(configs, pool, workers or (1 if tier == "gpu" else cores()), say).run()
            if experiment.timed:
                measure(configs, turns_of(pool, experiment, tier), say)
    except BaseException:  # stopped or failed, whatever the reason
        if _finished(configs, pool):  # the page tells of those that are there
            try:
                write_page(experiment, configs, Path(out), tier, seeds)
            except EquipoiseError as error:
                say(f"The page is not written: {error}")
        raise
    return write_page(experiment, configs, Path(out), tier, seeds)


def overview(
    out: str | Path = "docs/lab", *, tier: str = "cpu", seeds: int = 1, data: str | None = None
) -> Iterator[str]:
    """A line for each experiment: its name, title and runs, with how many of them `out` holds.

    data: as `run_experiment` takes it.
    """
    pool = Path(out) / "runs"
    _check_tier(tier)
    for name, experiment in EXPERIMENTS.items():
        if experiment.measure is not None:
            there = (pool / f"{page_name(experiment, tier)}.json").exists()
            state = "measured" if there else "not measured"
        else:
            configs = _configs(experiment, tier, seeds, data)
            done = sum(Result.find(pool, config) is not None for config in configs)
            state = f"{len(configs)} runs, {done} finished"
        yield f"{name:10} {experiment.title:45} {state}"


def _configs(experiment: Experiment, tier: str, seeds: int, data: str | None) -> list[Config]:
    configs = experiment.configs(tier, seeds)
    return configs if data is None else [reading(config, data) for config in configs]


def _check_tier(tier: str) -> None:
    if tier not in TIERS:
        raise EquipoiseError(f"tier={tier!r} is not one of {', '.join(TIERS)}.")


def page_name(experiment: Experiment, tier: str) -> str:
    """The name of an experiment's page."""
    return experiment.name if tier == "cpu" else f"{experiment.name}-{tier}"


def turns_of(pool: Path, experiment: Experiment, tier: str) -> Path:
    """The file of an experiment's step times."""
    return pool / f"{page_name(experiment, tier)}-times.json"


def _finished(configs: Sequence[Config], pool: Path) -> bool:
    """Whether at least one run is."""
    return any(Result.find(pool, config) is not None for config in configs)


def write_page(
    experiment: Experiment, configs: Sequence[Config], out: Path, tier: str, seeds: int = 1
) -> Path:
    """The page of an experiment from the runs that are finished; `seeds` were asked for."""
    page = page_of(experiment, configs, out, tier, seeds)
    for file, draw in page.figures.items():
        draw(out / file)
    path = out / f"{page.name}.md"
    write_text(path, page.markdown)
    return path


def page_of(
    experiment: Experiment, configs: Sequence[Config], out: Path, tier: str, seeds: int = 1
) -> Page:
    """The page, not yet written, nor its figures drawn."""
    by_name: dict[str, list[Result]] = {}
    for config in configs:
        result = Result.find(out / "runs", config)
        if result is not None:
            result.check()
            by_name.setdefault(config.name, []).append(result)
    name = page_name(experiment, tier)
    page = Page(name, out / "runs", Turns.read(turns_of(out / "runs", experiment, tier)))
    page.blocks.append(f"# {experiment.title}")
    page.text(experiment.claim)
    if experiment.measure is None:
        _setup(page, experiment, configs, by_name, tier, seeds)
    experiment.write(page, by_name)
    page.heading("What may not be concluded")
    page.bullets(*experiment.limits)
    if experiment.measure is None:
        _runs(page, by_name)
    return page


def _setup(
    page: Page,
    experiment: Experiment,
    configs: Sequence[Config],
    results: Results,
    tier: str,
    seeds: int,
) -> None:
    found = [result for runs in results.values() for result in runs]
    first = found[0]
    model, data = first.config.model, first.config.data
    size = first.summary["parameters"]
    environments = [e for r in found for e in r.environments]
    machines = Counter(machine for r in found for machine in _machines(r))
    commits = sorted({str(e["commit"]) for e in environments})
    command = " ".join(
        [
            f"equipoise lab {experiment.name}",
            *([] if tier == "cpu" else [f"--tier {tier}"]),
            *([] if seeds == 1 else [f"--seeds {seeds}"]),
        ]
    )
    page.heading("What was run")
    page.text(
        f"`{command}`: {len(found)} of {len(configs)} runs finished, "
        f"{counted(len({r.seed for r in found}), 'seed')}. Unless a row says otherwise: "
        f"{model.layers} layers ({model.dense_layers} dense), width {model.hidden_size}, "
        f"{model.experts} experts"
        + (f" and {model.shared_experts} shared" if model.shared_experts else "")
        + f", top-{model.top_k}, router `{model.router}`, weights drawn with deviation {model.init_std:g}, "
        f"{size['total'] / 1e6:.1f} M parameters, {size['active'] / 1e6:.1f} M "
        f"of them active; {first.summary['tokens'] / 1e6:.1f} M tokens in steps of "
        f"{first.config.step_tokens:,}, rows of {data.row_length}, {len(first.final.domains)} domains "
        f"({', '.join(first.final.domains)}); evaluated on {first.final.tokens.sum() / 1e6:.1f} M "
        "tokens held out. Runs of one seed see the same rows in the same steps; those whose models "
        "have the same shape and are drawn alike begin with the same weights."
    )
    page.text(
        """Chance, behind a MaxVio, takes every token for itself. Tokens of one document are alike, and
        some domains' held-out text is of few documents: other text of the same domains would give
        other figures, for which there is no interval here."""
    )
    page.text(
        "Machine: "
        + "; ".join(f"{m} ({n} runs)" for m, n in machines.items())
        + ". Commits: "
        + ", ".join(commits)
        + " (each run's in its environment.json; +: with changes that were not committed)"
        + ". Torch "
        + ", ".join(sorted({e["versions"]["torch"] for e in environments}))
        + "."
    )
    texts = {r.environment["tokens"] for r in found}
    if len(texts) > 1:
        page.text(
            f"**These runs are of {len(texts)} different texts**, and do not compare: see the `tokens` of "
            "each run's environment.json."
        )


def _machines(result: Result) -> set[str]:
    """All that a run was trained on."""
    threads = result.config.threads
    said = f"{threads} thread{'s' if threads > 1 else ''} a run"
    return {e["gpu"] or f"{e['processor']}, {said}" for e in result.environments}


def _runs(page: Page, results: Results) -> None:
    page.heading("Runs")
    page.text(
        "Their figures are in `runs/`, one folder each; `--redraw` makes this page from them."
    )
    rows = [
        (name, r.seed, f"`{r.config.balance}`", f"`{r.path.name}`",
         f"{r.summary['seconds'] / 60:.0f} min")
        for name, runs in results.items() for r in runs
    ]  # fmt: skip
    page.table(("run", "seed", "balance", "folder", "training"), rows)
