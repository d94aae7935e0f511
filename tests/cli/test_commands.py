"""The command line as a user types it: results, errors of one line, exit codes."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import equipoise
from equipoise.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return call


EXPERTS, DEAD = 8, 5


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    rng = np.random.default_rng(1)
    chosen = np.argsort(rng.random((30_000, 2, EXPERTS - 1)), -1)[..., :2]
    chosen[:, 1] += chosen[:, 1] >= DEAD  # layer 3: expert 5 is never selected
    return chosen


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray) -> Path:
    labels = {
        "subject": [f"subject_{i % 3}" for i in range(60)],
        "category": ["STEM", "humanities"] * 30,
        "correct": [i % 4 == 0 for i in range(60)],
    }
    trace = equipoise.Trace.from_arrays(
        ids,
        layers=[1, 3],
        num_experts=EXPERTS,
        sequences=np.repeat(np.arange(60), 500),
        labels=labels,
    )
    return trace.save(tmp_path_factory.mktemp("cli") / "run.trace")


@pytest.mark.parametrize("name", ["run.trace", "my run.trace", "it's.trace", "long" * 20])
def test_the_next_commands_can_be_typed_as_they_stand(capsys, name: str) -> None:
    from equipoise.cli.common import say_next

    commands = [["equipoise", "dead", Path(name)], ["equipoise", "report", Path(name)]]
    say_next(*commands, after="Wrote it.")
    said = capsys.readouterr().err
    read = said.replace("Wrote it.", "").replace(", or", "\n").replace("  or:", "\n")
    found = [shlex.split(line) for line in read.replace("Next:", "\n").splitlines()]
    assert [words for words in found if words] == [list(map(str, words)) for words in commands]
    lines = said.splitlines()
    assert len(lines) == (1 if name == "run.trace" else 3)
    assert len(lines) > 1 or len(lines[0]) <= 80


def test_stats_json_has_the_agreed_shape(run, path: Path, ids: np.ndarray) -> None:
    found = run("stats", path, "--json").json
    assert found["tokens"] == 30_000
    assert found["accuracy"]["overall"]["questions"] == 60
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    for index, layer in enumerate(found["layers"]):
        counts = np.bincount(ids[:, index].ravel(), minlength=EXPERTS)
        assert layer["counts"] == counts.tolist()
        assert layer["experts"] == EXPERTS
        assert layer["top_k"] == 2
        assert layer["tokens"] == 30_000
        assert layer["max_vio"] == pytest.approx(counts.max() / counts.mean() - 1)
        assert layer["least_used"] == np.argsort(counts, kind="stable").tolist()
        assert layer["never_selected"] == np.flatnonzero(counts == 0).tolist()
        low, high = layer["max_vio_interval"]
        assert low <= high
        assert 0 < layer["max_vio_floor"] < 0.1
        for key in ("path", "gini", "cv", "entropy", "effective_experts"):
            assert layer[key] is not None


def test_stats_prints_a_row_per_layer_within_80_columns(run, path: Path) -> None:
    shown = run("stats", path).out
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "3"]
    assert max(map(len, shown.split("\n\n")[0].splitlines())) <= 80
    assert "Accuracy: 25" in shown


def test_stats_of_a_layer_lists_every_expert(run, path: Path, ids: np.ndarray) -> None:
    rows = run("stats", path, "--layer", 3, "--json").json
    counts = np.bincount(ids[:, 1].ravel(), minlength=EXPERTS)
    assert {row["expert"]: row["count"] for row in rows} == dict(enumerate(counts.tolist()))
    assert rows[0]["expert"] == DEAD
    assert rows[0]["longest_idle"] == 30_000
    assert f"{counts[0]}/60000" in run("stats", path, "--layer", 3).out


@pytest.mark.parametrize("key", ["subject", "category", "role", "phase"])
def test_stats_by_a_label_adds_up(run, path: Path, key: str) -> None:
    groups = run("stats", path, "--by", key, "--json", "--no-intervals").json
    whole = run("stats", path, "--json", "--no-intervals").json
    for index in range(2):
        parts = [group["layers"][index]["counts"] for group in groups.values()]
        assert np.sum(parts, 0).tolist() == whole["layers"][index]["counts"]


def test_selection_narrows_the_counts(run, path: Path) -> None:
    found = run("stats", path, "--subject", "subject_1", "--json", "--no-intervals").json
    assert found["tokens"] == 10_000


def test_csv_has_a_row_per_layer_and_per_expert(run, path: Path) -> None:
    layers = list(csv.DictReader(io.StringIO(run("stats", path, "--csv").out)))
    assert [row["layer"] for row in layers] == ["1", "3"]
    experts = list(csv.DictReader(io.StringIO(run("dead", path, "--csv").out)))
    assert len(experts) == 2 * EXPERTS


def test_dead_names_the_expert_that_was_never_selected(run, path: Path) -> None:
    found = run("dead", path, "--json").json
    assert found["idle_threshold"] == 10_000
    assert len(found["experts"]) == 2 * EXPERTS
    dead = [(row["layer"], row["expert"]) for row in found["experts"] if row["verdict"] == "dead"]
    assert (3, DEAD) in dead
    row = next(r for r in found["experts"] if (r["layer"], r["expert"]) == (3, DEAD))
    assert row["longest_idle"] == row["current_idle"] == 30_000
    assert 0 < row["share_upper"] < 0.01
    assert "dead" in run("dead", path).out


def test_dead_check_gives_exit_code_one(run, path: Path) -> None:
    assert run("dead", path, "--check").code == 1
    assert run("dead", path).code == 0
    assert run("dead", path, "--check", "--subject", "subject_1", "--json").code in (0, 1)


def test_info_verifies_rows_against_counts(run, path: Path) -> None:
    found = run("info", path, "--verify", "--json")
    assert found.code == 0
    assert found.json["verified"] == {
        "checked": True,
        "reason": None,
        "selections": 120_000,
        "differences": 0,
    }
    assert "0 cells differ" in run("info", path, "--verify").out


def test_info_verify_notices_changed_rows(run, path: Path, tmp_path: Path) -> None:
    other = equipoise.open(path).save(tmp_path / "changed.trace")
    stream = other / "tokens-r00000.arrow"
    data = bytearray(stream.read_bytes())
    first = next(equipoise.open(path).batches("ids")).ids[0][:64].tobytes()
    at = data.find(first)
    data[at] = (data[at] + 1) % (EXPERTS - 1)
    stream.write_bytes(data)
    found = run("info", other, "--verify")
    assert found.code == 1
    assert "2 cells differ" in found.out


def test_diff_of_a_trace_with_itself_is_nothing(run, path: Path) -> None:
    found = run("diff", path, path, "--json").json
    assert all(row["js_distance"] == pytest.approx(0, abs=1e-6) for row in found["layers"])


def test_report_writes_one_file_and_asks_before_overwriting(
    run, path: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert run("report", path, "-o", page).code == 0
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    again = run("report", path, "-o", page)
    assert again.code == 2
    assert "Use --force" in again.err
    assert run("report", path, "-o", page, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stas", "x"], "No command 'stas'.*Did you mean 'stats'"),
        (["stats", "nowhere.trace"], "No trace at nowhere.trace"),
        (["stats", "{path}", "--subject", "subjct_1"], "Did you mean 'subject_1'"),
        (["stats", "{path}", "--by", "subjects"], "Did you mean 'subject'"),
        (["stats", "{path}", "--layer", "2"], "no MoE layer 2 in this trace: it has 1, 3"),
        (["stats", "{path}", "--json", "--csv"], "--json and --csv exclude each other"),
        (["stats", "{path}", "--jsn"], "--jsn"),
        (["stats"], "Missing argument"),
        (["dead", "{path}", "--idle", "0"], "--idle"),
        (["trace", "demo", "--task", "mmul"], "No task 'mmul'.*Did you mean 'mmlu'"),
        (["trace", "demo", "--level", "idz"], "No level 'idz'.*Did you mean 'ids'"),
        (["trace", "demo", "--task", "text"], "--task text needs --data"),
        (["trace", "demo", "--data", "nowhere"], "nowhere"),
        (["trace", "demo", "--data", "bundled", "--subjects", "viroligy"], "'virology'"),
        (["trace", "demo", "--data", "bundled", "--shots", "9"], "9"),
        (["trace", "./nowhere", "--data", "bundled", "-o", "{tmp}/a"], "nowhere"),
        (["trace", "demo", "-o", "{path}"], "exists. Use --force"),
        (["trace", "demo", "-o", "{tmp}/a", "--resume"], "nothing to resume"),
        (["trace", "demo", "--force", "--resume"], "exclude each other"),
        (["trace", "demo", "--batch-size", "0", "-o", "{tmp}/a"], "--batch-size is 0"),
        (["trace", "demo", "--subjects", "", "--data", "bundled", "-o", "{tmp}/a"], "is empty"),
        (["trace", "demo", "-o", "{tmp}/a/b", "--every", "0"], "--every is 0"),
        (["report", "{path}", "-o", "{tmp}"], "exists|cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run, path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    ran = run(*(a.format(path=path, tmp=tmp_path) for a in arguments))
    assert ran.code == 2
    assert ran.out == ""
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("equipoise: ")
    import re

    assert re.search(message, lines[0])


def test_debug_shows_the_traceback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["equipoise", "--debug", "stats", "nowhere"])
    with pytest.raises(equipoise.TraceError):
        main()


def test_help_and_errors_load_no_torch() -> None:
    for arguments in ("['--help']", "['stats', 'nowhere']", "['stats', '--help']"):
        code = f"""
import sys, contextlib, io
sys.argv[1:] = {arguments}
from equipoise.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
assert not {{"torch", "transformers", "numba"}} & set(sys.modules), sorted(sys.modules)
"""
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_off_a_terminal_nothing_is_coloured_or_cut(path: Path) -> None:
    command = [sys.executable, "-m", "equipoise", "stats", str(path), "--by", "subject"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "\x1b" not in shown
    assert "…" not in shown
    assert shown.count("subject_2") == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dtype", "flaot32"], "'float32'"),
        (["--device", "cudda"], "'cuda'"),
        (["--experts", "egar"], "'eager'"),
        (["--field", "body"], "belongs to --task text"),
        (["--task", "text", "--shots", "3"], "belongs to --task mmlu"),
    ],
)
def test_a_wrong_option_of_trace_is_refused_before_anything_is_loaded(
    run, tmp_path: Path, options: list[str], says: str
) -> None:
    found = run("trace", "demo", "--data", "bundled", "-o", tmp_path / "x.trace", *options)
    assert found.code == 2
    assert says in found.err
    assert "Loading" not in found.err
    assert not (tmp_path / "x.trace").exists()
