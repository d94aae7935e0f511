"""`equipoise trace` stopped by Ctrl-C or killed, and resumed: the trace of an unbroken run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import equipoise
from tests.signals import heed_ctrl_c

ARGUMENTS = ["trace", "demo", "--data", "bundled", "--limit", "4", "--shots", "1"]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "equipoise", *ARGUMENTS, "-o", "t", "--threads", "1", *more]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> equipoise.Trace:
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder).wait(300) == 0
    return equipoise.open(folder / "t")


def wait_for_windows(folder: Path, size: int) -> None:
    """Until rows have reached the disk."""
    stream = folder / "t" / "tokens-r00000.arrow"
    for _ in range(3000):
        if stream.exists() and stream.stat().st_size > size:
            return
        time.sleep(0.02)
    raise AssertionError("nothing was written")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_stopped_run_resumes_to_the_trace_of_an_unbroken_one(
    whole: equipoise.Trace, tmp_path: Path, how: signal.Signals
) -> None:
    run = start(tmp_path)
    wait_for_windows(tmp_path, 40_000)  # one window of five or six
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    assert run.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    partial = equipoise.open(tmp_path / "t")
    assert partial.meta["status"] == "partial"
    assert 0 < partial.tokens < whole.tokens
    if how is signal.SIGINT:
        assert "is partial and readable; go on with --resume" in said
    again = start(tmp_path, "--resume")
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "sequences are there already" in said
    trace = equipoise.open(tmp_path / "t")
    assert trace.meta["status"] == "complete"
    assert trace.tokens == whole.tokens
    assert (trace.recount() == trace.counts_LE).all()
    questions = [(r["subject"], r["question"]) for r in trace.sequences.to_pylist()]
    asked = [q for q in questions if q[1] is not None]
    assert len(asked) == len(set(asked)) == 57 * 4
    # Batches may be cut elsewhere, and rounding may then decide a router's tie.
    assert abs(trace.counts_LE - whole.counts_LE).sum() <= 1e-3 * whole.counts_LE.sum()
