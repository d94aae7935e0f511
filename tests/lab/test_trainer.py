"""Training: what stops a run, and what it goes on from."""

from __future__ import annotations

import errno
import json
import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise.balance import Loss
from equipoise.errors import EquipoiseError
from equipoise.lab import Config, load, train
from equipoise.lab.corpus import load_corpus
from equipoise.lab.evaluate import evaluate
from equipoise.lab.experiments import frontier
from equipoise.lab.folder import RunFolder
from equipoise.lab.routers import BLOCKS
from equipoise.lab.trainer import Progress, Run
from equipoise.lab.weights import OUTSIDE, rebuilt
from equipoise.lock import HeldError

Configure = Callable[..., Config]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = load(one).state_dict(), load(other).state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def figures(folder: Path) -> Any:
    """All columns but the time."""
    return RunFolder(folder).metrics().drop_columns(["seconds"])


def stopped_at(step: int) -> Callable[[Progress], None]:
    """Ctrl-C in the middle of a run."""

    def progress(now: Progress) -> None:
        if now.step == step:
            signal.raise_signal(signal.SIGINT)

    return progress


METHODS = {
    "nothing": {},
    "sign": {"balance": "switch(weight=0.01) + sign(rate=0.01)", "model__router": "sigmoid"},
    "quantile": {"balance": "quantile_histogram", "model__router": "sigmoid"},
    "muon": {"balance": "sign(rate=0.01)", "optimizer__name": "muon"},
    "noise": {"model__router": "softmax(noise=learned, jitter=0.1)"},
    "capacity": {"model__capacity": "capacity(factor=1.0, recent=0.5)"},
    "exact": {"balance": "switch(scope=exact, weight=0.1) + switch(scope=running(decay=0.9))"},
    "relu": {"model__router": "relu"},
    "thresholds": {"model__router": "expert_threshold"},
    "random": {"model__router": "random", "evaluate_every": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_and_resumed_ends_with_the_weights_of_an_unbroken_one(
    configure: Configure, tmp_path: Path, method: str
) -> None:
    config = configure(trace=False, **METHODS[method])
    same_as_unbroken(config, tmp_path, stop=3)


def test_a_run_stopped_where_it_evaluates_keeps_the_evaluation(
    configure: Configure, tmp_path: Path
) -> None:
    same_as_unbroken(configure(trace=False, evaluate_every=2), tmp_path, stop=4)
    kept = RunFolder(tmp_path / "stopped").read("evaluations.json")
    assert [entry["step"] for entry in kept] == [2, 4, 6]


def same_as_unbroken(config: Config, tmp_path: Path, stop: int) -> None:
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", progress=stopped_at(stop))
    assert not (tmp_path / "stopped" / "result.json").exists()
    said: list[str] = []
    train(config, tmp_path / "stopped", say=said.append)
    assert f"Going on after step {stop} of 6." in said
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert figures(tmp_path / "whole").equals(figures(tmp_path / "stopped"))
    before, after = (RunFolder(tmp_path / n).read("evaluations.json") for n in ("whole", "stopped"))
    assert before == after
    assert not list((tmp_path / "stopped").glob("checkpoint*"))


def test_a_run_goes_on_from_its_last_checkpoint_only(configure: Configure, tmp_path: Path) -> None:
    """What happened after it is done again, not twice."""
    config = configure(trace=False, checkpoint_seconds=0)

    def dies(now: Progress) -> None:
        if now.step == 4:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(config, tmp_path / "a", progress=dies)
    assert [p.name for p in (tmp_path / "a").glob("checkpoint*")] == ["checkpoint-00000003-0of1.pt"]
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert figures(tmp_path / "a")["step"].to_pylist() == [1, 2, 3, 4, 5, 6]


def test_evaluating_on_the_way_changes_nothing(configure: Configure, tmp_path: Path) -> None:
    noisy = {"model__router": "random", "trace": False}
    train(configure(**noisy), tmp_path / "a")
    train(configure(**noisy, evaluate_every=1), tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    steps = [entry["step"] for entry in RunFolder(tmp_path / "b").read("evaluations.json")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_as_it_is(configure: Configure, tmp_path: Path) -> None:
    result = train(configure(), tmp_path / "a")
    said: list[str] = []
    again = train(configure(), tmp_path / "a", say=said.append)
    assert again == result
    assert said[-1].endswith("is finished: nothing to do.")


def test_two_processes_do_not_train_in_one_folder(configure: Configure, tmp_path: Path) -> None:
    config = configure(trace=False)
    said: list[str] = []

    def second(now: Progress) -> None:
        for force in (False, True):
            with pytest.raises(HeldError, match=r"another process \(pid \d+\)") as refused:
                train(config, tmp_path / "a", force=force)
            said.append(str(refused.value))

    train(config, tmp_path / "a", progress=second)
    assert len(said) == 12
    assert not (tmp_path / "a" / "run.lock").exists()
    train(config, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_where_a_run_went_on_is_noted(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(trace=False)
    for step, commit in ((2, "one"), (4, "one"), (5, "two"), (None, "three")):
        monkeypatch.setattr("equipoise.lab.folder.commit", lambda commit=commit: commit)
        if step is None:
            train(config, tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path, progress=stopped_at(step))
    train(config, tmp_path)  # finished: nothing was done by this one
    first = RunFolder(tmp_path).read("environment.json")
    assert [first["commit"], *(later["commit"] for later in first["later"])] == [
        "one",
        "two",
        "three",
    ]
    assert "tokens" in first


# -- stops ------------------------------------------------------------------------------------


def poisoned(name: str, step: int) -> Callable[[Any], None]:
    """NaN in a weight of the run before a step."""
    from equipoise.lab import trainer

    taken = trainer.Run.advance

    def step_of(run: Any) -> None:
        if run.step == step:
            with torch.no_grad():
                run.plain.get_parameter(name).view(-1)[0] = torch.nan
        taken(run)

    return step_of


def test_a_loss_of_nan_stops_the_run_names_the_weight_and_keeps_the_checkpoint(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.lab import trainer

    config = configure(checkpoint_seconds=0, balance="switch + sign")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "advance", poisoned("blocks.1.mlp.gate.weight", 4))
        with pytest.raises(EquipoiseError) as stop:
            train(config, tmp_path / "a")
    assert "step 5: the loss is nan; the weight blocks.1.mlp.gate.weight is not finite" in str(
        stop.value
    )
    assert "its last checkpoint is of step 4" in str(stop.value)
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_an_output_that_overflows_names_its_layer(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.lab import trainer

    taken = trainer.Run.advance

    def step(run: Any) -> None:
        if run.step == 2:
            with torch.no_grad():
                run.plain.blocks[1].mlp.experts.inner_proj.fill_(1e25)
        taken(run)

    monkeypatch.setattr(trainer.Run, "advance", step)
    with pytest.raises(EquipoiseError, match=r"blocks\.1\.mlp\.experts \(Experts\) went first"):
        train(configure(), tmp_path / "a")


def test_weights_that_are_not_finite_are_never_saved(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.lab import trainer

    after = trainer.Run._evaluate_on_the_way

    def broken(run: Any) -> None:
        if run.step == 3:
            with torch.no_grad():
                run.plain.norm.weight[0] = torch.inf
        after(run)

    monkeypatch.setattr(trainer.Run, "_evaluate_on_the_way", broken)
    with pytest.raises(EquipoiseError, match=r"step 3: the weight norm\.weight is not finite"):
        train(configure(checkpoint_seconds=0), tmp_path / "a")
    assert RunFolder(tmp_path / "a").load_checkpoint()["step"] == 2


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "weights", "result"])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import pyarrow.parquet
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    places: dict[str, tuple[Any, str]] = {
        "checkpoint": (torch, "save"),
        "metrics": (pyarrow.parquet, "write_table"),
        "weights": (safetensors.torch, "save_file"),
    }
    config = configure(trace=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "a", progress=stopped_at(2))
    with monkeypatch.context() as patch:
        if what == "result":
            written = RunFolder.write
            fill = partial(_full_at_result, written, at=tmp_path)
            patch.setattr(RunFolder, "write", lambda folder, n, v: fill(folder, n, v))
        else:
            patch.setattr(*places[what], full)
        with pytest.raises(EquipoiseError, match=r"cannot be written .*make room and run the same"):
            train(config, tmp_path / "a")
    assert RunFolder(tmp_path / "a").load_checkpoint()["step"] in (2, 6)
    assert not list((tmp_path / "a").glob("*.tmp"))
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint(
    configure: Configure, tmp_path: Path
) -> None:
    """For real, by the system's limit on the size of a file, which fails as a full disk does."""
    resource = pytest.importorskip("resource")
    config = configure(trace=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "a", progress=stopped_at(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(EquipoiseError, match=r"cannot be written .*make room and run the same"):
            train(config, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((tmp_path / "a").glob("*.tmp"))
    assert RunFolder(tmp_path / "a").load_checkpoint()["step"] == 2
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("file", ["config.json", "environment.json", "checkpoint-00000002-0of1.pt"])
def test_a_damaged_folder_says_so_and_is_left_alone(
    configure: Configure, tmp_path: Path, file: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(configure(), tmp_path / "a", progress=stopped_at(2))
    damaged = tmp_path / "a" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(EquipoiseError, match=rf"{file} cannot be read .*--force"):
        train(configure(), tmp_path / "a")
    assert damaged.stat().st_size == 100
    train(configure(trace=False), tmp_path / "a", force=True)


def test_metrics_show_how_it_came_to_nan(configure: Configure, tmp_path: Path) -> None:
    config = configure(optimizer__lr=1e30, optimizer__clip=0)
    with pytest.raises(EquipoiseError, match="The run is stopped"):
        train(config, tmp_path)
    assert RunFolder(tmp_path).metrics()["step"].to_pylist()[0] == 1


def test_evaluations_before_nan_are_kept(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(evaluate_every=1, trace=False)
    before = Run._backward

    def poisoned(run: Run, *batch: Any, last: bool) -> Any:
        return before(run, *batch, last=last) + (math.nan if run.step == 4 else 0)

    monkeypatch.setattr(Run, "_backward", poisoned)
    with pytest.raises(EquipoiseError, match="step 5: the loss is nan"):
        train(config, tmp_path)
    assert [e["step"] for e in RunFolder(tmp_path).read("evaluations.json")] == [1, 2, 3, 4]


def test_what_cannot_be_measured_is_null_on_disk_and_nan_in_python(
    configure: Configure, tmp_path: Path
) -> None:
    def refused(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    config = configure(model__router="soft", trace=False)
    for result in (train(config, tmp_path), train(config, tmp_path)):
        assert math.isnan(result["max_vio"])
        assert math.isfinite(result["loss"])
    for file in tmp_path.glob("*.json"):
        json.loads(file.read_text(), parse_constant=refused)


def test_what_recommended_stood_for_is_kept_and_another_is_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(balance="recommended", model__router="sigmoid", trace=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=stopped_at(2))
    (term,) = RunFolder(tmp_path).read("environment.json")["balance"]
    assert (term["is"], term["controller"]["is"]) == ("Bias", "QuantileHistogram")
    with monkeypatch.context() as patch:
        patch.setattr("equipoise.balance.recommended", lambda _: (Loss("switch", weight=0.5),))
        with pytest.raises(EquipoiseError, match="the terms: Bias before, Loss now"):
            train(config, tmp_path)
    train(config, tmp_path)


def test_a_first_signal_says_that_it_was_heard(configure: Configure, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(configure(), tmp_path, say=said.append, progress=stopped_at(2))
    assert sum("Stopping when this step is made" in line for line in said) == 1


def test_a_long_evaluation_says_how_far_it_is_where_progress_is_asked_for(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.lab.run.EVERY", -1.0)
    said: dict[str, list[str]] = {"quiet": [], "shown": []}
    train(configure(trace=False), tmp_path / "quiet", say=said["quiet"].append)
    train(
        configure(trace=False),
        tmp_path / "shown",
        say=said["shown"].append,
        progress=lambda _: None,
    )
    assert not any("passes" in line for line in said["quiet"])
    assert any(line.startswith("Evaluated 1 of ") for line in said["shown"])


def test_text_that_is_read_more_than_once_is_told(configure: Configure, tmp_path: Path) -> None:
    said: list[str] = []
    train(configure(trace=False), tmp_path / "once", say=said.append)
    assert not any("more than once" in line for line in said)
    config = configure(trace=False, tokens=8 * 16 * 1200)
    corpus = load_corpus(config.data)
    rows = (len(corpus.domains[0].train) - 1) // 16
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "often", say=said.append, progress=stopped_at(1))
    (told,) = [line for line in said if "more than once" in line]
    assert f"{corpus.names[0]} {1200 * 8 / 3 / rows:.1f} times" in told


def _full_at_result(written: Any, folder: Any, name: str, values: Any, *, at: Path) -> None:
    from equipoise.lab.saving import saving

    with saving(at / "a" / "result.tmp"):
        if name == "result.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        written(folder, name, values)


# -- folders ----------------------------------------------------------------------------------


def test_a_folder_of_another_config_is_refused_with_both_values(
    configure: Configure, tmp_path: Path
) -> None:
    train(configure(trace=False), tmp_path / "a")
    with pytest.raises(EquipoiseError) as stop:
        train(configure(trace=False, seed=1, model__experts=8), tmp_path / "a")
    assert "holds a run with model.experts=4, not 8, and 1 more setting:" in str(stop.value)
    assert RunFolder(tmp_path / "a").finished


def test_what_changes_no_number_may_differ(configure: Configure, tmp_path: Path) -> None:
    train(configure(trace=False), tmp_path / "a")
    other = configure(trace=False, name="other", checkpoint_seconds=7, threads=2)
    train(other, tmp_path / "a")


def test_other_text_is_refused(configure: Configure, tmp_path: Path, text: Path) -> None:
    import shutil

    copied = tmp_path / "text"
    shutil.copytree(text, copied)
    config = configure(data__source=str(copied), trace=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "a", progress=stopped_at(2))
    with (copied / "abc" / "words.txt").open("a") as file:
        file.write(" more")
    with pytest.raises(EquipoiseError, match="was begun on other text"):
        train(config, tmp_path / "a")


def test_force_begins_anew_and_leaves_what_is_no_run_alone(
    configure: Configure, tmp_path: Path
) -> None:
    train(configure(trace=False), tmp_path / "a", force=True)
    train(configure(trace=False, seed=1), tmp_path / "a", force=True)
    assert RunFolder(tmp_path / "a").config().seed == 1
    precious = tmp_path / "mine"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    for force in (False, True):
        with pytest.raises(EquipoiseError, match="no run's folder"):
            train(configure(), precious, force=force)
    assert (precious / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("force", [False, True])
def test_a_model_s_folder_is_no_run_s_for_all_its_config(
    configure: Configure, tmp_path: Path, *, force: bool
) -> None:
    config = configure(trace=False)
    train(config, tmp_path / "a")
    model = tmp_path / "a" / "model"
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    assert {"config.json", "model.safetensors"} <= before.keys()
    with pytest.raises(EquipoiseError, match="is not empty and is no run's folder"):
        train(config, model, force=force)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_force_removes_the_run_and_nothing_else(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    train(configure(evaluate_every=3), run)
    elsewhere.mkdir()
    for folder in (run, elsewhere):
        (folder / "thesis.txt").write_text("years")
    (run / "tensorboard").symlink_to(elsewhere)
    with (
        monkeypatch.context() as patch
    ):  # stopped in the middle of it, it is still known for a run's

        def stop(_: Path) -> None:
            raise KeyboardInterrupt

        patch.setattr("equipoise.lab.folder.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            train(configure(seed=1), run, force=True)
    assert not (run / "result.json").exists()
    train(configure(seed=1, trace=False), run, force=True, save=False)
    assert {file.name for file in run.iterdir()} == {
        "config.json", "environment.json", "metrics.parquet", "evaluations.json", "result.json",
        "thesis.txt",
    }  # fmt: skip
    assert (elsewhere / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_folder_s_place_is_refused_before_text_is_read(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, force: bool
) -> None:
    def no_text(*_: object) -> None:
        raise AssertionError("text is read")

    monkeypatch.setattr("equipoise.lab.trainer.load_corpus", no_text)
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(EquipoiseError, match=r"thesis\.txt is a file; choose a folder with --out"):
        train(configure(), tmp_path / "thesis.txt", force=force)
    assert (tmp_path / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model__router": "hash", "balance": "switch"}, ["hash", "switch"]),
        ({"model__router": "soft", "balance": "sign"}, ["soft", "sign"]),
        ({"expert_parallel": True}, ["expert_parallel=true", "one"]),
        ({"parallel": "fsdp2"}, ["parallel=fsdp2", "one"]),
    ],
    ids=["hash and loss", "soft and bias", "experts over one process", "weights over one process"],
)
def test_what_does_not_go_together_is_refused_before_the_folder_is_touched(
    configure: Configure, tmp_path: Path, values: dict[str, Any], named: list[str]
) -> None:
    train(configure(trace=False), tmp_path / "a")
    with pytest.raises(EquipoiseError) as stop:
        train(configure(**values), tmp_path / "a", force=True)
    assert all(name in str(stop.value) for name in named)
    assert RunFolder(tmp_path / "a").finished


# -- what it trains ---------------------------------------------------------------------------


@pytest.mark.parametrize("router", BLOCKS)
def test_every_router_trains(configure: Configure, tmp_path: Path, router: str) -> None:
    top_k = 1 if router == "base" else 2
    config = configure(model__router=router, model__top_k=top_k, tokens=3 * 8 * 16)
    said: list[str] = []
    result = train(config, tmp_path / "a", say=said.append)
    losses = figures(tmp_path / "a")["loss"].to_pylist()
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    if router in ("expert_choice", "expert_threshold", "relu", "soft"):
        assert any(line.startswith("No trace") for line in said)
    else:
        assert (tmp_path / "a" / "trace" / "trace.json").exists()
    assert result["parameters"]["active"] <= result["parameters"]["total"]


def test_bfloat16_trains_and_is_another_precision(configure: Configure, tmp_path: Path) -> None:
    """In one process after float32, which Accelerate's own setting would refuse."""
    train(configure(trace=False), tmp_path / "a")
    train(configure(trace=False, precision="bfloat16"), tmp_path / "b")
    ours, theirs = (figures(tmp_path / name)["loss"].to_pylist() for name in "ab")
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=2e-2)
    assert load(tmp_path / "b").embedding.weight.dtype == torch.float32


def test_micro_batches_change_the_step_by_rounding_only(
    configure: Configure, tmp_path: Path
) -> None:
    train(configure(trace=False, micro_rows=8), tmp_path / "a")
    train(configure(trace=False, micro_rows=1), tmp_path / "b")
    ours, theirs = (figures(tmp_path / name) for name in "ab")
    for column in ("loss", "gradient_norm"):
        assert ours[column].to_pylist() == pytest.approx(theirs[column].to_pylist(), rel=1e-5)


def test_metrics_hold_a_row_a_step_whose_counts_sum_to_the_selections(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure(model__capacity="capacity(factor=0.5)", trace=False)
    seen: list[Progress] = []
    sunk: list[dict[str, float]] = []
    train(
        config,
        tmp_path / "a",
        progress=seen.append,
        sinks=[lambda metrics, _: sunk.append(dict(metrics))],
    )
    table = RunFolder(tmp_path / "a").metrics()
    assert table.column_names == [
        "step",
        "tokens",
        "loss",
        "gradient_norm",
        "learning_rate",
        "seconds",
        "max_vio",
        "max_vio_floor",
        "counts",
        "dropped_share",
    ]
    assert table["max_vio"].to_pylist() == [now.max_vio for now in seen]
    assert {*table["max_vio_floor"].to_pylist()} == {seen[0].floor}
    for counts in table["counts"].to_pylist():
        assert len(counts) == 2 * 4
        assert sum(counts) == 2 * 8 * 16 * 2
    assert all(0 < share < 1 for share in table["dropped_share"].to_pylist())
    assert [now.step for now in seen] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in sunk] == table["loss"].to_pylist()
    assert sunk[-1]["train/max_vio"] == seen[-1].max_vio
    assert seen[-1].seconds_left == 0


def test_without_saving_only_figures_are_kept(configure: Configure, tmp_path: Path) -> None:
    train(configure(), tmp_path / "a", save=False)
    kept = {path.name for path in (tmp_path / "a").iterdir()}
    assert kept == {
        "config.json",
        "environment.json",
        "metrics.parquet",
        "evaluations.json",
        "result.json",
    }
    assert RunFolder(tmp_path / "a").config() == configure()


def test_threads_are_those_of_the_config(configure: Configure, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        train(configure(trace=False, threads=2), tmp_path / "a")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("router", "balance"),
    [
        ("sigmoid", frontier.METHODS["quantile by histogram"]),
        ("softmax", frontier.METHODS["quantile"]),
        ("mixtral", frontier.METHODS["switch 0.1"]),
    ],
)
def test_recommended_is_what_the_model_can_keep(
    configure: Configure, tmp_path: Path, router: str, balance: str
) -> None:
    for name, text in (("named", "recommended"), ("spelt", balance), ("none", "none")):
        train(configure(model__router=router, balance=text), tmp_path / name)
    assert same_weights(tmp_path / "named", tmp_path / "spelt")
    assert not same_weights(tmp_path / "named", tmp_path / "none")


@pytest.mark.parametrize(
    ("router", "balance"),
    [
        ("mixtral", "sign(rate=0.2)"),
        ("sigmoid", "multiplicative(rate=0.5)"),
        ("mixtral", "lifecycle(reserve=0.5)"),
    ],
)
def test_a_bias_that_the_router_has_no_place_for_is_kept_with_the_weights(
    configure: Configure, tmp_path: Path, router: str, balance: str
) -> None:
    config = configure(model__router=router, balance=balance)
    said: list[str] = []
    result = train(config, tmp_path, say=said.append)
    assert result["saved"]["model"] is None  # transformers has no place for it either
    assert any("has no place for it" in line for line in said)
    model = load(tmp_path)
    length, tokens = config.data.row_length, config.evaluation_tokens
    found = evaluate(model, load_corpus(config.data), length, tokens=tokens)
    kept = RunFolder(tmp_path).read("evaluations.json")[-1]
    assert found.counts.tolist() == kept["counts"]
    state = load_file(tmp_path / "weights.safetensors")
    plain = rebuilt(config, {n: v for n, v in state.items() if not n.startswith(OUTSIDE)})
    bare = evaluate(plain, load_corpus(config.data), length, tokens=tokens)
    assert bare.counts.tolist() != kept["counts"]


def test_balancing_s_measures_stand_beside_the_load(configure: Configure, tmp_path: Path) -> None:
    sunk: list[dict[str, float]] = []
    config = configure(balance="switch(weight=0.01) + sign(rate=0.01)", trace=False)
    train(config, tmp_path / "a", save=False, sinks=[lambda found, _: sunk.append(dict(found))])
    table = RunFolder(tmp_path / "a").metrics()
    balance = {name for name in table.column_names if name.startswith("balance/")}
    told = {name for name in sunk[-1] if "train/" not in name and "/layer_" not in name}
    assert balance == told - {"balance/step"}
    for name in balance:
        assert table[name].to_pylist() == [row.get(name) for row in sunk]
    assert table["balance/max_vio"].to_pylist() == pytest.approx(table["max_vio"].to_pylist())
    churn = table["balance/churn"].to_pylist()
    assert churn[0] is None  # the first step has none before it
    assert all(0 <= share <= 1 for share in churn[1:])


def test_a_model_that_memory_cannot_hold_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match=r"hidden_size=32768, .*=65536 .*GiB, and cpu has"):
        train(configure(model__hidden_size=32768, model__experts=65536), tmp_path / "a")
    assert not (tmp_path / "a").exists()
