"""`equipoise train` as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from equipoise.cli import main
from equipoise.cli.train import _idle_cores
from equipoise.errors import EquipoiseError
from equipoise.lab import RECIPES, load, recipe
from equipoise.lab.folder import RunFolder
from tests.lab.made_up import SMALL, write_text


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("train")
    write_text(folder / "text")
    places = {"data.source": str(folder / "text"), "data.cache": str(folder / "cache")}
    values = {**SMALL, **places, "data.domains": ""}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["equipoise", "train", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return call


def test_recipes_are_listed_with_what_they_are(run: Any) -> None:
    code, out, _ = run("--list")
    assert code == 0
    told = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in told] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in told)
    assert all(len(line) < 80 for line in out.splitlines())


def test_settings_are_shown_as_they_are_set(run: Any) -> None:
    set_values = ["--set", "model.router=sigmoid", "--set", "data.domains=python,chinese"]
    code, out, _ = run("small", *set_values, "--show")
    assert code == 0
    shown = out.splitlines()
    assert {"model.router=sigmoid", "data.domains=python,chinese", "model.top_k=2"} <= {*shown}
    changed = recipe("small", {"model.router": "sigmoid", "data.domains": ("python", "chinese")})
    assert recipe("tiny", dict(line.split("=", 1) for line in shown)) == changed
    assert run("smal", "--show").err.startswith("equipoise: No recipe 'smal'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Which recipe? There are tiny"),
        (["smal"], "Did you mean 'small'?"),
        (["tiny", "--set", "tokens"], "--set 'tokens': write key=value"),
        (["tiny", "--set", "=3"], "--set '=3': write key=value"),
        (["tiny", "--set", "model.expert=3"], "Did you mean 'model.experts'?"),
        (["tiny", "--set", "model.top_k=99"], "model.top_k=99 is more than model.experts=16"),
        (
            ["tiny", "--set", "data.source=owner/no", "--out", "x"],
            "data.source='owner/no' is no file",
        ),
    ],
)
def test_mistakes_are_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(*arguments)
    assert code == 2
    assert said in err
    assert out == ""
    assert not list(tmp_path.glob("x*"))


def test_a_run_ends_with_its_losses_what_it_wrote_and_the_next_command(
    run: Any, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("tiny", *settings, "--set", "balance=switch(weight=0.01)")
    assert code == 0, err
    for name in ("abc", "digits", "greek", "Mean loss", "chance alone"):
        assert name in out
    assert "6 of 6 steps, loss " in err
    assert "MaxVio" in err
    last = err.strip().splitlines()[-3:]
    assert last[0].startswith("Wrote runs/tiny (")
    assert "(Ernie4_5_Moe)" in last[0]
    assert last[1] == "Next: equipoise stats runs/tiny/trace"
    assert last[2] == "  or: equipoise trace runs/tiny/model --task text --data TEXT"
    code, out, err = run("tiny", *settings, "--set", "balance=switch(weight=0.01)")
    assert code == 0
    assert "runs/tiny is finished: nothing to do." in err
    assert "Mean loss" in out


@pytest.mark.parametrize(
    ("cores", "threads", "said"),
    [
        (2, 1, "Cores in use: 1 of 2. --processes 2 shares each step out over 2."),
        (3, 1, "Cores in use: 1 of 3. --processes 2 shares each step out over 2."),
        (9, 2, "Cores in use: 2 of 9. --processes 4 shares each step out over 8."),
        (2, 2, ""),
        (1, 1, ""),
    ],
)
def test_cores_left_idle_are_told_of_with_as_many_processes_as_share_four_micro_batches(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, said: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = recipe("small", {"batch_rows": 64, "micro_rows": 16, "threads": threads})
    assert _idle_cores(config) == said


def test_a_run_that_has_begun_is_not_told_to_take_other_processes(
    run: Any, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ("--out", tmp_path / "a", "--quiet")
    assert "--processes 2 " in run("tiny", *settings, *out).err
    assert "--processes" not in run("tiny", *settings, *out).err


def test_json_is_the_result_alone(run: Any, settings: list[str], tmp_path: Path) -> None:
    values = ["--set", "model.router=soft", "--set", "data.vocab_size=299"]
    code, out, err = run("tiny", *settings, *values, "--out", tmp_path / "a", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert found["steps"] == 6
    assert found["max_vio"] is None
    assert found["evaluation"]["domains"] == ["abc", "digits", "greek"]
    assert "of 6 steps" not in err


def test_another_config_needs_force(run: Any, settings: list[str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "a", "--quiet")
    assert run("tiny", *settings, *out).code == 0
    code, _, err = run("tiny", *settings, "--set", "seed=1", *out)
    assert code == 2
    assert "holds a run with seed=0, not 1" in err
    assert run("tiny", *settings, "--set", "seed=1", "--force", *out).code == 0
    assert RunFolder(tmp_path / "a").config().seed == 1


def test_tensorboard_gets_every_step(run: Any, settings: list[str], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, _, err = run("tiny", *settings, "--out", tmp_path / "a", "--tensorboard")
    assert code == 0, err
    read = accumulator.EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    read.Reload()
    losses = [event.value for event in read.Scalars("train/loss")]
    kept = RunFolder(tmp_path / "a").metrics()["loss"].to_pylist()
    assert losses == pytest.approx(kept)
    assert "train/max_vio" in read.Tags()["scalars"]


class FakeWandb:
    """Stands for the package: the options of each run, what was logged, how many were finished."""

    run = None

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.opened.append(options)
        return self

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    import importlib.util

    find, fake = importlib.util.find_spec, FakeWandb()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n if n == "wandb" else find(n))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_offline_and_is_asked_for_before_the_run(
    run: Any,
    settings: list[str],
    tmp_path: Path,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda _: None)
        code, _, err = run("tiny", *settings, "--out", tmp_path / "a", "--wandb")
    assert code == 2
    assert "--wandb needs: pip install 'equipoise[wandb]'" in err
    code, _, err = run("tiny", *settings, "--out", tmp_path / "a", "--wandb")
    assert code == 0, err
    assert len(wandb.logged) == 6
    assert wandb.opened[0]["name"] == "tiny"
    assert wandb.opened[0]["config"]["model.router"] == recipe("tiny").model.router
    assert wandb.opened[0]["mode"] == "offline"
    assert wandb.finished == 1


def test_a_run_folder_goes_by_one_id_at_wandb(
    tmp_path: Path,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from equipoise.cli.loggers import _wandb

    def opened(folder: str, mode: str) -> dict[str, Any]:
        monkeypatch.setenv("WANDB_MODE", mode)
        _wandb(tmp_path / folder, recipe("tiny"))
        return wandb.opened[-1]

    first, again, other = opened("a", "online"), opened("a", "online"), opened("b", "online")
    assert first["resume"] == again["resume"] == "allow"
    assert first["id"] == again["id"] != other["id"]
    offline = opened("c", "offline")
    assert not capsys.readouterr().err
    assert opened("c", "offline")["group"] == offline["group"]
    assert offline.keys().isdisjoint({"id", "resume"})  # W&B cannot go on with an offline run
    assert f"a run of their own, of group {offline['group']}." in capsys.readouterr().err


def test_both_stretches_of_a_stopped_run_are_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from equipoise.cli.loggers import _wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        sink, finish = _wandb(tmp_path, recipe("tiny"))
        sink({"train/loss": 1.0}, step)
        finish()
    wandb.teardown()  # as at a process's end: the service that writes may be behind
    kept = [folder.name for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in kept}) == 2
    for name in kept:
        (records,) = (tmp_path / "wandb" / name).glob("*.wandb")
        assert b"train/loss" in records.read_bytes()


# -- stopped ----------------------------------------------------------------------------------


def start(settings: list[str], out: Path, *before: str) -> subprocess.Popen[str]:
    values = ["--set", "checkpoint_seconds=0", "--set", f"tokens={60 * 128}"]
    command = [sys.executable, *before, "-m", "equipoise", "train", "tiny", *settings, *values]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run = start(settings, out)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    return out


def wait_for_checkpoint(out: Path) -> None:
    for _ in range(6000):
        if len(list(out.glob("checkpoint-*.pt"))) > 0:
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, signal.SIGINT, signal.SIGTERM],
    ids=["kill -9", "Ctrl-C", "kill"],
)
def test_a_run_that_is_stopped_and_run_again_ends_as_one_that_was_not(
    settings: list[str], whole: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "run"
    run = start(settings, out)
    wait_for_checkpoint(out)
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    assert run.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130), said
    assert not RunFolder(out).finished
    if how is not signal.SIGKILL:
        assert "the same command goes on from it" in said
    again = start(settings, out)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "Going on after step " in said
    ours, theirs = load(out).state_dict(), load(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert RunFolder(out).metrics()["loss"].equals(RunFolder(whole).metrics()["loss"])


@pytest.mark.slow
@pytest.mark.distributed
def test_of_two_processes_one_talks(settings: list[str], tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    few = [*settings, "--set", "seed=3"]
    run = start(few, tmp_path / "run", *torchrun)
    out, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert out.count("Mean loss") == 1
    assert said.count("Wrote ") == 1
    assert said.count("of 60 steps") >= 1
    refused = start([*few, "--set", "seed=4"], tmp_path / "run", *torchrun)
    _, said = refused.communicate(timeout=300)
    assert refused.returncode != 0
    ours = [line for line in said.splitlines() if line.startswith("equipoise: ")]
    assert len(ours) == 1
    assert "holds a run with seed=3, not 4" in ours[0]


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_shows_the_error_of_a_run_before_and_at_the_end_of_its_own_report(
    settings: list[str], tmp_path: Path
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    refused = start([*settings, "--set", "model.top_k=99"], tmp_path / "run", *torchrun)
    _, said = refused.communicate(timeout=300)
    assert refused.returncode != 0
    message = "equipoise: model.top_k=99 is more than model.experts=4."
    before, _, report = said.partition("Traceback")
    assert before.splitlines().count(message) == 1
    assert report.strip().splitlines()[-2].strip() == f"traceback : {message}"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_by_an_option_stop_go_on_and_end_as_one_command(
    settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    both = [*settings, "--processes", "2"]
    run = start(both, out)
    wait_for_checkpoint(out)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130, said
    assert said.count("the same command goes on from it") == 1
    assert "Traceback" not in said
    again = start(both, out)
    told, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "Going on after step " in said
    assert told.count("Mean loss") == 1
    assert RunFolder(out).result()["processes"] == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_of_processes_by_an_option_an_error_is_one_line(
    settings: list[str], tmp_path: Path
) -> None:
    wrong = [*settings, "--processes", "2", "--set", "data.domains=klingon"]
    run = start(wrong, tmp_path / "run")
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2, said
    (line,) = said.strip().splitlines()[1:]
    assert line.startswith("equipoise: data.domains names 'klingon'")


@pytest.mark.parametrize(
    ("processes", "world", "said"),
    [
        (0, None, "processes=0; it has to be from 1 to 1024"),
        (3, None, "batch_rows=64 cannot be shared out over 3 processes"),
        (2, "1", "processes=2, and started were 1"),
    ],
)
def test_processes_that_cannot_be_are_refused_before_any_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int, world: str | None, said: str
) -> None:
    from equipoise.cli.train import train

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(EquipoiseError, match=re.escape(said)):
        train("small", processes=processes, out=tmp_path)
