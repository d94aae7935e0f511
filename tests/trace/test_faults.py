"""What can happen to a trace on disk gives one clear error, and never a wrong number."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import equipoise
from equipoise import EquipoiseError, Trace, TraceError
from equipoise.trace.files import PartWriter, lock_part, prepare_folder
from equipoise.trace.parts import FilePart
from equipoise.trace.schema import Manifest

WINDOWS, WINDOW = 5, 8192


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 6, (WINDOWS * WINDOW, 2, 2))


@pytest.fixture
def folder(tmp_path: Path, ids: np.ndarray) -> Path:
    return Trace.from_arrays(ids, num_experts=6).save(tmp_path / "run.trace")


def unclosed(folder: Path) -> Path:
    """The folder as a killed process leaves it: manifest of the start, no end of stream."""
    path = folder / "trace.json"
    manifest = Manifest.from_json(path.read_text(), "trace.json")
    manifest.status, manifest.files, manifest.totals = "partial", {}, {}
    path.write_text(manifest.to_json())
    for stream in folder.glob("*.arrow"):
        os.truncate(stream, stream.stat().st_size - 8)
    return folder


def counts_of(ids: np.ndarray, windows: int) -> np.ndarray:
    rows = ids[: windows * WINDOW]
    return np.stack([np.bincount(rows[:, i].ravel(), minlength=6) for i in range(2)])


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.2, 0.5, 0.799, 0.9, 0.9999])
@pytest.mark.parametrize("victim", ["tokens", "counts", "sequences"])
def test_a_killed_run_opens_up_to_its_last_whole_window(
    folder: Path, ids: np.ndarray, victim: str, fraction: float
) -> None:
    stream = unclosed(folder) / f"{victim}-r00000.arrow"
    os.truncate(stream, int(stream.stat().st_size * fraction))
    trace = equipoise.open(folder)
    windows = trace.tokens // WINDOW
    assert trace.tokens == windows * WINDOW
    assert windows <= WINDOWS
    assert (trace.counts_LE == counts_of(ids, windows)).all()
    assert (trace.recount() == trace.counts_LE).all()
    assert trace.meta["status"] == "partial"
    if victim == "tokens":
        assert abs(windows - WINDOWS * fraction) <= 1  # at most the torn one is lost


def test_a_killed_run_that_wrote_all_windows_loses_none(folder: Path, ids: np.ndarray) -> None:
    assert (equipoise.open(unclosed(folder)).counts_LE == counts_of(ids, WINDOWS)).all()


@pytest.mark.parametrize("name", ["tokens", "counts", "sequences"])
def test_a_truncated_file_of_a_closed_trace_is_refused(folder: Path, name: str) -> None:
    stream = folder / f"{name}-r00000.arrow"
    os.truncate(stream, stream.stat().st_size - 1)
    with pytest.raises(TraceError, match=r"manifest says \d+: it was truncated"):
        equipoise.open(folder)


@pytest.mark.parametrize("name", ["tokens", "counts", "sequences"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / f"{name}-r00000.arrow").unlink()
    with pytest.raises(TraceError, match="is missing"):
        equipoise.open(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("status", "partial"), ("level", "full"), ("every", 3), ("totals", {}), ("world_size", 2)],
)
def test_a_manifest_edited_by_hand_is_refused(folder: Path, key: str, value: object) -> None:
    path = folder / "trace.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(TraceError, match="changed after it was written"):
        equipoise.open(folder)


def test_another_expert_count_in_the_manifest_is_refused(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(path.read_text().replace('"experts": 6', '"experts": 7'))
    with pytest.raises(TraceError, match="changed after it was written"):
        equipoise.open(folder)


def test_reformatting_a_manifest_is_no_change(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert equipoise.open(folder).tokens == WINDOWS * WINDOW


def test_another_version_is_refused_by_number(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(TraceError, match="format version 99; this Equipoise reads version 1"):
        equipoise.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[]", "not the manifest"), ("{}", "not the mani")],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "trace.json").write_text(text)
    with pytest.raises(TraceError, match=message):
        equipoise.open(folder)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        equipoise.open(tmp_path / "nothing")
    with pytest.raises(TraceError, match=r"holds no trace\.json"):
        equipoise.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TraceError, match="not a trace"):
        equipoise.open(tmp_path / "file")


def test_token_rows_of_another_trace_are_noticed(tmp_path: Path, folder: Path) -> None:
    other = np.zeros((WINDOWS * WINDOW, 2, 3), int)
    Trace.from_arrays(other, num_experts=6).save(tmp_path / "other.trace")
    unclosed(folder)
    shutil.copy(tmp_path / "other.trace" / "tokens-r00000.arrow", folder)
    with pytest.raises(TraceError, match="does not have the columns"):
        equipoise.open(folder)


def test_flipped_bytes_in_the_counts_are_noticed(folder: Path) -> None:
    stream = folder / "counts-r00000.arrow"
    data = bytearray(stream.read_bytes())
    with pa.OSFile(str(stream)) as source:
        count = pa.ipc.open_stream(source).read_next_batch().column("counts").values[0].as_py()
    at = data.find(int(count).to_bytes(4, "little"))
    data[at] ^= 1
    stream.write_bytes(data)
    with pytest.raises(TraceError, match="damaged: layer 0 counts"):
        _ = equipoise.open(folder).counts_LE


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    lock = lock_part(tmp_path / "run.trace", 0)
    with pytest.raises(TraceError, match=rf"written by another process \(pid {os.getpid()}\)"):
        lock_part(tmp_path / "run.trace", 0)
    lock_part(tmp_path / "run.trace", 1).release()
    lock.release()
    lock_part(tmp_path / "run.trace", 0).release()


def test_a_trace_is_not_overwritten_unasked(folder: Path, ids: np.ndarray) -> None:
    with pytest.raises(TraceError, match="holds a trace already"):
        Trace.from_arrays(ids, num_experts=6).save(folder)
    Trace.from_arrays(ids[:10], num_experts=6).save(folder, force=True)
    assert equipoise.open(folder).tokens == 10


def test_a_folder_with_other_files_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TraceError, match=r"no trace \(thesis.tex\)"):
        prepare_folder(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_trace_cannot_be_saved_over_itself(folder: Path) -> None:
    with pytest.raises(TraceError, match="is the trace being read"):
        equipoise.open(folder).save(folder, force=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pa.OSFile

    def full_disk(path: str, mode: str = "rb") -> pa.OSFile:
        return real("/dev/full" if "tokens" in path else path, mode)

    monkeypatch.setattr("equipoise.trace.files.pa.OSFile", full_disk)
    with pytest.raises(TraceError, match=r"the disk is full\..*resume"):
        Trace.from_arrays(ids, num_experts=6).save(tmp_path / "full.trace")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TraceError, match="may not be written to"):
        prepare_folder(tmp_path / "run.trace", force=False)


def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run.trace").write_text("")
    with pytest.raises(EquipoiseError, match="Cannot write the trace"):
        lock_part(tmp_path / "run.trace", 0)


def test_reading_gives_pages_back_batch_by_batch(folder: Path) -> None:
    part = equipoise.open(folder)._parts[0]
    assert isinstance(part, FilePart)
    stream = part.tokens(0)
    first = next(stream)
    before = first.column("sequence").to_pylist()
    next(stream)
    assert first.column("sequence").to_pylist() == before


def test_part_writer_leaves_a_readable_trace_when_abandoned(tmp_path: Path) -> None:
    source = Trace.from_arrays(np.zeros((10, 1, 1), int), num_experts=2)
    part = source._parts[0]
    writer = PartWriter(_made(tmp_path / "a.trace"), part.manifest)
    writer.manifest.status = "partial"
    writer.write_manifest()
    batches = zip(part.counts(), part.sequences(), part.tokens(0), strict=True)
    for counts, sequences, tokens in batches:
        writer.write_window(counts, sequences, [tokens])
    writer.abandon()
    trace = equipoise.open(tmp_path / "a.trace")
    assert trace.tokens == 10
    assert trace.meta["status"] == "partial"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
