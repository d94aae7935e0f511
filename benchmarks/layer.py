"""The layer against transformers': `python benchmarks/layer.py [--repeats 9] [--wall] [--json FILE]`.

Forward and backward of `nn.MoELayer` over those of transformers' OLMoE block with grouped products
(`_experts_implementation="grouped_mm"`), with the same weights and tokens, and the bytes that each keeps
from forward for backward. Both take turns within one run.

By default on one thread, in processor time, so that other work on the machine does not matter. With
`--wall`, time on the clock with all of torch's threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratios, report
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from equipoise.nn.layer import MoELayer

SHAPES = {
    "OLMoE / 8, 512 tokens": (256, 128, 64, 8, 512),
    "OLMoE / 8, 4096 tokens": (256, 128, 64, 8, 4096),
    "OLMoE / 4, 2048 tokens": (512, 256, 64, 8, 2048),
    "OLMoE / 2, 512 tokens": (1024, 512, 64, 8, 512),
    "256 experts, 1024 tokens": (256, 128, 256, 8, 1024),
    "8 wide experts, top-2": (512, 1792, 8, 2, 512),
    "tiny": (128, 64, 16, 4, 256),
}


def pair(width: int, inner: int, experts: int, top_k: int) -> tuple[torch.nn.Module, MoELayer]:
    """Transformers' block and ours with the same weights."""
    config = OlmoeConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    theirs, ours = OlmoeSparseMoeBlock(config), MoELayer(width, inner, experts, top_k)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ours.experts.load_state_dict(theirs.experts.state_dict())
    ours.gate.load_state_dict(theirs.gate.state_dict())
    return theirs, ours


def run(module: torch.nn.Module, hidden: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    module.zero_grad()
    hidden.grad = None
    out = module(hidden)
    out.backward(grad)
    return out


def kept_megabytes(module: torch.nn.Module, hidden: torch.Tensor) -> float:
    """Size of the floating-point storages kept for backward, parameters and input apart."""
    known = {x.untyped_storage().data_ptr() for x in (*module.parameters(), hidden)}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(hidden)
    del out
    return sum(kept.values()) / 1e6


def of_processor(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds as `interleaved` gives them, of this thread's processor time."""
    spent: dict[str, list[float]] = {name: [] for name in variants}

    def timed(name: str) -> Callable[[], None]:
        def call() -> None:
            begin = time.thread_time()
            variants[name]()
            spent[name].append(time.thread_time() - begin)

        return call

    interleaved({name: timed(name) for name in variants}, repeats)
    return {name: seconds[-repeats:] for name, seconds in spent.items()}


def row(name: str, shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, str]:
    """One line of the table."""
    width, inner, experts, top_k, tokens = shape
    theirs, ours = pair(width, inner, experts, top_k)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    grad = torch.randn(1, tokens, width)
    wanted, found = run(theirs, hidden, grad), run(ours, hidden, grad)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    modules = {"transformers": theirs, "ours": ours, "transformers, again": theirs}
    variants = {key: lambda m=m: run(m, hidden, grad) for key, m in modules.items()}
    measure = interleaved if options.wall else of_processor
    relative = ratios(measure(variants, options.repeats), "transformers")
    shares = {key: f"{ratio:.2f} ± {spread:.2f}" for key, (ratio, spread) in relative.items()}
    before, after = kept_megabytes(theirs, hidden), kept_megabytes(ours, hidden)
    return {
        "shape": name,
        "D, F, E, K": f"{width}, {inner}, {experts}, {top_k}",
        "time over transformers'": shares["ours"],
        "transformers' again (noise)": shares["transformers, again"],
        "kept for backward, MB": f"{after:.0f}",
        "of transformers', MB": f"{before:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--wall", action="store_true", help="time on the clock, all threads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    if not options.wall:
        torch.set_num_threads(1)
    rows = [row(name, shape, options) for name, shape in SHAPES.items()]
    command = f"python benchmarks/layer.py --repeats {options.repeats}" + " --wall" * options.wall
    report("MoE layer, forward and backward", rows, command, options.json)


if __name__ == "__main__":
    main()
