"""What recording costs: `python benchmarks/overhead.py [--repeats 5] [--wall] [--json FILE]`.

An OLMoE-shaped model (16 MoE layers, 64 experts, top-8; narrower than the original, so that it fits,
which makes the share of recording larger, not smaller) with random weights, on one CPU thread: prefill of
8 x 512 tokens, and generation. Baselines: `output_router_logits=True`, whose cost is the loss that
transformers then computes, and the line of text per token that people write by hand.

By default the cost is accounted for: processor time spent in hooks (or in that loss), over the processor
time of the rest of the run, both measured in the same seconds, so that a noisy machine does not matter.
The writer thread's time, which another core may take, stands beside it. With `--wall`, whole runs are
timed against runs without recording, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import interleaved, make_model, ratios, report
from transformers import OlmoeForCausalLM
from transformers.models.olmoe import modeling_olmoe

import equipoise


@contextlib.contextmanager
def text_log(model: OlmoeForCausalLM, path: Path) -> Iterator[None]:
    """The logger that people write by hand: a hook on every router, a line per token."""
    with path.open("w") as file, contextlib.ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):

            def write(module: Any, args: Any, output: Any, number: int = number) -> None:
                for token, experts in enumerate(output[2].tolist()):
                    file.write(f"{number} {token} {' '.join(map(str, experts))}\n")

            stack.callback(layer.mlp.gate.register_forward_hook(write).remove)
        yield


def variants(
    model: OlmoeForCausalLM, run: Callable[..., Any], folder: Path
) -> dict[str, Callable[[], Any]]:
    def recorded(level: str) -> Callable[[], Any]:
        def call() -> None:
            with equipoise.record(model, folder / f"{level}.trace", level=level, force=True):
                run()

        return call

    def by_hand() -> None:
        with text_log(model, folder / "log.txt"):
            run()

    return {
        "no recording": run,
        "no recording, again (noise)": run,
        "record, counts": recorded("counts"),
        "record, ids": recorded("ids"),
        "record, full": recorded("full"),
        "output_router_logits=True": lambda: run(output_router_logits=True),
        "text line per token, by hand": by_hand,
    }


class Account:
    """Processor time of this thread inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to this account."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begin

        return timed


@contextlib.contextmanager
def hooks_timed(account: Account) -> Iterator[None]:
    """Every hook that is registered inside is timed."""
    names = ("register_forward_hook", "register_forward_pre_hook")
    real = {name: getattr(torch.nn.Module, name) for name in names}
    for name, register in real.items():

        def timed(self: Any, hook: Any, _register: Any = register, **kwargs: Any) -> Any:
            return _register(self, account.wrap(hook), **kwargs)

        setattr(torch.nn.Module, name, timed)
    try:
        yield
    finally:
        for name, register in real.items():
            setattr(torch.nn.Module, name, register)


def accounted(
    model: OlmoeForCausalLM, run: Callable[..., Any], folder: Path, repeats: int
) -> dict[str, tuple[float, float]]:
    """Of each variant, shares of the run's time: in the model's thread, and in the writer's."""
    found = {}
    for level in ("counts", "ids", "full"):
        hooks, writer = Account(), Account()
        with hooks_timed(hooks):
            recorder = equipoise.record(model, folder / "t", level=level, force=True)
            recorder.__enter__()
        recorder._writer._write = writer.wrap(recorder._writer._write)
        begin = time.thread_time()
        for _ in range(repeats):
            run()
        total = time.thread_time() - begin
        recorder.close()
        rest = total - hooks.seconds
        found[f"record, {level}"] = (hooks.seconds / rest, writer.seconds / rest)
    loss, name = Account(), "load_balancing_loss_func"
    real = getattr(modeling_olmoe, name)
    setattr(modeling_olmoe, name, loss.wrap(real))
    found["output_router_logits=True"] = _share(
        loss, lambda: run(output_router_logits=True), repeats
    )
    setattr(modeling_olmoe, name, real)
    by_hand = Account()
    with hooks_timed(by_hand), text_log(model, folder / "log.txt"):
        found["text line per token, by hand"] = _share(by_hand, run, repeats)
    return found


def _share(account: Account, run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    begin = time.thread_time()
    for _ in range(repeats):
        run()
    return account.seconds / (time.thread_time() - begin - account.seconds), 0.0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wall", action="store_true", help="time whole runs, in turns")
    parser.add_argument("--width", type=int, default=256, help="model width; OLMoE's is 2048")
    parser.add_argument("--passes", type=int, default=1, help="prefill passes per recording")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the writer thread has the other core, as on a busy server
    model = make_model(options.width).eval()
    prefill = torch.randint(2, 8000, (8, 512))
    prompt, mask = prefill[:, :32], torch.ones(8, 32, dtype=torch.long)

    def run_prefill(**kwargs: Any) -> None:
        for _ in range(options.passes):
            model(prefill, use_cache=False, logits_to_keep=1, **kwargs)

    def run_generate(**kwargs: Any) -> None:
        model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=64,
            do_sample=False,
            return_dict_in_generate=bool(kwargs),
            **kwargs,
        )

    rows: dict[str, dict[str, Any]] = {}
    tasks = {"prefill 8 x 512": run_prefill, "generation 8 x 64": run_generate}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, run in tasks.items():
            if options.wall:
                seconds = interleaved(variants(model, run, folder), options.repeats)
                for variant, (ratio, spread) in ratios(seconds, "no recording").items():
                    row = rows.setdefault(variant, {"variant": variant})
                    row[task] = f"{100 * (ratio - 1):+.1f} % ± {100 * spread:.1f}"
                continue
            with equipoise.record(model, folder / "t", force=True):  # compiles the writer's loops
                run()
            for variant, (main, writer) in accounted(model, run, folder, options.repeats).items():
                row = rows.setdefault(variant, {"variant": variant})
                row[task] = f"{100 * main:.2f} %"
                row[f"{task}, writer thread"] = f"{100 * writer:.2f} %" if writer else "-"
    title = "Time over no recording" if options.wall else "Cost of recording, of the run without it"
    command = f"python benchmarks/overhead.py --repeats {options.repeats}"
    report(title, list(rows.values()), command + " --wall" * options.wall, options.json)


if __name__ == "__main__":
    main()
