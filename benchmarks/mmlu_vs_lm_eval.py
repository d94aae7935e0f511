"""MMLU questions per second, beside lm-evaluation-harness on the same model, questions and batch size.

    python benchmarks/mmlu_vs_lm_eval.py --model demo --subjects anatomy,sociology --limit 50

Each repeat runs both once, in turns, in one process. Equipoise records expert ids to disk meanwhile.
Both are timed from questions in memory to scores: rendering, encoding, running, scoring, and for
Equipoise writing and closing the trace. The table has medians; the ratio is that of each repeat.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
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


def _timed(function: Any, *args: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - begin, result


def _record(model: Any, tokenizer: Any, questions: QuestionSet, options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        with equipoise.record(model, Path(folder) / "run.trace", level="ids") as recorder:
            return run_mmlu(
                model, tokenizer, recorder, questions, options.shots, options.batch_size
            )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    subjects = options.subjects.split(",") if options.subjects else None
    questions = load_questions(
        options.data, subjects=subjects, limit=options.limit, shots=options.shots
    )
    loaded = load_model("demo" if options.model == "random" else options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    if options.model == "random":
        model = _random_model(len(tokenizer))
    tasks = lm_eval_tasks(questions, options.shots)
    seconds: dict[str, list[float]] = {"equipoise": [], "lm_eval": []}
    for _ in range(options.repeats):
        spent, harness = _timed(run_lm_eval, model, tokenizer, tasks, options.batch_size)
        seconds["lm_eval"].append(spent)
        spent, own = _timed(_record, model, tokenizer, questions, options)
        seconds["equipoise"].append(spent)
    correct = sum(
        round(harness["results"][name]["acc,none"] * len(questions.questions[subject]))
        for name, subject in zip(tasks, questions.questions, strict=True)
    )
    rates = {name: [len(questions) / s for s in spent] for name, spent in seconds.items()}
    ratios = [a / b for a, b in zip(rates["equipoise"], rates["lm_eval"], strict=True)]
    return {
        "benchmark": "mmlu_vs_lm_eval",
        "model": options.model,
        "questions": len(questions),
        "subjects": len(questions.questions),
        "shots": options.shots,
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "machine": platform.machine(),
        "versions": _versions(),
        "questions_per_second": {name: statistics.median(r) for name, r in rates.items()},
        "all_seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "correct": {"equipoise": own.correct, "lm_eval": correct},
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "lm_eval", "equipoise")}


def main() -> None:
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
    result = measure(options)
    rate = result["questions_per_second"]
    print(
        f"{result['questions']} questions, {options.shots} shots, batches of {options.batch_size}"
    )
    print(f"lm-evaluation-harness  {rate['lm_eval']:8.2f} questions/s")
    print(f"equipoise, recording   {rate['equipoise']:8.2f} questions/s")
    print(f"ratio                  {result['ratio']:8.2f}   (repeats {result['ratios']})")
    print(f"correct answers: {result['correct']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
