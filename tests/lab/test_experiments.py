"""Experiments as a user runs them, on made-up text and models of a few hundred weights."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import EquipoiseError
from equipoise.lab import Config, load_corpus, pages
from equipoise.lab.experiments import EXPERIMENTS, collapse
from equipoise.lab.experiments.base import Experiment, seeded
from equipoise.lab.folder import RunFolder
from equipoise.lab.grid import Grid, check_terms, missing
from equipoise.lab.recipes import reading
from equipoise.lab.results import Result, folder_of, identity
from equipoise.lab.trainer import train
from tests.lab.made_up import SMALL, write_text
from tests.signals import heed_ctrl_c

GRIDS = [name for name, experiment in EXPERIMENTS.items() if experiment.measure is None]
PAGES = Path(__file__).parents[2] / "docs" / "lab"
TINY = {**SMALL, "model.experts": 16, "data.domains": "", "tokens": 8 * 16 * 22}


def shrunk(experiment: Experiment, config: Config, tier: str = "cpu") -> list[Config]:
    """An experiment's configs at a size of seconds: balance, router and arrangement kept."""
    small = {k: v for k, v in TINY.items() if k != "micro_rows"}
    small |= {"data.source": config.data.source, "data.cache": config.data.cache}
    found = []
    for asked in experiment.configs(tier, 1):
        rows = {"micro_rows": min(asked.micro_rows, 8), "model.top_k": min(asked.model.top_k, 2)}
        found.append(asked.change({**small, **rows, "model.shared_experts": 0, "processes": 1}))
    return found


@pytest.mark.parametrize("tier", pages.TIERS)
@pytest.mark.parametrize("name", GRIDS)
def test_no_two_runs_of_an_experiment_are_the_same(name: str, tier: str) -> None:
    configs = EXPERIMENTS[name].configs(tier, 2)
    assert len({identity(config) for config in configs}) == len(configs)
    assert len({(config.name, config.seed) for config in configs}) == len(configs)
    assert {config.seed for config in configs} >= {0, 1}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_here_is_what_the_runs_here_tell(name: str) -> None:
    experiment = EXPERIMENTS[name]
    configs = experiment.configs("cpu", 1) if name in GRIDS else []
    page = pages.page_of(experiment, configs, PAGES, "cpu")
    assert page.markdown == (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert all((PAGES / figure).exists() for figure in page.figures)


@pytest.mark.parametrize("name", GRIDS)
def test_the_runs_here_were_of_todays_terms(name: str) -> None:
    configs = EXPERIMENTS[name].configs("cpu", 1)
    kept = [Result.find(PAGES / "runs", config) for config in configs]
    assert all(result is None or "balance" in result.environment for result in kept)
    check_terms(configs, PAGES / "runs")


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        *((name, "cpu") for name in GRIDS),
        *(pytest.param(name, "gpu", marks=pytest.mark.slow) for name in GRIDS),
    ],
)
def test_an_experiment_becomes_a_page_with_its_figures(
    name: str, tier: str, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    experiment = EXPERIMENTS[name]
    configs = shrunk(experiment, configure(), tier)
    for config in configs[:3]:
        train(config, folder_of(tmp_path / "runs", config), save=False)
    for config in configs[:3]:  # whichever run is the only one, as when a grid is stopped
        pages.write_page(experiment, [config], tmp_path, tier)
    other = configs[0].change({"seed": 1})
    copy = folder_of(tmp_path / "runs", other)
    shutil.copytree(folder_of(tmp_path / "runs", configs[0]), copy)
    (copy / "config.json").write_text(other.to_json())
    alone = pages.write_page(experiment, [other], tmp_path, tier, 2).read_text()
    asked = f"equipoise lab {name}{' --tier gpu' * (tier == 'gpu')} --seeds 2"
    assert f"`{asked}`: 1 of 1 runs" in alone
    path = pages.write_page(experiment, configs, tmp_path, tier)
    text = path.read_text()
    assert all(f"| {config.name}" in text for config in configs[:3])
    assert f"| {configs[-1].name}" not in text
    assert "What may not be concluded" in text
    for part in text.split("](")[1:]:
        assert (tmp_path / part.partition(")")[0]).exists()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    pages.write_page(experiment, configs, tmp_path, tier)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == before
    taken = {
        "environment": Result(configs[0], folder_of(tmp_path / "runs", configs[0])).environment,
        "seconds": {identity(config): [1.0, 2.0] for config in configs[:3]},
    }
    pages.turns_of(tmp_path / "runs", experiment, tier).write_text(json.dumps(taken))
    timed = pages.write_page(experiment, configs, tmp_path, tier).read_text()
    assert ("Step times: " in timed) == experiment.timed
    if name != "recipe":  # whose base is not among the first three
        assert ("1.00 ± 0.00" in timed) == experiment.timed


@pytest.mark.slow
def test_a_grid_runs_what_is_missing_and_tells_what_failed(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    good = [configure(name="one"), configure(name="two", balance="sign(rate=0.01)")]
    Grid(good[:1], tmp_path, 1).run()
    before = (folder_of(tmp_path, good[0]) / "result.json").stat().st_mtime_ns
    wrong = configure(name="wrong", optimizer__lr=1e30, optimizer__clip=0)
    said: list[str] = []
    with pytest.raises(EquipoiseError, match=r"1 of 2 runs failed; the first, wrong: .*step"):
        Grid([*good, wrong], tmp_path, 2, said.append).run()
    assert missing([*good, wrong], tmp_path) == [wrong]
    assert (folder_of(tmp_path, good[0]) / "result.json").stat().st_mtime_ns == before
    assert any("1 finished before" in line for line in said)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_grid_starts_the_processes_of_a_run_which_add_up_what_one_would_count(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    two = configure(
        name="two", balance="switch(scope=group, weight=0.1)", processes=2, micro_rows=2
    )
    one = configure(name="one", balance="switch(scope=micro, weight=0.1)", micro_rows=4)
    Grid([two, one], tmp_path, 2).run()
    ours, theirs = (Result(config, folder_of(tmp_path, config)) for config in (two, one))
    assert [run.summary["processes"] for run in (ours, theirs)] == [2, 1]
    for column in ("loss", "gradient_norm", "max_vio"):
        assert ours.column(column) == pytest.approx(theirs.column(column), rel=1e-4)
    apart = configure(name="apart", balance="switch(scope=micro, weight=0.1)", micro_rows=2)
    Grid([apart], tmp_path, 1).run()
    other = Result(apart, folder_of(tmp_path, apart)).column("gradient_norm")
    assert ours.column("gradient_norm") != pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_two_processes_that_fails_fails_once(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    wrong = configure(
        name="wrong", optimizer__lr=1e30, optimizer__clip=0, processes=2, micro_rows=2
    )
    said: list[str] = []
    with pytest.raises(EquipoiseError, match=r"1 of 1 runs failed; the first, wrong: .*step"):
        Grid([wrong], tmp_path, 1, said.append).run()
    assert sum("FAILED" in line for line in said) == 1


def _fail_in_the_first(text: str, folder: str, news: Any) -> None:
    """A run of several processes whose first one fails when a step is made, by itself."""
    from equipoise.lab import grid, trainer

    def fail(_: Any) -> None:
        raise RuntimeError("out of memory")

    train = trainer.train
    trainer.train = lambda *args, **options: train(*args, **{**options, "progress": fail})
    grid.work(1, text, folder, news)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_other_processes_of_a_run_end_with_a_first_one_that_fails(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    """They wait for it in the next step, where they hear no signal."""
    config = configure(tokens=8 * 16 * 100_000, processes=2, micro_rows=2)
    load_corpus(config.data)
    context = mp.get_context("spawn")
    news = context.Queue()
    first = context.Process(
        target=_fail_in_the_first, args=(config.to_json(), str(tmp_path / "run"), news)
    )
    first.start()
    assert news.get(timeout=120) == (1, "failed", "RuntimeError: out of memory")
    first.join(60)
    assert first.exitcode == 0


GRID = """
import sys
from pathlib import Path
from equipoise.lab import Config
from equipoise.lab.grid import Grid

if __name__ == "__main__":
    pool, *configs = map(Path, sys.argv[1:])
    configs = [Config.from_json(path.read_text()) for path in configs]
    Grid(configs, pool, len(configs), lambda text: print(text, flush=True)).run()
"""


def start_grid(folder: Path, pool: Path, *configs: Config) -> subprocess.Popen[str]:
    """A process of its own, whose pipe its runs hold, too."""
    (folder / "grid.py").write_text(GRID)
    paths = [folder / f"config-{number}.json" for number, _ in enumerate(configs)]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(config.to_json())
    return subprocess.Popen(
        [sys.executable, "grid.py", str(pool), *map(str, paths)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_grid_goes_on_to_the_run_of_an_unbroken_one(
    tmp_path: Path, configure: Callable[..., Config], number: signal.Signals
) -> None:
    """Killed, it leaves a run behind that sees it, saves and stops."""
    config = configure(tokens=8 * 16 * 300, balance="sign(rate=0.01)", checkpoint_seconds=0)
    pool = tmp_path / "stopped"
    stopped = start_grid(tmp_path, pool, config)
    while not list(pool.glob("*/checkpoint-*")) and stopped.poll() is None:
        time.sleep(0.02)
    stopped.send_signal(number)
    said = stopped.communicate(timeout=120)[1]  # ends when its run does, which holds the pipe too
    assert missing([config], pool) == [config]
    assert len(list(pool.glob("*/checkpoint-*.pt"))) == 1
    assert said.count("Traceback") <= 1  # of the script itself, none of its run
    again = start_grid(tmp_path, pool, config)
    again.communicate(timeout=300)
    assert again.returncode == 0
    train(config, folder_of(tmp_path / "whole", config), save=False)
    found, whole = (Result.find(p, config) for p in (pool, tmp_path / "whole"))
    assert found is not None
    assert whole is not None
    assert (found.counts == whole.counts).all()
    assert (found.column("loss") == whole.column("loss")).all()


@pytest.mark.slow
def test_a_grid_that_is_told_twice_leaves_no_run_behind(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    long = configure(tokens=8 * 16 * 100_000, checkpoint_seconds=0, trace=False)
    configs = [long.change({"name": f"run {seed}", "seed": seed}) for seed in (0, 1)]
    pool = tmp_path / "pool"
    grid = start_grid(tmp_path, pool, *configs)
    while len(list(pool.glob("*/checkpoint-*.pt"))) < 2 and grid.poll() is None:
        time.sleep(0.02)
    grid.send_signal(signal.SIGINT)
    time.sleep(0.1)
    grid.send_signal(signal.SIGINT)
    grid.communicate(timeout=60)  # ends when its runs do
    assert missing(configs, pool) == configs


def grid_whose_run_begins(folder: Path, config: Config) -> subprocess.Popen[str]:
    """A grid of one run in folder/pool, that has just started it."""
    load_corpus(config.data)
    grid = start_grid(folder, folder / "pool", config)
    assert grid.stdout is not None
    while "begins" not in (line := grid.stdout.readline()):
        assert line, "the grid ended"
    return grid


@pytest.mark.slow
def test_a_run_whose_grid_is_killed_before_it_begins_does_not_begin(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    grid = grid_whose_run_begins(tmp_path, configure(trace=False))
    grid.kill()  # while its run imports torch
    grid.communicate(timeout=60)
    assert not (tmp_path / "pool").exists()


@pytest.mark.slow
def test_ctrl_c_while_a_run_begins_is_the_grid_s(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure(trace=False)
    grid = grid_whose_run_begins(tmp_path, config)
    os.killpg(grid.pid, signal.SIGINT)  # as a terminal does, while the run imports torch
    said = grid.communicate(timeout=60)[1]
    assert said.count("Traceback") == 1  # of the script, which catches nothing
    assert "spawn_main" not in said
    assert missing([config], tmp_path / "pool") == [config]


def test_a_page_is_written_where_its_steps_are_not_timed_to_the_end(
    tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(trace=False)
    experiment = replace(EXPERIMENTS["remedies"], configs=lambda tier, seeds: [config])
    monkeypatch.setitem(EXPERIMENTS, "remedies", experiment)
    train(config, folder_of(tmp_path / "runs", config), save=False)
    monkeypatch.setattr(pages, "measure", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        pages.run_experiment("remedies", tmp_path, workers=1)
    assert f"| {config.name}" in (tmp_path / "remedies.md").read_text()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_page_that_cannot_be_written_does_not_hide_why_the_grid_failed(
    tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [configure(trace=False), configure(name="wrong", optimizer__lr=1e30, trace=False)]
    experiment = replace(EXPERIMENTS["remedies"], configs=lambda tier, seeds: configs)
    monkeypatch.setitem(EXPERIMENTS, "remedies", experiment)
    folder = folder_of(tmp_path / "runs", configs[0])
    train(configs[0], folder, save=False)
    (folder / "metrics.parquet").unlink()

    def fail(grid: Grid) -> None:
        raise EquipoiseError("1 of 2 runs failed; the first, wrong")

    monkeypatch.setattr(Grid, "run", fail)
    said: list[str] = []
    with pytest.raises(EquipoiseError, match="1 of 2 runs failed"):
        pages.run_experiment("remedies", tmp_path, workers=1, say=said.append)
    assert said[-1].startswith(f"The page is not written: {folder} is no whole run")


@pytest.mark.slow
def test_a_run_that_is_stopped_by_itself_does_not_hold_the_grid(
    tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ends by a signal and saves, one is killed."""
    configs = [
        configure(name=name, tokens=8 * 16 * 3000, checkpoint_seconds=0, seed=seed)
        for seed, name in enumerate(("stopped", "killed"))
    ]
    grid, listened = Grid(configs, tmp_path, 2), Grid._listen
    signals = [signal.SIGTERM, signal.SIGKILL]

    def listen(grid: Grid, news: Any, jobs: Any) -> None:
        if signals and len({file.parent for file in tmp_path.glob("*/checkpoint-*.pt")}) == 2:
            for job in jobs.values():
                os.kill(job.process.pid, signals.pop(0))
        listened(grid, news, jobs)

    monkeypatch.setattr(Grid, "_listen", listen)
    with pytest.raises(EquipoiseError, match="2 of 2 runs failed"):
        grid.run()
    assert missing(configs, tmp_path) == configs
    assert any("the same command goes on" in line for line in grid.failures)
    assert any("ended with -9" in line for line in grid.failures)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.parquet", None),
        ("metrics.parquet", "PAR1"),
        ("evaluations.json", "[]"),
        ("evaluations.json", '[{"step": 1'),
        ("result.json", "{}"),
        ("environment.json", ""),
    ],
)
def test_a_page_names_the_run_folder_that_is_damaged(
    tmp_path: Path, configure: Callable[..., Config], file: str, content: str | None
) -> None:
    config = configure()
    folder = folder_of(tmp_path / "runs", config)
    train(config, folder, save=False)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(EquipoiseError, match=rf"{folder.name}.*[Rr]emove it"):
        pages.write_page(EXPERIMENTS["scope"], [config], tmp_path, "cpu")


def test_a_run_of_older_defaults_is_not_taken_for_one_of_today_s(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure(trace=False)
    folder = folder_of(tmp_path, config)
    train(config, folder, save=False)
    text = (folder / "config.json").read_text()
    assert '"norm_eps": 1e-05' in text
    (folder / "config.json").write_text(text.replace('"norm_eps": 1e-05', '"norm_eps": 1e-06'))
    with pytest.raises(EquipoiseError, match=r"model.norm_eps=1e-06, not 1e-05.*remove it"):
        Grid([config], tmp_path, 1).run()


def test_other_text_is_taken_with_all_its_domains(tmp_path: Path) -> None:
    config = EXPERIMENTS["collapse"].configs("cpu", 1)[0]
    write_text(tmp_path / "other")
    assert reading(config, str(tmp_path / "other")).data.domains == ()
    for name in config.data.domains:
        (tmp_path / "same" / name).mkdir(parents=True)
    assert reading(config, str(tmp_path / "same")).data.domains == config.data.domains


def test_the_gpu_tier_is_refused_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EquipoiseError, match="needs a GPU, and torch sees none: use --tier cpu"):
        pages.run_experiment("scope", tmp_path, tier="gpu")
    assert not list(tmp_path.iterdir())


def test_finished_runs_of_another_text_are_refused(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure()
    train(config, folder_of(tmp_path / "runs", config), save=False)
    write_text(tmp_path / "other", seed=1)
    other = config.change({"data.source": str(tmp_path / "other")})
    said: list[str] = []
    with pytest.raises(EquipoiseError, match=r"1 finished runs .* another text than .*other"):
        Grid([other, other.change({"seed": 1})], tmp_path / "runs", 1, said.append).run()
    assert said == ["2 runs, 1 finished before."]  # no text is tokenized before it is refused
    Grid([config], tmp_path / "runs", 1).run()
    gone = config.change({"data.source": str(tmp_path / "gone")})
    Grid([gone], tmp_path / "runs", 1).run()  # nothing to run, no text to compare
    named = config.change({"data.source": "owner/other_text"})
    with pytest.raises(EquipoiseError, match="another text than owner/other_text holds"):
        Grid([named], tmp_path / "runs", 1).run()


@pytest.mark.parametrize("balance", ["recommended", "quantile"])
@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_terms_with_other_defaults_are_refused(
    balance: str, finished: bool, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure(balance=balance, model__router="sigmoid")
    folder = folder_of(tmp_path, config)
    train(config, folder, save=False)
    Grid([config], tmp_path, 1).run()
    environment = RunFolder(folder).read("environment.json")
    environment["balance"][0]["controller"]["ema"] = 0.5
    RunFolder(folder).write("environment.json", environment)
    if not finished:
        (folder / "result.json").unlink()
    with pytest.raises(
        EquipoiseError, match=rf"balance={balance} stood .*controller.\w+.ema: 0.5 before, 0.0 now"
    ):
        Grid([config], tmp_path, 1).run()


def test_what_an_experiment_does_not_take_is_refused_before_any_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.cli.lab import lab

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an experiment runs")

    monkeypatch.setattr(pages, "run_experiment", never)
    with pytest.raises(EquipoiseError, match="'cost' trains nothing: leave out --seeds"):
        lab(["collapse", "cost"], seeds=5, out=tmp_path)


def test_shares_of_starved_cells_that_one_seed_does_not_tell_apart_are_said_to_be_as_many() -> None:
    assert collapse._reproduced(0.72) == "about as many as in that figure"
    assert collapse._reproduced(0.69) == "fewer than in that figure"
    ends = {"no balancing": 0.08, "near": 0.12, "far": 0.14, "none": 0.0}
    said = collapse._conditions(ends)
    assert "More: far." in said
    assert "Fewer: none." in said
    assert "About as many: near." in said


def test_equal_configs_run_once(tmp_path: Path, configure: Callable[..., Config]) -> None:
    twice = [configure(name="here"), configure(name="there"), configure(seed=1)]
    assert [config.seed for config in missing(twice, tmp_path)] == [0, 1]


def test_seeds_come_one_after_the_other(configure: Callable[..., Config]) -> None:
    found = seeded([configure(name="a"), configure(name="b")], 2)
    assert [(c.name, c.seed) for c in found] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_redraw_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match="no finished run of 'scope'"):
        pages.run_experiment("scope", tmp_path, redraw=True)
    assert not list(tmp_path.iterdir())


def test_the_overview_counts_what_is_finished(
    tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [configure(), configure(balance="sign(rate=0.01)")]
    train(configs[1], folder_of(tmp_path / "runs", configs[1]), save=False)
    scope = replace(EXPERIMENTS["scope"], configs=lambda *_: configs)
    monkeypatch.setitem(EXPERIMENTS, "scope", scope)
    lines = {line.split()[0]: line for line in pages.overview(tmp_path)}
    assert list(lines) == list(EXPERIMENTS)
    assert lines["scope"].endswith("2 runs, 1 finished")
    assert lines["frontier"].endswith("runs, 0 finished")
    assert lines["cost"].endswith("not measured")
    assert max(map(len, lines.values())) <= 80
    other = configure(data__domains=("klingon",))
    monkeypatch.setitem(EXPERIMENTS, "scope", replace(scope, configs=lambda *_: [other]))
    train(other.change({"data.domains": ()}), folder_of(tmp_path / "runs", configs[0]), save=False)
    elsewhere = {line.split()[0]: line for line in pages.overview(tmp_path, data=other.data.source)}
    assert elsewhere["scope"].endswith("1 runs, 1 finished")


def test_an_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(EquipoiseError, match="Did you mean 'collapse'"):
        pages.find("colapse")


def test_a_result_is_what_the_run_measured(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure(evaluate_every=3)
    train(config, folder_of(tmp_path, config), save=False)
    result = Result.find(tmp_path, config)
    assert result is not None
    model = config.model
    assert result.counts.shape == (config.steps, model.layers, model.experts)
    assert (result.counts.sum(-1) == config.step_tokens * model.top_k).all()
    assert [step for step, _ in result.evaluations] == [3, 6]
    assert result.final.loss == result.summary["loss"]
    assert len(result.max_vio_batch) == config.steps
