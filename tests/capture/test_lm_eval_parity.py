"""The same model and questions through lm-evaluation-harness: prompts, log-likelihoods, accuracy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import equipoise
from equipoise.capture.mmlu import SUBJECTS, TAXONOMIES, QuestionSet, load_questions
from equipoise.capture.prompts import DESCRIPTION, render
from equipoise.capture.runner import run_mmlu
from tests.capture.mmlu_tools import make_model, make_questions, make_tokenizer, prompts_of

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def beside() -> Any:
    """The benchmark's module: it builds the harness's own MMLU tasks around given questions."""
    path = Path(__file__).parents[2] / "benchmarks" / "mmlu_vs_lm_eval.py"
    spec = importlib.util.spec_from_file_location("mmlu_vs_lm_eval", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compare(
    beside: Any,
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    questions: QuestionSet,
    shots: int,
    within: float = 1e-4,
) -> Any:
    """Run both; every prompt, likelihood and answer must agree. Returns our run."""
    tasks = beside.lm_eval_tasks(questions, shots)
    theirs = beside.run_lm_eval(model, tokenizer, tasks, 4, samples=True)
    with equipoise.record(model, tmp_path / "t") as recorder:
        ours = run_mmlu(model, tokenizer, recorder, questions, shots, 4)
    trace = equipoise.open(tmp_path / "t")
    rows = {(r["subject"], r["question"]): r for r in trace.sequences.to_pylist()}
    seen = 0
    for name, (subject, asked) in zip(tasks, questions.questions.items(), strict=True):
        samples = {sample["doc_id"]: sample for sample in theirs["samples"][name]}
        for question in asked:
            sample, row = samples[question.index], rows[subject, question.index]
            prompt = render(question, questions.shots(question, shots)).text
            requests = list(sample["arguments"])
            assert [context for context, _ in requests] == [prompt] * 4
            assert [letter for _, letter in requests] == [" A", " B", " C", " D"]
            likelihoods = [float(response[0][0]) for response in sample["resps"]]
            assert row["loglikelihoods"] == pytest.approx(likelihoods, abs=within)
            assert row["correct"] == bool(sample["acc"])
            seen += 1
        accuracy = trace.accuracy()["subject"][subject]["accuracy"]
        assert accuracy == pytest.approx(theirs["results"][name]["acc,none"])
    assert seen == len(questions)
    return ours


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace", "bytes", "mixed", "words"])
def test_every_likelihood_agrees_whatever_the_tokenizer(
    beside: Any, tmp_path: Path, kind: str
) -> None:
    model = make_model("olmoe", torch.float32, max_position_embeddings=8192)
    compare(beside, tmp_path, model, make_tokenizer(kind), make_questions(count=4), 3)


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next"])
def test_every_likelihood_agrees_whatever_the_family(
    beside: Any, tmp_path: Path, family: str, shots: int
) -> None:
    model, tokenizer = make_model(family, torch.float32), make_tokenizer("byte_bpe")
    # Linear attention adds up in chunks, which the prefix cache cuts at other places.
    within = 1e-3 if family == "qwen3_next" else 1e-4
    compare(beside, tmp_path, model, tokenizer, make_questions(count=4), shots, within)


def test_truncated_prompts_agree(beside: Any, tmp_path: Path) -> None:
    questions, tokenizer = make_questions(count=6), make_tokenizer("byte_bpe")
    lengths = sorted(len(tokenizer.encode(p.text)) for p in prompts_of(questions))
    model = make_model("olmoe", torch.float32, max_position_embeddings=lengths[len(lengths) // 2])
    ours = compare(beside, tmp_path, model, tokenizer, questions, 5)
    assert 0 < ours.truncated < len(questions)


def test_the_demo_agrees_on_real_questions(beside: Any, tmp_path: Path, shared_data: Any) -> None:
    load = pytest.importorskip("equipoise.capture.load")
    loaded = load.load_model("demo")
    subjects = ("anatomy", "high_school_european_history", "moral_scenarios")
    questions = load_questions(shared_data("mmlu"), subjects=subjects, limit=6)
    compare(beside, tmp_path, loaded.model, loaded.tokenizer, questions, 5)


def test_descriptions_and_categories_of_all_subjects_are_the_harness_s() -> None:
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    for subject in SUBJECTS:
        task = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())
        assert task["description"] == DESCRIPTION.format(subject=subject.replace("_", " "))
        category = task["tag"].removeprefix("mmlu_").removesuffix("_tasks")
        ours = TAXONOMIES["lm-eval"][subject]
        assert ours.lower().replace(" ", "_") == category
