"""Sinks: figures to TensorBoard and W&B under their names, counts of each step into a Trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import equipoise
from equipoise.balance import Bias, Handle, Loss, Sign, attach, sinks
from equipoise.errors import EquipoiseError, TraceError
from equipoise.metrics import load

from .test_trainer import arguments, mixtral, rows, trainer

VALUES = {"balance/step": 3.0, "balance/max_vio": 0.5, "balance/layer_0/max_vio": 0.25}


class Writer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))


class Run:
    def __init__(self) -> None:
        self.axes: dict[str, str] = {}
        self.seen: list[dict[str, float]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.seen.append(values)


def test_tensorboard_gets_every_figure_at_its_step() -> None:
    writer = Writer()
    sinks.tensorboard(writer)(VALUES, 7)
    assert writer.seen == [(name, value, 7) for name, value in VALUES.items()]


def test_tensorboards_files_hold_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        sinks.tensorboard(writer)(VALUES, 7)
    read = EventAccumulator(str(tmp_path)).Reload()
    found = {name: read.Scalars(name)[0] for name in read.Tags()["scalars"]}
    assert {name: (e.step, e.value) for name, e in found.items()} == {
        name: (7, value) for name, value in VALUES.items()
    }


def test_wandb_has_the_step_of_balance_as_its_axis() -> None:
    run = Run()
    sinks.wandb(run)(VALUES, 7)
    assert run.axes == {"balance/*": "balance/step"}
    assert run.seen == [{**VALUES, "balance/step": 7}]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    make: Any = getattr(sinks, name)
    with pytest.raises(EquipoiseError, match=f"pip install {name}"):
        make(*([tmp_path] if name == "tensorboard" else []))


# -- traces ---------------------------------------------------------------------------------------


def stepped(handle: Handle, steps: int, each: Any) -> None:
    model = handle.model.train()
    data = torch.stack([row["input_ids"] for row in rows()])
    for step in range(steps):
        batch = data[4 * step : 4 * step + 4]
        mask = torch.ones_like(batch)
        mask[0, -step:] = 0 if step else 1
        model(input_ids=batch, attention_mask=mask, labels=batch).loss.backward()
        handle.step()
        each(step + 1)
        model.zero_grad()


def test_a_trace_holds_the_counts_of_every_step(tmp_path: Path) -> None:
    handle = attach(mixtral(), Loss("switch"), Bias(Sign()))
    counts, tokens = [], []
    with sinks.trace(tmp_path / "run.trace", handle, span=2) as sink:

        def each(step: int) -> None:
            sink(handle.metrics(), step)
            counts.append(torch.stack(handle.counts()).long().numpy())
            tokens.append(handle.tokens())

        stepped(handle, 5, each)
    trace = equipoise.open(tmp_path / "run.trace")
    assert trace.meta["status"] == "complete"
    assert [layer.path for layer in trace.layers] == [site.path for site in handle.sites]
    windows = list(trace.windows())
    assert len(windows) == 5
    for window, wanted, rows_L in zip(windows, counts, tokens, strict=True):
        assert np.array_equal(window.counts_LE, wanted)
        assert window.tokens_L.tolist() == rows_L
    assert tokens[4][0] == 4 * 12 - 4, "padding was counted"
    assert trace.values("domain") == ["steps 1-2", "steps 3-4", "steps 5-6"]
    last = trace.select(domain="steps 5-6")
    assert load.max_vio(last.counts_LE[0]) == pytest.approx(
        handle.metrics()["balance/layer_0/max_vio"]
    )


def test_commands_read_it(tmp_path: Path) -> None:
    handle = attach(mixtral(), Loss("switch"))
    with sinks.trace(tmp_path / "run.trace", handle, span=4) as sink:
        stepped(handle, 8, sink.write)
    for command in (
        ["info", "run.trace", "--verify"],
        ["stats", "run.trace", "--by", "domain"],
        ["report", "run.trace", "-o", "report.html"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "equipoise", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        if command[0] == "stats":
            assert "steps 1-4" in run.stdout
            assert "steps 5-8" in run.stdout
    assert "steps 5-8" in (tmp_path / "report.html").read_text()


def test_the_trainer_writes_every_step_and_closes(tmp_path: Path) -> None:
    model = mixtral()
    handle = attach(model, Loss("switch"))
    sink = sinks.trace(tmp_path / "run.trace", handle)
    args = arguments(tmp_path / "out", logging_steps=4, gradient_accumulation_steps=2)
    callback = equipoise.balance.BalanceCallback(handle, sinks=[sink])
    trainer(model, args, callback).train()
    trace = equipoise.open(tmp_path / "run.trace")
    assert trace.meta["status"] == "complete"
    assert [int(w.tokens_L[0]) for w in trace.windows()] == [2 * 4 * 12] * 4


def test_a_killed_run_leaves_a_readable_trace_and_goes_on(tmp_path: Path) -> None:
    handle = attach(mixtral(), Loss("switch"))
    path = tmp_path / "run.trace"
    with pytest.raises(KeyboardInterrupt), sinks.trace(path, handle) as sink:
        stepped(handle, 2, sink.write)
        raise KeyboardInterrupt
    assert equipoise.open(path).meta["status"] == "partial"
    with pytest.raises(TraceError, match="holds a trace already"):
        sinks.trace(path, handle)
    with sinks.trace(path, handle, resume=True) as sink:
        stepped(handle, 3, sink.write)
    trace = equipoise.open(path)
    assert trace.meta["status"] == "complete"
    assert len(list(trace.windows())) == 5
    with sinks.trace(path, handle, force=True) as sink:
        stepped(handle, 1, sink.write)
    assert len(list(equipoise.open(path).windows())) == 1


def test_a_trace_of_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    handle = attach(mixtral(), Loss("switch"))
    sinks.trace(tmp_path, handle).close()
    other = attach(mixtral(), Loss("switch"), layers=lambda site: site.layer == 1)
    with pytest.raises(TraceError, match="layers are not this model's"):
        sinks.trace(tmp_path, other, resume=True)


@pytest.mark.parametrize("options", [{"span": 0}, {"force": True, "resume": True}])
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EquipoiseError, match=r"sinks\.trace"):
        sinks.trace(tmp_path / "run.trace", attach(mixtral()), **options)
    assert not (tmp_path / "run.trace").exists()
