"""Two processes (gloo): their parts make the trace that one process makes, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import equipoise
from equipoise import TraceError
from tests.capture.tiny import olmoe, tokens
from tests.torchrun import torchrun

BATCHES = 6

WORKER = f"""
import os, sys, torch, torch.distributed as dist, equipoise
from tests.capture.tiny import olmoe, tokens
from tests.torchrun import leave
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mode, path = dist.get_rank(), sys.argv[1], sys.argv[2]
model = olmoe()
if mode == "tensor":
    from transformers.distributed import DistributedConfig
    plan = DistributedConfig(tp_plan="auto")
    model = type(model).from_pretrained(path + "-model", distributed_config=plan).eval()
    assert type(model.model.layers[0].mlp.experts.gate_up_proj).__name__ == "DTensor"
seeds = range({BATCHES}) if mode != "data" else range(rank, {BATCHES}, 2)
seeds = [s + 100 * rank for s in seeds] if mode == "torn" else seeds
wanted = {{"torn": 0}}.get(mode)
with torch.no_grad(), equipoise.record(model, path, window_tokens=50, data_rank=wanted) as recorder:
    for seed in seeds:
        number = recorder.add_sequence(subject=f"s{{seed % 3}}", question=seed, tokens=20)
        with recorder.batch([number], [0], [20]):
            model(tokens(1, 20, seed=seed))
        recorder.complete(number, correct=seed % 2 == 0)
leave()
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> equipoise.Trace:
    model, path = olmoe(), tmp_path_factory.mktemp("single") / "t"
    with torch.no_grad(), equipoise.record(model, path) as recorder:
        for seed in range(BATCHES):
            number = recorder.add_sequence(subject=f"s{seed % 3}", question=seed, tokens=20)
            with recorder.batch([number], [0], [20]):
                model(tokens(1, 20, seed=seed))
            recorder.complete(number, correct=seed % 2 == 0)
    return equipoise.open(path)


def recorded(mode: str, path: Path) -> equipoise.Trace:
    script = path.parent / "worker.py"
    script.write_text(WORKER)
    torchrun(script, mode, path)
    return equipoise.open(path)


@pytest.mark.distributed
def test_data_parallel_ranks_add_up_to_one_process(single: equipoise.Trace, tmp_path: Path) -> None:
    both = recorded("data", tmp_path / "t")
    assert both.meta["world_size"] == 2
    assert both.meta["status"] == "complete"
    assert (both.counts_LE == single.counts_LE).all()
    assert (both.recount() == single.counts_LE).all()
    assert both.accuracy() == single.accuracy()
    for subject in ("s0", "s1", "s2"):
        one, two = (t.select(subject=subject) for t in (single, both))
        assert (one.counts_LE == two.counts_LE).all()
        assert (two.recount() == two.counts_LE).all()
    numbers = both.sequences["sequence"].to_pylist()
    assert len(set(numbers)) == BATCHES
    (tmp_path / "t" / "trace-r00001.json").unlink()
    alone = equipoise.open(tmp_path / "t")
    assert alone.meta["status"] == "partial"
    assert alone.meta["missing_ranks"] == [1]


@pytest.mark.distributed
def test_ranks_that_see_the_same_tokens_count_once(single: equipoise.Trace, tmp_path: Path) -> None:
    """Real tensor parallelism: transformers shards attention and experts over both ranks."""
    olmoe().save_pretrained(tmp_path / "t-model")
    both = recorded("tensor", tmp_path / "t")
    assert (both.counts_LE == single.counts_LE).all()
    assert (both.expert_ids_TLK == single.expert_ids_TLK).all()
    assert both.sequences.num_rows == BATCHES
    assert both.accuracy() == single.accuracy()


@pytest.mark.distributed
def test_ranks_said_to_see_the_same_tokens_that_did_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="ranks 0 and 1 are said to see the same tokens"):
        recorded("torn", tmp_path / "t")
