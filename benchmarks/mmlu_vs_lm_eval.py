"""MMLU questions per second, beside lm-evaluation-harness on the same model, questions and batch size.

    python benchmarks/mmlu_vs_lm_eval.py --model demo --subjects anatomy,sociology --limit 50

Each round runs both once, in turns, in one process, after a round that is not counted. Both are timed
from questions in memory to scores: rendering, encoding, running, scoring; for Equipoise also recording
expert ids and writing and closing the trace. Rates are medians, the ratio that of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import equipoise
from equipoise.capture.load import load_model
from equipoise.capture.mmlu import LETTERS, QuestionSet, load_questions
from equipoise.capture.runner import run_mmlu


def lm_eval_tasks(questions: QuestionSet, shots: int) -> dict[str, Any]:
    """lm-evaluation-harness's own MMLU tasks, with these questions as their data set."""
    import lm_eval
    import yaml
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    template = yaml.safe_load((folder / "_default_template_yaml").read_text())
    tasks = {}
    for subject in questions.questions:
        own = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())
        own = {k: v for k, v in own.items() if k not in ("include", "tag", "dataset_name")}
        data = _datasets(questions, subject)
        config = (
            template | own | {"num_fewshot": shots, "custom_dataset": lambda data=data, **_: data}
        )
        tasks[own["task"]] = ConfigurableTask(config=config)
    return tasks


def _datasets(questions: QuestionSet, subject: str) -> dict[str, Any]:
    import datasets

    def table(rows: Any) -> Any:
        return datasets.Dataset.from_dict(
            {
                "question": [row.question for row in rows],
                "subject": [row.subject for row in rows],
                "choices": [list(row.choices) for row in rows],
                "answer": [LETTERS.index(row.answer) for row in rows],
            }
        )

    splits = {"test": table(questions.questions[subject])}
    if subject in questions.examples:
        splits["dev"] = table(questions.examples[subject])
    return splits


def run_lm_eval(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], batch_size: int, samples: bool = False
) -> dict[str, Any]:
    """Evaluate prepared tasks; the harness's results."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    found: dict[str, Any] = evaluate(
        lm=harness, task_dict=dict(tasks), bootstrap_iters=0, log_samples=samples
    )
    return found


def _random_model(vocabulary: int) -> Any:
    """An OLMoE-shaped model small enough for a CPU: 6 layers, 64 experts, top-8."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        eos_token_id=0,
    )
    return OlmoeForCausalLM(config).eval()


def _record(model: Any, tokenizer: Any, questions: QuestionSet, options: argparse.Namespace) -> Any:
    with (
        tempfile.TemporaryDirectory() as folder,
        equipoise.record(model, Path(folder) / "run.trace", level="ids") as recorder,
    ):
        return run_mmlu(model, tokenizer, recorder, questions, options.shots, options.batch_size)


def measure(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Run both in turns; a title and the rows of the table."""
    from common import interleaved, ratios

    subjects = options.subjects.split(",") if options.subjects else None
    questions = load_questions(options.data, "test", subjects, options.limit, shots=options.shots)
    loaded = load_model("demo" if options.model == "random" else options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    if options.model == "random":
        model = _random_model(len(tokenizer))
    tasks = lm_eval_tasks(questions, options.shots)
    last: dict[str, Any] = {}
    variants = {
        "lm-eval": lambda: last.update(
            theirs=run_lm_eval(model, tokenizer, tasks, options.batch_size)
        ),
        "equipoise": lambda: last.update(ours=_record(model, tokenizer, questions, options)),
    }
    seconds = interleaved(variants, options.repeats)
    correct = {
        "lm-eval": _correct(last["theirs"]["results"], questions),
        "equipoise": last["ours"].correct,
    }
    against = ratios(seconds, "lm-eval")
    rows = [
        {
            "runner": name,
            "questions/s": round(len(questions) / statistics.median(times), 2),
            "times lm-eval": round(1 / against[name][0], 2),
            "each round": " ".join(
                f"{base / own:.2f}" for base, own in zip(seconds["lm-eval"], times, strict=True)
            ),
            "correct": correct[name],
        }
        for name, times in seconds.items()
    ]
    title = (
        f"MMLU, {options.model} on {model.device.type}: {len(questions)} questions of "
        f"{len(questions.questions)} subjects, {options.shots} shots, batches of "
        f"{options.batch_size}, {torch.get_num_threads()} threads, lm_eval {version('lm_eval')}"
    )
    return title, rows


def _correct(results: Mapping[str, Any], questions: QuestionSet) -> int:
    return sum(
        round(results[f"mmlu_{subject}"]["acc,none"] * len(asked))
        for subject, asked in questions.questions.items()
    )


def main() -> None:
    from common import report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, random, a folder or a hub id")
    parser.add_argument("--data", default="bundled", help="bundled, or a folder of the MMLU CSVs")
    parser.add_argument("--subjects", help="names with commas between; all when left out")
    parser.add_argument("--limit", type=int, help="questions per subject")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    title, rows = measure(options)
    asked = " ".join(sys.argv[1:]).partition(" --json")[0]
    report(title, rows, f"python benchmarks/mmlu_vs_lm_eval.py {asked}", options.json)


if __name__ == "__main__":
    main()
