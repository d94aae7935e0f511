"""`equipoise trace`: run a task through a model and record its routing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.cli.common import say, say_next, size_of
from equipoise.cli.progress import progress


def trace(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="Hub id, local folder, 'demo' or 'demo-balanced'.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write the trace to.")
    ] = Path("run.trace"),
    task: Annotated[str, typer.Option(help="mmlu or text.")] = "mmlu",
    data: Annotated[
        str | None,
        typer.Option(
            help="mmlu: folder of the original CSVs, or 'bundled'; left out, the hub's cais/mmlu."
            " text: a file, a folder (domain = sub-folder or file), or JSONL.",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[int, typer.Option(help="mmlu: examples before each question, 0 to 5.")] = 5,
    subjects: Annotated[
        str | None, typer.Option(help="mmlu: only these (comma between).", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="mmlu: test, val or dev.")] = "test",
    taxonomy: Annotated[str, typer.Option(help="mmlu categories: hendrycks or lm-eval.")] = (
        "hendrycks"
    ),
    limit: Annotated[
        int | None,
        typer.Option(help="Questions per subject, documents per domain.", show_default=False),
    ] = None,
    field: Annotated[str, typer.Option(help="text: JSONL field of the text.")] = "text",
    domain_field: Annotated[
        str | None, typer.Option(help="text: JSONL field of the domain.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest prompt or piece of text, in tokens.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    level: Annotated[
        str, typer.Option(help="counts; ids of every token; full = ids, weights, margins.")
    ] = "ids",
    every: Annotated[int, typer.Option(help="Keep token rows of one sequence in N.")] = 1,
    count_repeats: Annotated[
        bool, typer.Option("--count-repeats", help="Count a subject's prefix in every question.")
    ] = False,
    prefix_cache: Annotated[
        bool, typer.Option(help="Run a subject's few-shot prefix once and keep its cache.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    experts: Annotated[
        str | None,
        typer.Option(
            help="Experts' implementation: eager, batched_mm, grouped_mm.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads for the model.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished trace.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run MMLU or any text through a model and record which experts every token goes to.

    Examples:

      equipoise trace demo --task mmlu --data bundled -o run.trace

      equipoise trace allenai/OLMoE-1B-7B-0924 --data path/to/mmlu --shots 5

      equipoise trace ./model --task text --data corpus/ --level counts
    """
    _check(output, task, level, force, resume)
    _check_options_of_task(context, task)
    _check_loading(device, dtype, experts)
    _check_numbers(batch_size=batch_size, every=every, threads=threads, max_length=max_length)
    _check_place(output)
    options = {
        "model": model,
        "task": task,
        "data": data,
        "limit": limit,
        "max_length": max_length,
        **(
            {
                "shots": shots,
                "subjects": subjects,
                "split": split,
                "taxonomy": taxonomy,
                "count_repeats": count_repeats,
            }
            if task == "mmlu"
            else {"field": field, "domain_field": domain_field}
        ),
    }
    work = _mmlu(data, split, subjects, limit, shots, taxonomy) if task == "mmlu" else None
    documents = _text(data, field, domain_field, limit) if task == "text" else None
    from equipoise.capture.load import find_model, load_model

    find_model(model, revision)
    say(f"Loading {model} ...")
    loaded = load_model(
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        revision=revision,
        experts_implementation=experts,
    )
    for note in loaded.notes:
        say(f"note: {note}")
    import torch
    from transformers.utils import logging

    from equipoise.capture.recorder import record

    logging.set_verbosity_error()  # what matters to the user is in the notes

    if threads:
        torch.set_num_threads(threads)
    recorder = record(
        loaded.model,
        output,
        level=level,
        every=every,
        force=force,
        resume=resume,
        allow_dense=True,
        meta={**loaded.meta(), "options": options},
    )
    say(_describe(recorder))
    with _finished(recorder, output), recorder, _progress(quiet, task) as progress:
        if resume and recorder.done:
            say(f"Resuming {output}: {len(recorder.done):,} sequences are there already.")
        shared = {"max_length": max_length, "progress": progress}
        if work is not None:
            shared |= {"prefix_cache": prefix_cache, "count_repeats": count_repeats}
            _run_mmlu(loaded, recorder, work, shots, batch_size, shared)
        else:
            _run_text(loaded, recorder, documents or [], batch_size, shared)


def _run_mmlu(
    loaded: Any, recorder: Any, work: Any, shots: int, batch_size: int, more: dict[str, Any]
) -> None:
    from equipoise.capture.runner import run_mmlu

    run_mmlu(loaded.model, loaded.tokenizer, recorder, work, shots, batch_size, **more)


def _run_text(
    loaded: Any, recorder: Any, documents: Any, batch_size: int, more: dict[str, Any]
) -> None:
    from equipoise.capture.text import run_text

    run_text(loaded.model, loaded.tokenizer, recorder, documents, batch_size, **more)


def _check(output: Path, task: str, level: str, force: bool, resume: bool) -> None:
    """Everything that can be known before torch is loaded."""
    from equipoise.errors import EquipoiseError, nearest
    from equipoise.trace.schema import LEVELS, OFF

    for name, value, allowed in (("task", task, ("mmlu", "text")), ("level", level, LEVELS)):
        if value not in allowed:
            raise EquipoiseError(
                f"No {name} {value!r}: allowed are {', '.join(allowed)}." + nearest(value, allowed)
            )
    if os.environ.get("EQUIPOISE_TRACE", "").lower() in OFF:
        raise EquipoiseError(
            "EQUIPOISE_TRACE=off is set in the environment, so nothing would be recorded: unset it."
        )
    if force and resume:
        raise EquipoiseError("--force and --resume exclude each other: overwrite, or go on.")
    if (output / "trace.json").exists() and not (force or resume):
        raise EquipoiseError(
            f"{output} exists. Use --force to overwrite it, --resume to go on with an unfinished"
            " run, or another -o."
        )
    if resume and not (output / "trace.json").exists():
        raise EquipoiseError(f"{output} does not exist: there is nothing to resume.")


OF_TASK = {
    "mmlu": ("shots", "subjects", "split", "taxonomy", "count_repeats", "prefix_cache"),
    "text": ("field", "domain_field"),
}
"""Options that mean something for one task only."""
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def _check_options_of_task(context: typer.Context, task: str) -> None:
    """An option of the other task would be ignored: say so instead."""
    from equipoise.errors import EquipoiseError

    for other, names in OF_TASK.items():
        for name in names:
            source = context.get_parameter_source(name)
            if other != task and source is not None and source.name == "COMMANDLINE":
                option = "--" + name.replace("_", "-")
                raise EquipoiseError(
                    f"{option} belongs to --task {other}; with --task {task} it does nothing: "
                    "leave it out."
                )


def _check_loading(device: str, dtype: str, experts: str | None) -> None:
    from equipoise.capture.load import DTYPES
    from equipoise.errors import EquipoiseError, nearest

    for name, value, allowed in (("dtype", dtype, DTYPES), ("experts", experts, EXPERTS)):
        if value is not None and value not in allowed:
            raise EquipoiseError(
                f"No --{name} {value!r}: allowed are {', '.join(allowed)}."
                + nearest(value, allowed)
            )
    kinds = ("auto", "cpu", "cuda", "mps", "xpu")
    if device.partition(":")[0] not in kinds:
        raise EquipoiseError(
            f"No --device {device!r}: allowed are {', '.join(kinds)}, with a number as in cuda:1."
            + nearest(device, kinds)
        )


def _check_numbers(**numbers: int | None) -> None:
    from equipoise.errors import EquipoiseError

    for name, number in numbers.items():
        if number is not None and number < 1:
            option = "--" + name.replace("_", "-")
            raise EquipoiseError(f"{option} is {number}; it must be at least 1.")


def _check_place(output: Path) -> None:
    """That the output can be made, before a model is loaded for an hour."""
    from equipoise.errors import EquipoiseError

    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if output.exists() and not output.is_dir():
        raise EquipoiseError(f"{output} is a file; a trace is a folder. Choose another -o.")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EquipoiseError(f"{output} cannot be made: {parent} may not be written to.")


def _mmlu(
    data: str | None,
    split: str,
    subjects: str | None,
    limit: int | None,
    shots: int,
    taxonomy: str,
) -> Any:
    from equipoise.capture.mmlu import load_questions
    from equipoise.errors import EquipoiseError

    names = None if subjects is None else [n.strip() for n in subjects.split(",") if n.strip()]
    if names is not None and not names:
        raise EquipoiseError("--subjects is empty: name some, or leave it out for all 57.")
    questions = load_questions(data, split, names, limit, shots=shots, taxonomy=taxonomy)
    questions.require_shots(shots)
    return questions


def _text(data: str | None, field: str, domain_field: str | None, limit: int | None) -> Any:
    from equipoise.capture.text import load_text
    from equipoise.errors import EquipoiseError

    if data is None:
        raise EquipoiseError("--task text needs --data: a file, a folder, or JSONL.")
    return load_text(data, field=field, domain_field=domain_field, limit=limit)


def _describe(recorder: Any) -> str:
    layers = recorder.manifest.layers
    if not layers:
        return "Dense model (no router): the trace will hold accuracy and speed, and no layers."
    shapes = {(layer.experts, layer.top_k) for layer in layers}
    kinds = ", ".join(f"{experts} experts, top-{top_k}" for experts, top_k in sorted(shapes))
    return f"{len(layers)} of {len(layers)} MoE layers attached: {kinds}."


@contextmanager
def _finished(recorder: Any, output: Path) -> Iterator[None]:
    """Say what was written, also when the run was stopped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        except KeyboardInterrupt:
            say(f"\nStopped. {output} is partial and readable; go on with --resume.")
            raise
    meta = recorder.manifest.meta
    for note in meta.get("notes", []):
        say(f"note: {note}")
    speed = meta.get("tokens_per_second")
    say(
        f"{meta.get('recorded_tokens', 0):,} tokens recorded"
        + (f", {speed:,.0f} tokens/s." if speed else ".")
    )
    say_next(["equipoise", "stats", output], after=f"Wrote {output} ({size_of(output)}).")


@contextmanager
def _progress(quiet: bool, task: str) -> Iterator[Callable[[int, int, int, float], None] | None]:
    """What the runners call: done, total, tokens and seconds so far."""
    with progress("questions" if task == "mmlu" else "pieces", quiet=quiet) as update:
        if update is None:
            yield None
            return

        def shown(done: int, total: int, tokens: int, seconds: float) -> None:
            speed = tokens / seconds if seconds else 0.0
            left = seconds / done * (total - done) if done else 0.0
            update(done, total, f"{speed:,.0f} tokens/s", left)

        yield shown
