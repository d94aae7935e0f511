"""What recording costs: `python benchmarks/overhead.py [--repeats 9] [--json FILE]`.

An OLMoE-shaped model (16 MoE layers, 64 experts, top-8; narrower than the original, so that it fits,
which makes the overhead look larger, not smaller) with random weights on CPU: prefill of 8 x 512
tokens, and generation. Baselines in the same rounds: no recording, `output_router_logits=True`, and
the line of text per token and layer that people write by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratios, report
from transformers import OlmoeConfig, OlmoeForCausalLM

import equipoise


def make_model(width: int) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width // 2,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        eos_token_id=None,
        pad_token_id=0,
    )
    return OlmoeForCausalLM(config).eval()


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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--width", type=int, default=256, help="model width; OLMoE's is 2048")
    parser.add_argument("--passes", type=int, default=1, help="prefill passes per recording")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the writer thread has the other core, as on a busy server
    model = make_model(options.width)
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
    with tempfile.TemporaryDirectory() as folder:
        tasks = {"prefill 8 x 512": run_prefill, "generation 8 x 64": run_generate}
        for task, run in tasks.items():
            chosen = variants(model, run, Path(folder))
            seconds = interleaved(chosen, options.repeats)
            for name, (ratio, spread) in ratios(seconds, "no recording").items():
                row = rows.setdefault(name, {"variant": name})
                row[task] = f"{100 * (ratio - 1):+.1f} % ± {100 * spread:.1f}"
    command = f"python benchmarks/overhead.py --repeats {options.repeats}"
    report("Time over no recording", list(rows.values()), command, options.json)


if __name__ == "__main__":
    main()
