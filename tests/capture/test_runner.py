"""The MMLU runner against prompts run one by one, and its two ways against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import equipoise
from equipoise.capture import scoring
from equipoise.capture.mmlu import LETTERS, QuestionSet
from equipoise.capture.prompts import template_digest
from equipoise.capture.runner import MmluRun, run_mmlu
from equipoise.errors import EquipoiseError
from tests.capture.mmlu_tools import make_model, make_questions, make_tokenizer, prompts_of

QUESTIONS = make_questions()


def run(
    path: Path,
    model: Any,
    kind: str = "byte_bpe",
    questions: QuestionSet = QUESTIONS,
    resume: bool = False,
    batch_size: int = 3,
    **options: Any,
) -> tuple[MmluRun, Any]:
    with equipoise.record(model, path, resume=resume, allow_dense=True) as recorder:
        result = run_mmlu(
            model, make_tokenizer(kind), recorder, questions, batch_size=batch_size, **options
        )
    return result, equipoise.open(path)


def answers(trace: Any) -> dict[tuple[str, int], dict[str, Any]]:
    rows = trace.sequences.to_pylist()
    return {(r["subject"], r["question"]): r for r in rows if r["question"] is not None}


def naive(model: Any, tokenizer: Any, text: str, limit: int = 10**9) -> list[float]:
    """Log-likelihood of each letter: context and letter encoded together, all logits, one by one."""
    context, found = tokenizer.encode(text), []
    for letter in LETTERS:
        continuation = tokenizer.encode(f"{text} {letter}")[len(context) :]
        fed = (context + continuation)[:-1][-limit:]
        with torch.no_grad():
            logprobs = model(torch.tensor([fed])).logits[0].double().log_softmax(-1)
        places = range(len(fed) - len(continuation), len(fed))
        found.append(sum(float(logprobs[p, t]) for p, t in zip(places, continuation, strict=True)))
    return found


@pytest.mark.parametrize("kind", ["byte_bpe", "bytes", "mixed", "words"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_likelihoods_are_those_of_prompts_run_one_by_one(
    tmp_path: Path, kind: str, prefix_cache: bool
) -> None:
    model = make_model("olmoe", max_position_embeddings=8192)
    questions = make_questions(count=2)
    result, trace = run(tmp_path / "t", model, kind, questions, shots=2, prefix_cache=prefix_cache)
    assert (result.questions, result.truncated, result.notes) == (4, 0, [])
    rows = answers(trace)
    asked = [q for qs in questions.questions.values() for q in qs]
    for question, prompt in zip(asked, prompts_of(questions, 2), strict=True):
        expected = naive(model, make_tokenizer(kind), prompt.text)
        row = rows[question.subject, question.index]
        assert row["loglikelihoods"] == pytest.approx(expected, abs=1e-9)
        assert row["choice"] == LETTERS[int(np.argmax(expected))]
        assert row["correct"] == (row["choice"] == question.answer)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_cached_and_full_runs_record_the_same(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    cached, a = run(tmp_path / "a", model)
    full, b = run(tmp_path / "b", model, prefix_cache=False)
    assert cached.prefix_cache
    assert cached.notes == []
    assert not full.prefix_cache
    assert cached.tokens == full.tokens == a.tokens == b.tokens
    np.testing.assert_array_equal(a.counts_LE, b.counts_LE)
    for one, other in zip(a.sequences.to_pylist(), b.sequences.to_pylist(), strict=True):
        for row in (one, other):
            row["loglikelihoods"] = pytest.approx(row["loglikelihoods"] or [], abs=1e-9)
        assert (one.pop("loglikelihoods") is None) == (other.pop("loglikelihoods") is None)
        assert one == other
    for role in ("description", "few-shot", "question", "choices", "answer", "none"):
        left, right = a.select(role=role), b.select(role=role)
        np.testing.assert_array_equal(left.counts_LE, right.counts_LE)


def test_each_distinct_context_is_counted_once(tmp_path: Path) -> None:
    result, trace = run(tmp_path / "t", make_model())
    tokenizer = make_tokenizer("byte_bpe")
    contexts = {
        tuple(ids[: n + 1])
        for ids in (tokenizer.encode(p.text) for p in prompts_of(QUESTIONS))
        for n in range(len(ids))
    }
    few_shot = trace.select(role="few-shot").tokens
    assert 0 < few_shot < result.tokens
    # Questions of a subject may begin alike: those tokens belong to each of them.
    assert len(contexts) <= result.tokens <= len(contexts) + 3 * len(QUESTIONS)
    assert trace.tokens == result.tokens


def test_count_repeats_counts_every_prompt_whole(tmp_path: Path) -> None:
    result, trace = run(tmp_path / "t", make_model(), count_repeats=True)
    tokenizer = make_tokenizer("byte_bpe")
    total = sum(len(tokenizer.encode(p.text)) for p in prompts_of(QUESTIONS))
    assert trace.tokens == result.tokens == total
    assert not result.prefix_cache
    assert trace.sequences.num_rows == len(QUESTIONS)


def test_the_longest_prompt_of_a_subject_comes_first(tmp_path: Path) -> None:
    _, trace = run(tmp_path / "t", make_model())
    rows = [r for r in trace.sequences.to_pylist() if r["subject"] == "anatomy"]
    assert rows[0]["question"] is None
    lengths = [row["tokens"] for row in rows[1:]]
    assert lengths == sorted(lengths, reverse=True)
    assert all(row["category"] == "other" and row["split"] == "test" for row in rows)


@pytest.mark.parametrize("kind", ["byte_bpe", "mixed"])
def test_too_long_prompts_lose_their_beginning_and_are_told(tmp_path: Path, kind: str) -> None:
    model, tokenizer = make_model(max_position_embeddings=8192), make_tokenizer(kind)
    lengths = sorted(len(tokenizer.encode(p.text)) for p in prompts_of(QUESTIONS))
    limit = lengths[len(lengths) // 2] + 1
    with pytest.warns(UserWarning, match="lost their beginning"):
        result, trace = run(tmp_path / "t", model, kind, max_length=limit)
    rows = answers(trace)
    cut = 0
    for question, prompt in zip(
        [q for qs in QUESTIONS.questions.values() for q in qs], prompts_of(QUESTIONS), strict=True
    ):
        row = rows[question.subject, question.index]
        expected = naive(model, tokenizer, prompt.text, limit)
        if kind == "byte_bpe":  # else the harness cuts each letter's row by itself
            assert row["loglikelihoods"] == pytest.approx(expected, abs=1e-9)
        cut += row["tokens"] < len(tokenizer.encode(prompt.text))
        assert row["roles"][-1]["stop"] == row["tokens"] <= limit
    assert cut == result.truncated > 0
    assert trace.meta["truncated"] == result.truncated


def test_a_model_whose_state_restarts_runs_in_full_and_says_so(tmp_path: Path) -> None:
    model = make_model("olmoe")
    forward = model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:  # what a layer without a usable cache amounts to
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :]
        return forward(*args, **kwargs)

    forgetful.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    model.forward = forgetful
    with pytest.warns(UserWarning, match="differ from a full run"):
        result, trace = run(tmp_path / "a", model)
    model.forward = forward
    _, plain = run(tmp_path / "b", model, prefix_cache=False)
    assert not result.prefix_cache
    assert trace.meta["prefix_cache"] is False
    assert trace.meta["notes"] == result.notes
    np.testing.assert_array_equal(trace.counts_LE, plain.counts_LE)
    assert answers(trace) == answers(plain)


def test_a_hybrid_with_linear_attention_gives_the_same_answers_either_way(tmp_path: Path) -> None:
    model = make_model("qwen3_next")
    result, one = run(tmp_path / "a", model)
    _, other = run(tmp_path / "b", model, prefix_cache=False)
    assert result.prefix_cache
    for key, row in answers(one).items():
        assert row["loglikelihoods"] == pytest.approx(
            answers(other)[key]["loglikelihoods"], abs=1e-3
        )


def test_an_interrupt_closes_as_partial_and_resume_finishes_the_rest(tmp_path: Path) -> None:
    model = make_model()
    whole, expected = run(tmp_path / "whole", model)

    def interrupt(done: int, *_: Any) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "t", model, progress=interrupt)
    partial = equipoise.open(tmp_path / "t")
    assert partial.meta["status"] == "partial"
    assert partial.meta["task"] == "mmlu"
    before = len(answers(partial))
    assert 4 <= before < len(QUESTIONS)
    result, trace = run(tmp_path / "t", model, resume=True)
    assert result.questions == len(QUESTIONS) - before
    assert trace.meta["status"] == "complete"
    np.testing.assert_array_equal(trace.counts_LE, expected.counts_LE)
    assert trace.accuracy() == expected.accuracy()
    assert trace.tokens == whole.tokens


def test_an_interrupt_inside_a_forward_pass_loses_no_question(tmp_path: Path) -> None:
    model, calls = make_model(), []
    _, expected = run(tmp_path / "whole", model)

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "t", model, batch_size=1)
    handle.remove()
    _, trace = run(tmp_path / "t", model, resume=True)
    assert answers(trace).keys() == answers(expected).keys()
    assert trace.accuracy() == expected.accuracy()
    np.testing.assert_array_equal(trace.counts_LE, expected.counts_LE)


def test_progress_counts_questions_tokens_and_seconds(tmp_path: Path) -> None:
    told: list[tuple[int, int, int, float]] = []
    result, _ = run(tmp_path / "t", make_model(), progress=lambda *a: told.append(a))
    assert [t[0] for t in told] == [3, 5, 8, 10]
    assert {t[1] for t in told} == {10}
    assert told[-1][2] == result.tokens
    assert [t[3] for t in told] == sorted(t[3] for t in told)


@pytest.mark.parametrize("way", ["by column", "all logits"])
def test_models_that_choose_fewer_positions_score_alike(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    _, expected = run(tmp_path / "a", model, "mixed")
    before = scoring.Forward.__init__

    def limited(self: Any, model: Any) -> None:
        before(self, model)
        self._by_row = False
        self._by_column = way == "by column"

    monkeypatch.setattr(scoring.Forward, "__init__", limited)
    _, found = run(tmp_path / "b", model, "mixed")
    for key, row in answers(expected).items():
        assert answers(found)[key]["loglikelihoods"] == pytest.approx(
            row["loglikelihoods"], abs=1e-9
        )


def test_a_dense_model_has_accuracy_and_no_layers(tmp_path: Path) -> None:
    result, trace = run(tmp_path / "t", make_model("llama"))
    assert trace.layers == ()
    assert trace.accuracy()["overall"]["questions"] == result.questions == len(QUESTIONS)


def test_nan_logits_are_an_error_and_not_an_answer(tmp_path: Path) -> None:
    model = make_model("llama")
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(EquipoiseError, match=r"NaN .* anatomy question"):
        run(tmp_path / "t", model, prefix_cache=False)


def test_dev_questions_are_not_examples_of_themselves(tmp_path: Path) -> None:
    questions = make_questions(count=5)
    dev = QuestionSet("dev", "hendrycks", "made up", questions.questions, questions.questions)
    with pytest.raises(EquipoiseError, match="--shots 4 or fewer"):
        run(tmp_path / "t", make_model(), questions=dev, shots=5)
    result, trace = run(tmp_path / "u", make_model(), questions=dev, shots=4)
    assert result.questions == 10
    tokenizer = make_tokenizer("byte_bpe")
    prompt = prompts_of(dev, 4)[0].text
    assert questions.questions["anatomy"][0].question.strip() not in prompt.split("Answer:")[0]
    assert answers(trace)["anatomy", 0]["loglikelihoods"] == pytest.approx(
        naive(make_model(), tokenizer, prompt), abs=1e-9
    )


def test_how_the_questions_were_put_is_in_the_metadata(tmp_path: Path) -> None:
    _, trace = run(tmp_path / "t", make_model(), shots=2)
    expected = {
        "task": "mmlu",
        "split": "test",
        "shots": 2,
        "taxonomy": "hendrycks",
        "prompt_template": template_digest(),
        "prefix_cache": True,
        "questions": 10,
    }
    assert {key: trace.meta[key] for key in expected} == expected


def test_the_training_flag_is_as_it_was(tmp_path: Path) -> None:
    model = make_model().train()
    run(tmp_path / "t", model)
    assert model.training
    with pytest.raises(EquipoiseError, match="batch size is 0"):
        run(tmp_path / "u", model, batch_size=0)
