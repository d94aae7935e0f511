"""`record` on every architecture: encoders, decoders, modalities, routers that skip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import equipoise
from equipoise.models import discover
from tests.models.tiny import architectures, build, inputs_for, randomise_routing
from tests.models.tiny import record as heard

pytestmark = pytest.mark.slow

REFUSED = {"nllb_moe", "vitpose_backbone"}


@pytest.mark.parametrize("arch", [a for a in architectures() if a not in REFUSED])
def test_a_trace_holds_what_the_sites_deliver(arch: str, tmp_path: Path) -> None:
    model = build(arch)
    randomise_routing(model)
    inputs = inputs_for(model)
    routings = {r.path: r for r in heard(model, discover(model), **inputs)}
    with torch.no_grad(), equipoise.record(model, tmp_path / "t"):
        model(**inputs)
    trace = equipoise.open(tmp_path / "t")
    assert {layer.path for layer in trace.layers} == set(routings)
    assert (trace.recount() == trace.counts_LE).all()
    stored: dict[int, np.ndarray] = {i: b.ids[i] for b in trace.batches() for i in b.ids}
    for index, layer in enumerate(trace.layers):
        ids = routings[layer.path].expert_ids_TK
        mask = inputs["attention_mask"].reshape(-1).bool()
        own_rows = "decoder" in layer.stack or len(ids) != len(mask)
        expected = ids if own_rows else ids[mask]
        assert trace.tokens_L[index] == len(expected)
        assert trace.unrouted_L[index] == int((expected < 0).sum())
        none = np.iinfo(stored[index].dtype).max
        found = np.where(stored[index] == none, -1, stored[index].astype(np.int64))
        assert (found == expected.numpy()).all()


def test_an_encoder_and_its_decoder_keep_their_own_rows(tmp_path: Path) -> None:
    model = build("switch_transformers", "SwitchTransformersForConditionalGeneration")
    ids, mask = torch.randint(3, 250, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad(), equipoise.record(model, tmp_path / "t"):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    trace = equipoise.open(tmp_path / "t")
    rows = {layer.stack: int(n) for layer, n in zip(trace.layers, trace.tokens_L, strict=True)}
    assert rows == {"encoder.block": 14, "decoder.block": 10}
    decoder = next(b for b in trace.batches() if 1 in b.ids)
    assert decoder.position_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert decoder.sequence_T.tolist() == [0, 1] * 5
    assert decoder.phase_T.tolist() == [0, 0] + [1] * 8


def test_text_and_image_rows_of_one_layer_are_two_stacks(tmp_path: Path) -> None:
    model = build("ernie4_5_vl_moe")
    inputs = inputs_for(model)
    images = int(inputs["moe_mm_token_type_ids"].sum())
    with torch.no_grad(), equipoise.record(model, tmp_path / "t"):
        model(**inputs)
    trace = equipoise.open(tmp_path / "t")
    rows = {
        layer.stack.split(".")[-1]: n for layer, n in zip(trace.layers, trace.tokens_L, strict=True)
    }
    assert rows == {"text_moe": 32 - images, "vision_moe": images}
