"""What the benchmarks share: a model, and timing in turns, so that noise meets everyone alike."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import OlmoeForCausalLM


def interleaved(
    variants: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each variant, `repeats` times; every round runs all variants, in turning order."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            variants[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, tuple[float, float]]:
    """Median over rounds of each variant's time over the baseline's, and half its middle spread."""
    base = seconds[baseline]
    found = {}
    for name, times in seconds.items():
        each = sorted(t / b for t, b in zip(times, base, strict=True))
        quarter = len(each) // 4
        spread = (each[-1 - quarter] - each[quarter]) / 2
        found[name] = (statistics.median(each), spread)
    return found


def make_model(width: int) -> OlmoeForCausalLM:
    """A random model of OLMoE's shape: 16 MoE layers, 64 experts, top-8, of any width."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

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
    return OlmoeForCausalLM(config)


def machine() -> str:
    """Processor and versions, for the table's caption."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(": ")[1] if lines else model
    return f"{model}, Python {platform.python_version()}, torch {torch.__version__}"


def report(title: str, rows: list[dict[str, Any]], command: str, json_file: Path | None) -> None:
    """Print rows as a Markdown table; with `json_file`, keep them for docs/benchmarks.md."""
    columns = list(rows[0])
    print(f"\n### {title}\n\n`{command}` on {machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[c]) for c in columns) + " |")
    if json_file is not None:
        found = {"title": title, "command": command, "machine": machine(), "rows": rows}
        json_file.write_text(json.dumps(found, indent=1) + "\n")
