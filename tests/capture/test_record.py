"""`record` around a user's own loop: what is in the trace is what the model did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import equipoise
from equipoise import EquipoiseError, RoutingError, TraceError
from equipoise import nn as enn
from equipoise.capture.recorder import Off, Recorder
from tests.capture.tiny import LAYERS, TOP_K, chosen, counts, llama, olmoe, tokens

LEVELS = ["counts", "ids", "full"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return olmoe()


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_counts_equal_the_routers_own_logits(model: nn.Module, tmp_path: Path, level: str) -> None:
    batches = [tokens(2, 30, seed) for seed in range(6)]
    expected = sum(counts(chosen(model, batch)) for batch in batches)
    with equipoise.record(model, tmp_path / "t", level=level, window_tokens=100):
        for batch in batches:
            model(batch)
    trace = equipoise.open(tmp_path / "t")
    assert (trace.counts_LE == expected.numpy()).all()
    assert trace.tokens == 6 * 60
    assert trace.meta["status"] == "complete"
    assert [w.tokens_L.tolist() for w in trace.windows()] == [[120] * LAYERS] * 3
    if level != "counts":
        assert (trace.recount() == trace.counts_LE).all()


@torch.no_grad()
def test_rows_are_the_choices_in_order(model: nn.Module, tmp_path: Path) -> None:
    batch = tokens(3, 17)
    with equipoise.record(model, tmp_path / "t"):
        model(input_ids=batch)
    trace = equipoise.open(tmp_path / "t")
    assert (trace.expert_ids_TLK == chosen(model, batch).numpy()).all()
    rows = next(trace.batches())
    assert rows.sequence_T.tolist() == np.repeat([0, 1, 2], 17).tolist()
    assert rows.position_T.tolist() == list(range(17)) * 3


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_load(model: nn.Module, tmp_path: Path, side: str) -> None:
    batch, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    with equipoise.record(model, tmp_path / "t"):
        model(batch, attention_mask=mask)
    trace = equipoise.open(tmp_path / "t")
    real = chosen(model, batch, mask)[mask.reshape(-1).bool()]
    assert trace.tokens == 19
    assert (trace.expert_ids_TLK == real.numpy()).all()
    rows = next(trace.batches())
    assert rows.position_T[rows.sequence_T == 1].tolist() == list(range(7))


@torch.no_grad()
def test_batched_with_padding_counts_as_one_by_one(model: nn.Module, tmp_path: Path) -> None:
    lengths = [5, 11, 8, 3]
    batch = tokens(4, 11)
    mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    with equipoise.record(model, tmp_path / "batched"):
        model(batch, attention_mask=mask)
    with equipoise.record(model, tmp_path / "single"):
        for row, length in enumerate(lengths):
            model(batch[row : row + 1, :length])
    one, other = (equipoise.open(tmp_path / name) for name in ("batched", "single"))
    assert (one.expert_ids_TLK == other.expert_ids_TLK).all()


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generation_continues_its_sequences(model: nn.Module, tmp_path: Path, padded: bool) -> None:
    prompt, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0 if padded else 1
    with equipoise.record(model, tmp_path / "t"):
        full = model.generate(
            prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    trace = equipoise.open(tmp_path / "t")
    assert trace.select(phase="prefill").tokens == int(mask.sum())
    assert trace.select(phase="decode").tokens == 2 * 5
    seen = full[:, :-1]
    whole = torch.cat([mask, torch.ones(2, seen.shape[1] - 9, dtype=torch.long)], 1)
    expected = chosen(model, seen, whole).view(2, -1, LAYERS, TOP_K)
    found = trace.expert_ids_TLK
    rows = [(b.sequence_T.copy(), b.position_T.copy()) for b in trace.batches("ids")]
    sequence_T, position_T = (np.concatenate(x) for x in zip(*rows, strict=True))
    for row in range(2):
        here = sequence_T == row
        order = np.argsort(position_T[here])
        real = expected[row][whole[row].bool()].numpy()
        assert (np.sort(position_T[here]) == np.arange(len(real))).all()
        assert (found[here][order] == real).all()


@torch.no_grad()
def test_every_keeps_rows_of_one_sequence_in_n_and_counts_of_all(
    model: nn.Module, tmp_path: Path
) -> None:
    batch = tokens(9, 10)
    with equipoise.record(model, tmp_path / "t", every=4):
        model(batch)
    trace = equipoise.open(tmp_path / "t")
    assert trace.tokens == 90
    assert (trace.counts_LE == counts(chosen(model, batch)).numpy()).all()
    rows = next(trace.batches())
    assert sorted(set(rows.sequence_T.tolist())) == [0, 4, 8]
    assert not trace.rows_complete
    assert trace.recount().sum() == 30 * TOP_K * LAYERS


@torch.no_grad()
def test_full_keeps_weights_and_the_margin_of_the_scores(model: nn.Module, tmp_path: Path) -> None:
    batch = tokens(2, 10)
    with equipoise.record(model, tmp_path / "t", level="full"):
        output = model(batch, output_router_logits=True)
    rows = next(equipoise.open(tmp_path / "t").batches())
    for layer, logits_TE in enumerate(output.router_logits):
        ordered = logits_TE.sort(1, descending=True).values
        margin = ordered[:, TOP_K - 1] - ordered[:, TOP_K]
        assert rows.margins is not None
        assert rows.weights is not None
        np.testing.assert_allclose(rows.margins[layer], margin.numpy(), rtol=1e-5, atol=1e-6)
        top = logits_TE.softmax(1).topk(TOP_K).values
        np.testing.assert_allclose(rows.weights[layer], top.numpy(), rtol=1e-5)


def test_recomputation_counts_each_token_once(tmp_path: Path) -> None:
    """Activation checkpointing runs layers again in the backward pass: that is no load."""
    model = olmoe().train()
    model.gradient_checkpointing_enable()
    batch = tokens(2, 10)
    with equipoise.record(model, tmp_path / "t"):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    assert equipoise.open(tmp_path / "t").tokens == 20


@torch.no_grad()
def test_hooks_are_gone_afterwards_and_outputs_unchanged(model: nn.Module, tmp_path: Path) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    batch, before = tokens(1, 8), hooks()
    plain = model(batch).logits
    with pytest.raises(ZeroDivisionError), equipoise.record(model, tmp_path / "t"):
        assert torch.equal(model(batch).logits, plain)
        assert hooks() > before
        _ = 1 / 0
    assert hooks() == before
    trace = equipoise.open(tmp_path / "t")
    assert trace.meta["status"] == "partial"
    assert trace.tokens == 8


@torch.no_grad()
def test_a_pass_that_fails_is_left_out(model: nn.Module, tmp_path: Path) -> None:
    batch = tokens(1, 8)

    def fail(*_: object) -> None:
        raise OSError("broken layer")

    with equipoise.record(model, tmp_path / "t"):
        model(batch)
        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(OSError, match="broken layer"):
            model(batch)
        handle.remove()
        model(batch)
    trace = equipoise.open(tmp_path / "t")
    assert trace.tokens == 16
    assert (trace.counts_LE == 2 * counts(chosen(model, batch)).numpy()).all()


@torch.no_grad()
def test_calling_the_inner_model_is_recorded_too(model: nn.Module, tmp_path: Path) -> None:
    with equipoise.record(model, tmp_path / "t"):
        model.model(input_ids=tokens(1, 8))
    assert equipoise.open(tmp_path / "t").tokens == 8


@torch.no_grad()
def test_a_layer_called_by_itself_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with (
        equipoise.record(model, tmp_path / "t"),
        pytest.raises(RoutingError, match="outside of a forward pass"),
    ):
        model.model.layers[0].mlp(torch.zeros(1, 4, 32))


@torch.no_grad()
def test_a_router_that_is_bypassed_is_refused(tmp_path: Path) -> None:
    model = olmoe()
    with (
        equipoise.record(model, tmp_path / "t"),
        pytest.raises(RoutingError, match=r"1 of 3 routers were not heard.*layers\.1"),
    ):
        model.model.layers[1].mlp.forward = lambda hidden_states: hidden_states
        model(tokens(1, 8))


@pytest.mark.parametrize("wrong", [8, -2, 300, 65536 + 3])
@torch.no_grad()
def test_impossible_ids_stop_the_recording(tmp_path: Path, wrong: int) -> None:
    model = olmoe()
    experts = model.model.layers[1].mlp.experts
    real = experts.forward

    def corrupt(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return real(hidden, ids.clamp(0, 7), weights)

    experts.forward = corrupt
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda m, a, out: (out[0], out[1], torch.full_like(out[2], wrong)))
    with (
        pytest.raises(RoutingError, match=rf"expert {wrong}; it has experts 0 to 7"),
        equipoise.record(model, tmp_path / "t"),
    ):
        model(tokens(1, 8))
    assert equipoise.open(tmp_path / "t").tokens == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["router", "embedding"])
@torch.no_grad()
def test_nan_is_refused(tmp_path: Path, level: str, where: str) -> None:
    model = olmoe()
    if where == "router":
        model.model.layers[0].mlp.gate.weight.fill_(float("nan"))
    else:
        model.model.embed_tokens.weight[7] = float("nan")
    batch = tokens(1, 8)
    batch[0, 3] = 7
    with (
        pytest.raises(RoutingError, match="NaN in the routing weights"),
        equipoise.record(model, tmp_path / "t", level=level),
    ):
        model(batch)
    assert equipoise.open(tmp_path / "t").tokens == 0


def test_the_environment_switches_recording_off(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_TRACE", "off")
    with equipoise.record(model, tmp_path / "t") as recorder:
        assert isinstance(recorder, Off)
        with recorder.batch([recorder.add_sequence(subject="x")]):
            model(tokens(1, 4))
        recorder.complete(0, correct=True)
    assert not (tmp_path / "t").exists()


def test_a_dense_model_is_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="No router found in LlamaForCausalLM"):
        equipoise.record(llama(), tmp_path / "t")
    model = llama()
    with torch.no_grad(), equipoise.record(model, tmp_path / "t", allow_dense=True):
        model(tokens(2, 6))
    trace = equipoise.open(tmp_path / "t")
    assert trace.tokens == 12
    assert trace.layers == ()
    assert trace.counts_LE.shape == (0, 0)
    assert trace.sequences.num_rows == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "idz"}, "No level 'idz'.*Did you mean 'ids'"),
        ({"every": 0}, "every=0"),
        ({"force": True, "resume": True}, "exclude each other"),
        ({"data_rank": 3}, "data_rank is 3 on rank 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    model: nn.Module, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(EquipoiseError, match=message):
        equipoise.record(model, tmp_path / "t", **arguments)
    assert not (tmp_path / "t").exists()


def test_routers_that_give_tokens_different_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    layers = {
        "fixed": enn.MoELayer(8, 8, 4, 2),
        "free": enn.MoELayer(8, 8, 4, 2, router=enn.ExpertChoiceRouter(8, 4, 2)),
    }
    message = r"free.*4 experts, 2 on average.*the same\s+number for every token.*observe"
    with pytest.raises(RoutingError, match=message):
        equipoise.record(nn.ModuleDict(layers), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_an_existing_trace_needs_force(model: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad(), equipoise.record(model, tmp_path / "t"):
        model(tokens(1, 4))
    with (
        pytest.raises(TraceError, match="holds a trace already"),
        equipoise.record(model, tmp_path / "t"),
    ):
        pass
    with torch.no_grad(), equipoise.record(model, tmp_path / "t", force=True):
        model(tokens(1, 5))
    assert equipoise.open(tmp_path / "t").tokens == 5


def test_a_second_writer_is_refused_while_the_first_goes_on(
    model: nn.Module, tmp_path: Path
) -> None:
    with torch.no_grad(), equipoise.record(model, tmp_path / "t"):
        model(tokens(1, 4))
        with (
            pytest.raises(TraceError, match="written by another process"),
            equipoise.record(olmoe(), tmp_path / "t", force=True),
        ):
            pass
        model(tokens(1, 4))
    assert equipoise.open(tmp_path / "t").tokens == 8


# -- for runners ---------------------------------------------------------------------------------


@torch.no_grad()
def answer(model: nn.Module, recorder: Recorder, question: int, finish: bool = True) -> None:
    number = recorder.add_sequence(
        subject="law", split="test", question=question, tokens=6, roles=[("question", 0, 6)]
    )
    with recorder.batch([number], [0], [6]):
        model(tokens(1, 6, seed=question))
    if finish:
        recorder.complete(number, answer="A", choice="A", correct=True)


@torch.no_grad()
def test_a_batch_says_what_its_rows_are(model: nn.Module, tmp_path: Path) -> None:
    batch = tokens(2, 10)
    with equipoise.record(model, tmp_path / "t") as recorder:
        spans = [("description", 0, 3), ("question", 3, 8), ("choices", 8, 14)]
        first = recorder.add_sequence(subject="law", tokens=14, roles=spans)
        second = recorder.add_sequence(domain="code", tokens=7)
        with recorder.batch([first, second], starts=[4, 0], lengths=[10, 7], skip=[6, 0]):
            model(batch)
        recorder.complete(first, answer="A", choice="B", correct=False, loglikelihoods=[1.0] * 4)
    trace = equipoise.open(tmp_path / "t")
    expected = chosen(model, batch).view(2, 10, LAYERS, TOP_K)
    law = trace.select(subject="law")
    assert law.tokens == 8
    assert (law.expert_ids_TLK == expected[0, 2:].numpy()).all()
    assert law.select(role="question").tokens == 2
    assert law.select(role="choices").tokens == 6
    assert trace.select(domain="code").tokens == 7
    assert trace.select(role="none").tokens == 7
    assert trace.accuracy() == {
        "overall": {"correct": 0, "questions": 1, "accuracy": 0.0},
        "subject": {"law": {"correct": 0, "questions": 1, "accuracy": 0.0}},
        "category": {},
    }


def test_an_interrupted_run_resumes_without_counting_twice(
    model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), equipoise.record(model, tmp_path / "t") as recorder:
        for question in range(5):
            answer(model, recorder, question)
        answer(model, recorder, 5, finish=False)
        raise KeyboardInterrupt
    assert equipoise.open(tmp_path / "t").tokens == 30
    with equipoise.record(model, tmp_path / "t", resume=True) as recorder:
        assert recorder.done == {("test", "law", q) for q in range(5)}
        for question in range(5, 8):
            answer(model, recorder, question)
    trace = equipoise.open(tmp_path / "t")
    assert trace.meta["status"] == "complete"
    assert trace.meta["sessions"] == 2
    with equipoise.record(model, tmp_path / "whole") as recorder:
        for question in range(8):
            answer(model, recorder, question)
    whole = equipoise.open(tmp_path / "whole")
    assert (trace.counts_LE == whole.counts_LE).all()
    assert (trace.expert_ids_TLK == whole.expert_ids_TLK).all()
    assert trace.sequences["question"].to_pylist() == list(range(8))
    assert trace.sequences["sequence"].to_pylist() == list(range(8))
    with (
        pytest.raises(TraceError, match="is complete: there is nothing to resume"),
        equipoise.record(model, tmp_path / "t", resume=True),
    ):
        pass


def test_resuming_with_another_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), equipoise.record(model, tmp_path / "t") as recorder:
        answer(model, recorder, 0)
        raise KeyboardInterrupt
    with (
        pytest.raises(TraceError, match="cannot be resumed: its layers differ"),
        equipoise.record(olmoe(num_experts=16), tmp_path / "t", resume=True),
    ):
        pass


KILLED = """
import os, signal, sys, torch, equipoise
from tests.capture.tiny import olmoe, tokens
torch.set_num_threads(1)
model = olmoe()
with torch.no_grad(), equipoise.record(model, sys.argv[1], window_tokens=64) as recorder:
    for step in range(10**6):
        model(tokens(2, 16, seed=step))
        if recorder.tokens >= 64 * 20:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_by_sigkill_reopens(model: nn.Module, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "t")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    trace = equipoise.open(tmp_path / "t")
    assert trace.meta["status"] == "partial"
    windows = trace.tokens // 64
    assert windows >= 20
    assert trace.tokens == windows * 64
    with torch.no_grad():
        expected = sum(counts(chosen(model, tokens(2, 16, seed=s))) for s in range(windows * 2))
    assert (trace.counts_LE == expected.numpy()).all()
    assert (trace.recount() == trace.counts_LE).all()


@torch.no_grad()
def test_a_mask_that_is_written_over_counts_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    with equipoise.record(model, tmp_path / "t"):
        mask[:, 3:] = 0
        model(ids, attention_mask=mask)
        mask.fill_(1)
        model(ids, attention_mask=mask)
    assert equipoise.open(tmp_path / "t").tokens == 6 + 10


@pytest.mark.parametrize("level", ["ids", "full"])
def test_inference_mode_and_others_take_turns(model: nn.Module, tmp_path: Path, level: str) -> None:
    modes = [torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode]
    with equipoise.record(model, tmp_path / "t", level=level):
        for step, mode in enumerate(modes):
            with mode():
                model(tokens(2, 5, seed=step))
    expected = counts(torch.cat([chosen(model, tokens(2, 5, seed=step)) for step in range(4)]))
    assert (equipoise.open(tmp_path / "t").counts_LE == expected.numpy()).all()


@torch.no_grad()
def test_ids_may_be_written_over_after_the_experts_had_them(
    model: nn.Module, tmp_path: Path
) -> None:
    expected = counts(chosen(model, tokens(2, 5)))

    def spoil(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        args[1].fill_(0)

    with equipoise.record(model, tmp_path / "t"):
        hooks = [layer.mlp.experts.register_forward_hook(spoil) for layer in model.model.layers]
        model(tokens(2, 5))
        for hook in hooks:
            hook.remove()
    assert (equipoise.open(tmp_path / "t").counts_LE == expected.numpy()).all()


@torch.no_grad()
def test_memory_stays_bounded(model: nn.Module, tmp_path: Path) -> None:
    with equipoise.record(model, tmp_path / "t", window_tokens=64) as recorder:
        for step in range(200):
            model(tokens(1, 32, seed=step))
            assert not len(recorder._book)
            assert sum(map(len, recorder._writer.arena._chunks)) <= 2**20
    assert equipoise.open(tmp_path / "t").tokens == 6400


@torch.no_grad()
def test_provenance_is_in_the_trace(model: nn.Module, tmp_path: Path) -> None:
    with equipoise.record(model, tmp_path / "t", meta={"task": "mine"}):
        model(tokens(1, 8))
    meta = equipoise.open(tmp_path / "t").meta
    assert meta["family"] == "olmoe"
    assert meta["config_digest"].startswith("sha256:")
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["device"] == "cpu"
    assert meta["dtype"] == "float32"
    assert meta["task"] == "mine"
    assert meta["tokens_per_second"] > 0
    assert meta["peak_host_bytes"] > 10**7
    assert meta["started"] <= meta["ended"]
    json.dumps(meta, allow_nan=False)


def test_an_empty_recording_is_warned_of(model: nn.Module, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="Nothing ran while"),
        equipoise.record(model, tmp_path / "t"),
    ):
        pass
    assert equipoise.open(tmp_path / "t").tokens == 0


def test_resuming_another_task_is_refused(model: nn.Module, tmp_path: Path) -> None:
    first, second = ({"options": {"subjects": subjects}} for subjects in (None, "law"))
    with (
        pytest.raises(KeyboardInterrupt),
        equipoise.record(model, tmp_path / "t", meta=first) as recorder,
    ):
        answer(model, recorder, 0)
        raise KeyboardInterrupt
    with (
        pytest.raises(TraceError, match="started with subjects None, not 'law'"),
        equipoise.record(model, tmp_path / "t", meta=second, resume=True),
    ):
        pass
    with equipoise.record(model, tmp_path / "t", meta=first, resume=True) as recorder:
        answer(model, recorder, 1)
    assert equipoise.open(tmp_path / "t").tokens == 12


@torch.no_grad()
def test_generation_in_a_labelled_batch_goes_on_from_its_prompt(
    model: nn.Module, tmp_path: Path
) -> None:
    prompt = tokens(2, 7)
    with equipoise.record(model, tmp_path / "t") as recorder:
        numbers = [recorder.add_sequence(domain=name, roles=[("text", 0, 7)]) for name in "ab"]
        with recorder.batch(numbers, lengths=[7, 7]):
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
            )
        model(tokens(1, 3))  # unlabelled, between two batches
        with recorder.batch(numbers[:1], lengths=[5]):
            model(tokens(1, 5))
    trace = equipoise.open(tmp_path / "t")
    only_a = trace.select(domain="a")
    assert only_a.select(phase="prefill").tokens == 7 + 5
    assert only_a.select(phase="decode").tokens == 3
    assert only_a.select(role="text").tokens == 7 + 5
    decode = next(trace.select(domain="b", phase="decode").batches())
    assert decode.position_T.tolist() == [7, 8, 9]
    assert trace.tokens == 2 * 10 + 3 + 5


@torch.no_grad()
def test_layers_of_one_stack_with_different_rows_are_refused(tmp_path: Path) -> None:
    model = olmoe()
    block = model.model.layers[1].mlp
    real = block.forward

    def half(hidden_states: torch.Tensor) -> torch.Tensor:
        real(hidden_states[:, :4])
        return hidden_states

    with (
        pytest.raises(RoutingError, match="routed 4 rows in a pass in which its stack routed 8"),
        equipoise.record(model, tmp_path / "t"),
    ):
        block.forward = half
        model(tokens(1, 8))
    assert equipoise.open(tmp_path / "t").tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "ran before recording"])
@torch.no_grad()
def test_a_compiled_model_is_recorded_as_the_eager_one(tmp_path: Path, ran_before: bool) -> None:
    model = olmoe()
    batch = tokens(2, 12)
    expected = chosen(model, batch).numpy()
    compiled = torch.compile(model, backend="aot_eager")
    if ran_before:
        compiled(batch)
    with equipoise.record(compiled, tmp_path / "t"):
        compiled(batch)
        compiled(batch)
    torch.compiler.reset()
    trace = equipoise.open(tmp_path / "t")
    assert trace.tokens == 48
    assert (trace.expert_ids_TLK == np.concatenate([expected, expected])).all()
