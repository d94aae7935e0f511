"""Training in the lab: `python benchmarks/lab.py [--repeats 9] [--wall] [--json FILE]`.

One optimizer step of the CPU tier's model (`recipe("small")`: forward, backward, clipping, AdamW) over
that of transformers' OLMoE of the same shape with its grouped experts, on the same tokens; the two models
have the same parameters but for OLMoE's query and key norms. And the shares of a step that reading the
rows and counting the load take.

By default on one thread, in processor time, so that other work on the machine does not matter. With
`--wall`, time on the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import interleaved, ratios, report
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from equipoise.lab import recipe
from equipoise.lab.batches import Batches
from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus, Domain
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel
from equipoise.lab.optim import make_optimizer


def olmoe(config: Config) -> OlmoeForCausalLM:
    """Transformers' model of the same shape."""
    model = config.model
    made = OlmoeForCausalLM._from_config(
        OlmoeConfig(
            vocab_size=config.data.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.expert_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            num_experts=model.experts,
            num_experts_per_tok=model.top_k,
            norm_topk_prob=True,
            tie_word_embeddings=model.tied,
            max_position_embeddings=model.max_positions,
            eos_token_id=None,
            pad_token_id=0,
        ),
        attn_implementation="sdpa",
    )
    made.set_experts_implementation("grouped_mm")
    return made


def step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    micro_batches: list[Any],
) -> None:
    """One optimizer step."""
    for ids, targets, _ in micro_batches:
        (loss_of(ids, targets) / len(micro_batches)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def corpus(config: Config, folder: Path) -> Corpus:
    """Streams of random tokens on disk, as large as the text's."""
    rng = np.random.default_rng(0)
    domains = []
    for name in config.data.domains:
        np.save(folder / f"{name}.npy", rng.integers(0, 1024, 3_000_000, dtype=np.uint16))
        stream = np.load(folder / f"{name}.npy", mmap_mode="r")
        domains.append(Domain(name, stream, stream[:1000]))
    return Corpus(tuple(domains), folder, "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.wall:
        time.perf_counter = time.process_time
    config = recipe("small")
    with TemporaryDirectory() as folder:
        batches = Batches(corpus(config, Path(folder)), config)
        rows = measure(config, batches, options.repeats)
    command = "python benchmarks/lab.py" + (" --wall" if options.wall else "")
    report("Training in the lab", rows, command, options.json)


def measure(config: Config, batches: Batches, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    torch.manual_seed(0)
    ours, metered = (LanguageModel(config.model, config.data.vocab_size) for _ in range(2))
    meter, theirs = Meter(metered), olmoe(config)
    optimizers = {m: make_optimizer(m, m, config.optimizer) for m in (ours, metered)}
    adam = torch.optim.AdamW(theirs.parameters(), lr=config.optimizer.lr, fused=True)
    fixed = batches.step(0)
    number = iter(range(1, 1_000_000))

    def olmoe_loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = theirs(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def counted() -> None:
        step(metered, optimizers[metered], metered, fixed)
        meter.take()

    def read() -> None:
        for _ in range(20):
            batches.step(next(number))

    variants = {
        "transformers' OLMoE, grouped": lambda: step(theirs, adam, olmoe_loss, fixed),
        "lab": lambda: step(ours, optimizers[ours], ours, fixed),
        "lab, load counted": counted,
        "reading 20 steps' rows": read,
    }
    seconds = interleaved(variants, repeats, warm_up=2)
    found, own = ratios(seconds, "transformers' OLMoE, grouped"), ratios(seconds, "lab")
    rows = []
    for name in ("transformers' OLMoE, grouped", "lab", "lab, load counted"):
        ratio, spread = found[name]
        rows.append(
            {
                "step": name,
                "tokens a second": f"{config.step_tokens / np.median(seconds[name]):,.0f}",
                "speed, of transformers'": f"{1 / ratio:.2f} ± {spread / ratio**2:.2f}",
            }
        )
    more = own["lab, load counted"][0] - 1
    rows.append({"step": "counting the load", "tokens a second": "",
                 "speed, of transformers'": f"{100 * more:+.1f} % of a step"})  # fmt: skip
    reading = own["reading 20 steps' rows"][0] / 20
    rows.append({"step": "reading a step's rows", "tokens a second": "",
                 "speed, of transformers'": f"{100 * reading:.2f} % of a step"})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
