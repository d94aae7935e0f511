"""Training in the lab: `python benchmarks/lab.py [--repeats 9] [--cores 1] [--micro-rows 16] [--json FILE]`.

One optimizer step of the CPU tier's model (`recipe("small")`: forward, backward, clipping, AdamW) over
that of transformers' OLMoE of the same shape with its grouped experts, on the same tokens; the two models
have the same parameters but for OLMoE's query and key norms. Of the lab, the model's step alone, and a step
of `equipoise train`, which reads its rows, counts the load, and notes both; where the processor has
products in bfloat16, the two whole ones under autocast, too. And the shares of a step that reading and
measuring take, each timed by itself. Each trains in a process of its own, set up as its users have it; a
round is a step of each.

By default on one thread, in processor time, so that other work on the machine does not matter, and in the
recipe's micro-batches. With `--wall`, time on the clock. With `--cores N`, on the clock, what N cores make
of it: as threads of one process, which is what torch does by itself, and as processes that share the
batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import interleaved, ratios, report
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import OlmoeConfig, OlmoeForCausalLM

from equipoise.lab import recipe
from equipoise.lab.batches import Batches
from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus, Domain
from equipoise.lab.folder import RunFolder
from equipoise.lab.journal import Step
from equipoise.lab.launch import meetings
from equipoise.lab.model import LanguageModel
from equipoise.lab.optim import make_optimizer
from equipoise.lab.processes import Processes
from equipoise.lab.run import Run


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
    for number, (ids, targets, _) in enumerate(micro_batches, 1):
        early = number < len(micro_batches)
        with (
            model.no_sync()
            if early and isinstance(model, DistributedDataParallel)
            else nullcontext()
        ):
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


def of_transformers(config: Config, folder: Path) -> Callable[[], Any]:
    """A step of OLMoE, in one process or several."""
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    batches = Batches(corpus(config, folder), config, rank=rank, ranks=ranks).step(0)
    model: torch.nn.Module = olmoe(config)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return lambda: step(model, optimizer, loss, batches)


def of_the_model(config: Config, folder: Path) -> Callable[[], Any]:
    """A step of the lab's model."""
    model, optimizer, batches = ours(config, folder)
    return lambda: step(model, optimizer, model, batches)


def ours(config: Config, folder: Path) -> tuple[LanguageModel, torch.optim.Optimizer, list[Any]]:
    """The lab's model in a process that is set up as the trainer sets it up."""
    Processes(config)
    model = LanguageModel(config.model, config.data.vocab_size)
    return model, make_optimizer(model, model, config.optimizer), rows(config, folder).step(0)


def of_the_trainer(config: Config, folder: Path) -> Callable[[], Any]:
    """A step of `equipoise train`."""
    run = Run(config, RunFolder(folder / "run"), Processes(config))
    run.begin(corpus(config, folder))
    run.model.train()
    return run.advance


def reading(config: Config, folder: Path) -> Callable[[], Any]:
    """Reading the rows of REPEATS steps."""
    batches, number = rows(config, folder), iter(range(1, 1_000_000))

    def read() -> None:
        for _ in range(REPEATS):
            batches.step(next(number))

    return read


def measuring(config: Config, folder: Path) -> Callable[[], Any]:
    """All that a run measures in a step, REPEATS times: selections of what the routers put out, their
    load beside its floor, and what balancing by a loss and a bias measures.
    """
    balance = "switch(scope=global, weight=0.01) + sign(rate=0.001)"
    run = Run(config.change({"balance": balance}), RunFolder(folder / "run"), Processes(config))
    run.begin(corpus(config, folder))
    run.model.train()
    seen: list[tuple[int, Any, Any]] = []

    def keep(index: int) -> Callable[..., None]:
        return lambda gate, _, output: seen.append((index, gate, output))

    layers = enumerate(run.plain.moe_layers())
    hooks = [layer.gate.register_forward_hook(keep(index)) for index, layer in layers]
    run.advance()
    for hook in hooks:
        hook.remove()

    def measure() -> None:
        for _ in range(REPEATS):
            for index, gate, output in seen:
                run.meter._hook(index)(gate, None, output)
            counts_LE = run.meter.take().counts_LE.numpy()
            step = Step(1, 1.0, 1.0, 1.0, 1.0, counts_LE, None, None)
            run.journal.note(step, run.handle.metrics)

    return measure


def rows(config: Config, folder: Path) -> Batches:
    """Of random tokens."""
    return Batches(corpus(config, folder), config)


THEIRS, MODEL = "transformers' OLMoE, grouped", "lab"
TRAINER, READING, MEASURING = "equipoise train", "reading", "measuring"
MAKERS = {
    THEIRS: of_transformers,
    MODEL: of_the_model,
    TRAINER: of_the_trainer,
    READING: reading,
    MEASURING: measuring,
}
PARTS = {READING: "reading a step's rows", MEASURING: "measuring load and balancing"}
REPEATS, WARM_UP = 20, 4


class Other:
    """Processes that make a step together when they are asked to."""

    def __init__(
        self, name: str, settings: dict[str, Any], *, ranks: int = 1, wall: bool = False
    ) -> None:
        self.seconds = list[float]()
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(ranks)]
        self._here = [here for here, _ in pipes]
        places = meetings(ranks) if ranks > 1 else [{}]
        self._processes = [
            context.Process(target=_serve, args=(name, settings, place, wall, there))
            for place, (_, there) in zip(places, pipes, strict=True)
        ]

    def __enter__(self) -> Other:
        for process in self._processes:
            process.start()
        return self

    def step(self) -> None:
        """Have a step made; the seconds of the last to end."""
        self._tell(True)
        self.seconds.append(max(pipe.recv() for pipe in self._here))

    def _tell(self, go_on: bool) -> None:
        for pipe in self._here:
            pipe.send(go_on)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # one that has failed has said why
            self._tell(False)
        for process in self._processes:
            process.join()


def _serve(
    name: str, settings: dict[str, Any], meeting: dict[str, str], wall: bool, pipe: Any
) -> None:
    os.environ.update(meeting)
    clock = time.perf_counter if wall else time.process_time
    config = recipe("small", settings)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        make_step = MAKERS[name](config, Path(folder))
        while pipe.recv():
            begin = clock()
            make_step()
            pipe.send(clock() - begin)


def on_one(rows: int, wall: bool) -> dict[str, Other]:
    """All on one thread."""
    whole = {"micro_rows": rows, "threads": 1}
    begun = {name: Other(name, whole, wall=wall) for name in MAKERS}
    for name in (THEIRS, TRAINER) if has_bfloat16() else ():
        begun[f"{name}, bfloat16"] = Other(name, {**whole, "precision": "bfloat16"}, wall=wall)
    return begun


def on_cores(cores: int, rows: int) -> dict[str, Other]:
    """As threads, and as processes."""
    ways = {f"{cores} threads": (cores, 1), f"{cores} processes": (1, cores)}
    precisions = {"": "float32"} | ({", bfloat16": "bfloat16"} if has_bfloat16() else {})
    begun = {}
    for told, precision in precisions.items():
        for way, (threads, ranks) in ways.items():
            settings = {"micro_rows": rows, "threads": threads, "precision": precision}
            for name in (THEIRS, TRAINER):
                begun[f"{name}, {way}{told}"] = Other(name, settings, ranks=ranks, wall=True)
    return begun


def has_bfloat16() -> bool:
    """Whether the processor makes products in it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--micro-rows", type=int, default=recipe("small").micro_rows)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command, rows = "python benchmarks/lab.py", options.micro_rows
    if rows != recipe("small").micro_rows:
        command += f" --micro-rows {rows}"
    if options.cores > 1:
        command += f" --cores {options.cores}"
        begun = on_cores(options.cores, rows)
    else:
        command += " --wall" if options.wall else ""
        begun = on_one(rows, options.wall)
    with ExitStack() as stack:
        others = {name: stack.enter_context(other) for name, other in begun.items()}
        interleaved({name: other.step for name, other in others.items()}, options.repeats, WARM_UP)
    seconds = {name: other.seconds[WARM_UP:] for name, other in others.items()}
    report("Training in the lab", table(seconds), command, options.json)


def table(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the table, over the first variant."""
    tokens = recipe("small").step_tokens
    speed = "speed, of transformers'"
    found = ratios(seconds, next(iter(seconds)))
    shown = [
        {
            "step": name,
            "tokens a second": f"{tokens / np.median(seconds[name]):,.0f}",
            speed: f"{1 / ratio:.2f} ± {spread / ratio**2:.2f}",
        }
        for name, (ratio, spread) in found.items()
        if name not in PARTS
    ]
    if READING not in seconds:
        return shown
    own = ratios(seconds, MODEL)
    for name, part in PARTS.items():
        share, spread = (100 * value / REPEATS for value in own[name])
        told = f"{share:.2f} ± {spread:.2f} % of a step"
        shown.append({"step": part, "tokens a second": "", speed: told})
    return shown


if __name__ == "__main__":
    main()
