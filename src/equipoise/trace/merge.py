"""Open a folder's parts as one trace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equipoise.errors import TraceError
from equipoise.trace.files import list_column
from equipoise.trace.parts import FilePart, Part
from equipoise.trace.schema import Manifest
from equipoise.trace.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MANIFEST = re.compile(r"trace(-r\d{5}(-s\d{3})?)?\.json")


def read_manifests(folder: Path) -> list[Manifest]:
    """Every manifest of a trace folder, by rank and session. Raises TraceError if there is none."""
    if not folder.exists():
        raise TraceError(f"No trace at {folder}: the folder does not exist.")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    manifests = [
        Manifest.from_json(_read(folder / name), str(folder / name))
        for name in names
        if _MANIFEST.fullmatch(name)
    ]
    if not manifests:
        raise TraceError(f"{folder} is not a trace: it holds no trace.json.")
    return sorted(manifests, key=lambda m: (m.rank, m.session))


def open_trace(path: str | Path) -> Trace:
    """Read the trace at `path`, all its parts merged. A killed run opens up to its last window.

    Raises:
        TraceError: not a trace, damaged, of another version, or parts of different runs.
    """
    folder = Path(path)
    manifests = read_manifests(folder)
    first = manifests[0]
    for other in manifests[1:]:
        for what in ("layers", "level", "run", "world_size"):
            repeats = what == "level" and other.data_rank != other.rank
            if getattr(other, what) != getattr(first, what) and not repeats:
                raise TraceError(
                    f"{folder}: {first.file_name} and {other.file_name} differ in {what}, so they"
                    " are not of one run. Keep each run in its own folder."
                )
    parts = [FilePart(folder, manifest) for manifest in manifests]
    _check_replicas(folder, parts)
    trace = Trace(parts, folder)
    _check_totals(folder, parts)
    return trace


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from None


def _check_totals(folder: Path, parts: list[FilePart]) -> None:
    for part in parts:
        totals = part.manifest.totals
        if not totals:
            continue
        tokens_L = np.zeros(len(part.manifest.layers), np.int64)
        for batch in part.counts():
            tokens_L += list_column(batch, "tokens").sum(0, dtype=np.int64)
        if tokens_L.tolist() != totals["tokens"]:
            raise TraceError(
                f"{folder}: the counts of part {part.manifest.part} do not add up to the totals in"
                f" {part.manifest.file_name}: one of them was changed."
            )


def _check_replicas(folder: Path, parts: list[FilePart]) -> None:
    """Ranks that saw the same tokens must have counted the same."""
    leaders = {(p.manifest.rank, p.manifest.session): p for p in parts}
    for part in parts:
        manifest = part.manifest
        if manifest.data_rank == manifest.rank or manifest.status != "complete":
            continue
        leader = leaders.get((manifest.data_rank, manifest.session))
        if leader is None:
            raise TraceError(
                f"{folder}: the files of rank {manifest.data_rank} are missing; rank"
                f" {manifest.rank} only repeats them."
            )
        if leader.manifest.status == "complete" and not np.array_equal(
            _cells(part), _cells(leader)
        ):
            raise TraceError(
                f"{folder}: ranks {manifest.data_rank} and {manifest.rank} are said to see the same"
                " tokens (tensor parallel) but counted different experts: they did not see the"
                " same, or the model is out of step."
            )


def _cells(part: Part) -> NDArray[np.int64]:
    cells = np.zeros(sum(layer.experts for layer in part.manifest.layers), np.int64)
    for batch in part.counts():
        cells += list_column(batch, "counts").sum(0, dtype=np.int64)
    return cells
