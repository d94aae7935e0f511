"""Two processes give the run of one, whatever they share out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import equipoise
from equipoise.lab import Config, load, train
from equipoise.lab.config import flat
from equipoise.lab.folder import RunFolder
from tests.lab.made_up import SMALL
from tests.torchrun import torchrun

pytestmark = [pytest.mark.distributed]

# With `exact` the load of a step is that of the whole step, so that the gradient does not depend on
# how it is cut; `global`, by its definition, does.
BALANCE = "switch(scope=exact, weight=0.1) + sign(rate=0.01)"
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "experts": {"expert_parallel": True},
    "muon": {"optimizer.name": "muon"},
    "capacity": {"model.capacity": "capacity(factor=1.0)"},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16_fsdp2": {"precision": "bfloat16", "parallel": "fsdp2"},
}


PLACES = ("data.source", "data.cache")


def config_of(text: Path, **values: Any) -> Config:
    places = {"data.source": str(text), "data.cache": str(text.parent / "cache")}
    return Config().change(
        {**SMALL, **places, "model.router": "sigmoid", "balance": BALANCE, **values}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Every case, run by two processes that are started once."""
    folder = tmp_path_factory.mktemp("processes")
    cases = [(name, "train", config_of(text, **way)) for name, way in WAYS.items()]
    cases += [
        ("stopped_ddp", "stopped", config_of(text)),
        ("stopped_fsdp2", "stopped", config_of(text, parallel="fsdp2")),
        ("stopped_experts", "stopped", config_of(text, expert_parallel=True)),
        ("left", "left", config_of(text)),
        ("poisoned", "poisoned", config_of(text)),
        ("poisoned_without_room", "poisoned_without_room", config_of(text)),
        ("no_room", "no_room", config_of(text, checkpoint_seconds=0)),
        ("uneven", "refused", config_of(text, micro_rows=8)),
        (
            "muon_fsdp2",
            "refused",
            config_of(text, **{"optimizer.name": "muon", "parallel": "fsdp2"}),
        ),
        ("odd_experts", "refused", config_of(text, expert_parallel=True, **{"model.experts": 5})),
        ("no_domain", "refused", config_of(text, **{"data.domains": "klingon"})),
    ]
    file = folder / "cases.json"
    file.write_text(json.dumps([(name, way, config.to_json()) for name, way, config in cases]))
    torchrun("-m", "tests.lab.worker", file, seconds=400)
    return folder


def found(folder: Path, case: str) -> list[Any]:
    """What each process found."""
    return [json.loads((folder / f"found-{rank}.json").read_text())[case] for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_curve_of_one(
    folder: Path, tmp_path: Path, text: Path, way: str
) -> None:
    values = {k: v for k, v in WAYS[way].items() if k not in ("parallel", "expert_parallel")}
    result = train(config_of(text, **values), tmp_path / "one")
    one, two = RunFolder(tmp_path / "one"), RunFolder(folder / way)
    ours, theirs = two.metrics(), one.metrics()
    precise = 1e-5 if "bfloat16" not in way else 2e-2
    for column in ("loss", "gradient_norm", "learning_rate"):
        wanted = theirs[column].to_pylist()
        assert ours[column].to_pylist() == pytest.approx(wanted, rel=precise)
    if "dropped_share" in theirs.column_names:
        assert ours["dropped_share"].to_pylist() == pytest.approx(
            theirs["dropped_share"].to_pylist()
        )
    if "bfloat16" not in way:
        assert ours["counts"].to_pylist() == theirs["counts"].to_pylist()
    assert found(folder, way) == [result["parameters"]] * 2
    assert two.read("result.json")["loss"] == pytest.approx(result["loss"], rel=precise)
    same(load(folder / way), load(tmp_path / "one"), 2e-2 if "bfloat16" in way else 1e-4)
    shared, alone = (run.read("evaluations.json")[-1] for run in (two, one))
    assert shared["tokens"] == alone["tokens"]
    assert shared["losses"] == pytest.approx(alone["losses"], rel=precise)
    totals = [[[sum(e) for e in layers] for layers in x["counts"]] for x in (shared, alone)]
    assert totals[0] == totals[1]


def same(ours: torch.nn.Module, theirs: torch.nn.Module, rtol: float) -> None:
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if name.endswith("selection_bias") and rtol > 1e-3:
            continue  # a sign may differ
        scale = float(wanted[name].abs().max())
        assert float((value - wanted[name]).abs().max()) <= max(rtol * scale, 1e-6), name


def test_the_trace_of_two_processes_counts_every_row_once(folder: Path) -> None:
    for way in ("ddp", "fsdp2", "experts"):
        counts = RunFolder(folder / way).read("evaluations.json")[-1]["counts"]
        trace = equipoise.open(folder / way / "trace")
        assert (trace.counts_LE == torch.tensor(counts).sum(0).numpy()).all()
        assert {part.manifest.data_rank for part in trace._parts} == {0, 1}
        assert trace.sequences.num_rows == 3 * (200 // 16)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "experts"])
def test_stopped_and_resumed_two_processes_end_with_the_same_weights(
    folder: Path, way: str
) -> None:
    files = ["checkpoint-00000003-0of2.pt", "checkpoint-00000003-1of2.pt"]
    assert found(folder, f"stopped_{way}") == [files, files]
    ours, theirs = load(folder / f"stopped_{way}").state_dict(), load(folder / way).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    resumed = RunFolder(folder / f"stopped_{way}").metrics()
    assert resumed["loss"].equals(RunFolder(folder / way).metrics()["loss"])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("poisoned", "step 3: the loss is nan; the weight blocks.1.mlp.gate.weight is not finite"),
        ("poisoned_without_room", "cannot be written ([Errno 28] No space left on device)"),
        ("no_room", "cannot be written ([Errno 28] No space left on device)"),
        (
            "uneven",
            "batch_rows=8 cannot be shared out over 2 processes in micro-batches of micro_rows=8",
        ),
        ("muon_fsdp2", "optimizer.name=muon needs whole matrices, which parallel=fsdp2 cuts"),
        ("odd_experts", "model.experts=5 over 2 processes"),
        ("no_domain", "data.domains names 'klingon'"),
    ],
)
def test_what_goes_wrong_in_one_process_is_told_by_both(folder: Path, case: str, said: str) -> None:
    for text in found(folder, case):
        assert said in text


def launched(text: Path, out: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """`equipoise train tiny` by accelerate's launcher on a CPU."""
    settings = [
        f"--set={k}={v}" for k, v in flat(asdict(config_of(text))) if k in (*SMALL, *PLACES)
    ]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "equipoise",
         "train", "tiny", *settings, "--out", str(out)],
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_accelerate_s_launcher_that_starts_one_for_several_is_refused(
    tmp_path: Path, text: Path
) -> None:
    """On a CPU it does, without a word."""
    ran = launched(text, tmp_path / "run", 2)
    assert ran.returncode != 0
    assert "asked for several processes and started one" in ran.stderr
    assert "equipoise train --processes N" in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accelerate_s_launcher_of_one_process_trains_as_the_command_does(
    tmp_path: Path, text: Path
) -> None:
    ran = launched(text, tmp_path / "run", 1)
    assert ran.returncode == 0, ran.stderr
    train(RunFolder(tmp_path / "run").config(), tmp_path / "plain")
    ours, theirs = (load(tmp_path / name).state_dict() for name in ("run", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_process_that_leaves_says_all_and_is_not_taken_down() -> None:
    code = """
import atexit
from equipoise.lab.launch import leave
atexit.register(print, "taken down")
print("said", end="")
leave(3)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (3, "said")


def test_another_number_of_processes_is_refused(folder: Path, text: Path) -> None:
    with pytest.raises(equipoise.EquipoiseError, match="begun with 2 processes, and this is 1"):
        train(config_of(text), folder / "left")
