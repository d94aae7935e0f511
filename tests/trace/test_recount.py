"""The recount of stored rows equals a naive count, from a file and in memory, and names what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import equipoise
from equipoise import EquipoiseError, Trace
from equipoise.metrics import counting
from equipoise.trace import recount as recount_module

EXPERTS = {"bytes": [64, 64, 64], "words": [300, 512, 257], "mixed": [64, 300, 8]}


def routed(experts: list[int], tokens: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(0, e, (tokens, 4)) for e in experts], 1)
    ids[rng.random(ids.shape) < 0.001] = -1
    return ids


def naive(ids: np.ndarray, experts: list[int]) -> list[list[int]]:
    counts = [np.bincount(x[x >= 0], minlength=max(experts)) for x in ids.swapaxes(0, 1)]
    return [count.tolist() for count in counts]


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_stored_trace_is_recounted_in_file_and_in_memory(tmp_path: Path, kind: str) -> None:
    ids, experts = routed(EXPERTS[kind]), EXPERTS[kind]
    memory = Trace.from_arrays(ids, num_experts=experts)
    stored = equipoise.open(memory.save(tmp_path / "run.trace"))
    assert memory.recount().tolist() == naive(ids, experts)
    assert stored.recount().tolist() == naive(ids, experts)
    assert stored.select(layers=[2]).recount().tolist() == naive(ids[:, 2:], experts[2:])


def test_all_layers_of_a_stored_batch_are_counted_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = equipoise.open(
        Trace.from_arrays(routed([64, 64, 64]), num_experts=64).save(tmp_path / "run.trace")
    )
    calls = []

    def counted(*arguments: object) -> int | None:
        calls.append(len(arguments[1]))  # type: ignore[arg-type]
        return counting.count_columns(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(recount_module, "count_columns", counted)
    stored.recount()
    assert calls == [3] * len(list(stored.batches()))


@pytest.mark.parametrize(("experts", "wrong"), [(64, 65), (300, 301)])
def test_an_impossible_id_in_a_file_is_named(tmp_path: Path, experts: int, wrong: int) -> None:
    ids = np.arange(800).reshape(100, 2, 4) % experts
    folder = Trace.from_arrays(ids, num_experts=experts).save(tmp_path / "run.trace")
    path = folder / "tokens-r00000.arrow"
    dtype = np.uint8 if experts < 256 else np.uint16
    data = path.read_bytes()
    place = data.index(ids[:, 1].astype(dtype).tobytes())
    broken = data[:place] + np.array([wrong], dtype).tobytes() + data[place + dtype().itemsize :]
    path.write_bytes(broken)
    with pytest.raises(EquipoiseError, match=f"expert id {wrong} in a layer of {experts} experts"):
        equipoise.open(folder).recount()
