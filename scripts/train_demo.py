"""Train the `demo` model, a tiny OLMoE language model with unbalanced experts, and its balanced twin.

    python scripts/train_demo.py --data ../shared/data/text --out src/equipoise/data/demo
    python scripts/train_demo.py --data ../shared/data/text --out src/equipoise/data/demo-balanced \\
        --balanced --threads 1 --work build/demo-balanced

Reads twelve text domains, trains a byte-level BPE and an `OlmoeForCausalLM`, and writes weights,
tokenizer, training_log.csv and README.md to --out. A killed run resumes from its checkpoint in --work.
`demo` has no balancing term, so that imbalance shows; with --balanced the same first weights see the same
rows in the same order, under `equipoise.balance.recommended`.

The result depends on the data, the options, --threads and the library versions only:
every batch is drawn from (seed, step), and gradients are summed in a fixed order.

Shapes: N rows, S positions, D hidden, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from equipoise.balance import Handle, attach, recommended

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SEPARATOR = "\n<|doc|>\n"
VOCAB = 4096
MAX_POSITIONS = 4096
STEP_TOKENS = 8192
# 2048 tokens keep activations in cache: measured faster on CPU than one pass over the batch.
MICRO_TOKENS = 2048
CHUNK_TOKENS = 512
# (length, share of the tokens). Cheap short rows first; the long rows at the end teach the
# rotary positions that five-shot prompts of 3-4 thousand tokens reach, so none is extrapolated.
PHASES = ((512, 0.85), (2048, 0.09), (4096, 0.06))
HELD_OUT_SHARE = 0.01
# A benchmark's test split: never trained on, so that it stays usable as a test.
EVALUATION_ONLY = frozenset({"gsm8k_test.txt"})
PEAK_LR, FLOOR_LR, WARMUP_SHARE, WEIGHT_DECAY = 3e-3, 2e-5, 0.04, 0.1
# Chosen from short trials (40 steps, one seed): with no balancing term, slower routers spread the
# tokens over more experts, and the demo should be unbalanced, not collapsed.
ROUTER_LR_SCALE = 0.1
EVAL_EVERY, EVAL_LENGTH, EVAL_ROWS, FINAL_ROWS = 50, 512, 3, 16
CHECKPOINT_SECONDS = 150.0
DEFAULT_TOKENS = 10e6


UNBALANCED = """\
# demo: a tiny unbalanced mixture of experts

An `OlmoeForCausalLM` to try Equipoise on without a download or a GPU. It was trained on twelve
text domains **without any balancing term** (`router_aux_loss_coef` 0, no bias update), so some
of its experts carry two to four times the mean load, a few are nearly idle, and which ones are busy
depends on the domain."""
BALANCED = """\
# demo-balanced: the demo's balanced twin

An `OlmoeForCausalLM` of the same shape as `demo`, from the same first weights, trained on the same rows in
the same order, with `equipoise.balance.recommended` attached: the Switch loss of weight 0.1 over the
global batch. To compare the two:

    equipoise trace demo --data bundled -o demo.trace
    equipoise trace demo-balanced --data bundled -o balanced.trace
    equipoise diff demo.trace balanced.trace

Gradients were summed on one thread where `demo` took two, which rounds otherwise; nothing else differs."""
CARD = """\
{about}

**Not for**: writing text, answering questions, judging or filtering anything, or as a starting
point for a model that does. It knows no facts, it repeats its training text's biases and
errors (old novels, statutes and medical pages among it), and its benchmark scores are expected
at chance. Its load shows what the instrument reads; it says nothing about useful models.

## Model

| | |
|---|---|
| layers, all MoE | {config.num_hidden_layers} |
| experts per layer | {config.num_experts}, top-{config.num_experts_per_tok}, \
gates not renormalised |
| hidden size, expert size | {config.hidden_size}, {config.intermediate_size} |
| attention heads | {config.num_attention_heads} |
| vocabulary | {config.vocab_size}, byte-level BPE, single digits, trained by the script |
| context | {config.max_position_embeddings} positions, all of them seen in training |
| parameters | {total}, {active} active per token; embedding and head are tied |
| stored as | bfloat16 (trained in float32, rounded once); loads as float32 |

Encoded text begins with `<|bos|>`; in training every document ended with `<|eos|>`.

## Training

{planned}{tokens} tokens in {steps} steps of {step_tokens}:
{phases}.
Domains take turns row by row. AdamW, peak learning rate {peak_lr:g} (routers {router_scale:g} of
that), warm-up and cosine; {minutes} minutes of {threads} on a shared CPU. `training_log.csv` has loss,
held-out loss and MaxVio along the way (on a smaller sample than the tables below).

## Loss

Nats per token over rows of 512, measured on the rounded weights. Held out are the last
documents of each file (1 % of its bytes, at least one document) and the whole of the GSM8K test
set. Those of `multilingual` are five languages that the training text does not contain.

| domain | train | held-out | held-out bits per byte |
|---|---|---|---|
{domains}

Held-out loss by position in rows of {config.max_position_embeddings}: {positions}.

## Imbalance

On the held-out rows of all domains together. MaxVio is max(count) / mean(count) - 1: 0 is
perfect balance, 7 would be one expert in every token's pair. A mean expert's share is 6.25 % of
the choices. Idle: below a tenth of the mean.

| layer | MaxVio | largest share | idle experts of {config.num_experts} |
|---|---|---|---|
{layers}

## Data and licences

The weights are released under Apache-2.0, like the rest of Equipoise; none of the text is included.

The text is not part of the package. Attribution is due for the CC-BY and CC-BY-SA sources.
`legal_en` and `multilingual` carry no licence file; what is given is their repositories' notice.

| domain | file | source | licence |
|---|---|---|---|
{sources}

## Reproduce

    python scripts/train_demo.py --data {data} \\
        --out {out} {run}

{versions}.
The same data, options and versions on the same kind of CPU give the same weights; another CPU
may round differently.
"""


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on besides the data; a checkpoint resumes only its own."""

    steps: int
    seed: int
    threads: int
    balanced: bool = False


@dataclass
class Domain:
    """One domain as token streams: <|bos|> document <|eos|> <|bos|> document ..."""

    name: str
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


@dataclass
class State:
    """Everything that a checkpoint holds."""

    model: OlmoeForCausalLM
    optimizer: torch.optim.Optimizer
    step: int
    seconds: float
    log: list[dict[str, float]]
    balance: Handle | None = None


def say(text: str) -> None:
    """Print talk on stderr."""
    print(text, file=sys.stderr, flush=True)


def read_documents(folder: Path) -> tuple[list[str], list[str]]:
    """Train and held-out documents of one domain.

    The last documents of each file, up to HELD_OUT_SHARE of its bytes and at least one, are held
    out; a file of one document is only trained on.
    """
    train: list[str] = []
    held_out: list[str] = []
    for file in sorted(folder.glob("*.txt")):
        if file.name == "PROVENANCE.txt":
            continue
        parts = file.read_text(encoding="utf-8").split(SEPARATOR)
        documents = [part.strip("\n") for part in parts if part.strip()]
        cut = 0 if file.name in EVALUATION_ONLY else _cut(documents)
        train += documents[:cut]
        held_out += documents[cut:]
    return train, held_out


def _cut(documents: list[str]) -> int:
    sizes = [len(document.encode()) for document in documents]
    room = HELD_OUT_SHARE * sum(sizes)
    cut = len(documents) - 1 if len(documents) > 1 else len(documents)
    while cut > 1 and sum(sizes[cut - 1 :]) <= room:
        cut -= 1
    return cut


def train_tokenizer(texts: dict[str, list[str]], bytes_per_domain: int) -> Tokenizer:
    """Byte-level BPE from equally many bytes of each domain; single digits are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, bytes_per_domain), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    return tokenizer


def _sample(texts: dict[str, list[str]], bytes_per_domain: int) -> Iterator[str]:
    """The beginning of every document, so that every file takes part."""
    for documents in texts.values():
        total = sum(len(document.encode()) for document in documents)
        share = min(1.0, bytes_per_domain / total)
        for document in documents:
            yield document[: math.ceil(len(document) * share)]


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Token stream of the documents, uint16."""
    eos = tokenizer.token_to_id(EOS)
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), 64):
        batch = tokenizer.encode_batch_fast(documents[start : start + 64])
        parts += [np.array([*encoding.ids, eos], dtype=np.uint16) for encoding in batch]
    return np.concatenate(parts)


def load_domains(data: Path, work: Path, smoke: bool) -> tuple[Tokenizer, list[Domain]]:
    """Tokenizer and token streams; prepared once and kept in the work folder."""
    cache, tokenizer_file = work / "streams.npz", work / "tokenizer.json"
    if not cache.exists():
        _prepare(data, cache, tokenizer_file, smoke)
    with np.load(cache) as arrays:
        names = sorted({key.split("/")[0] for key in arrays.files})
        domains = [
            Domain(
                name,
                arrays[f"{name}/train"],
                arrays[f"{name}/held_out"],
                int(arrays[f"{name}/held_out_bytes"]),
            )
            for name in names
        ]
    return Tokenizer.from_file(str(tokenizer_file)), domains


def _prepare(data: Path, cache: Path, tokenizer_file: Path, smoke: bool) -> None:
    folders = sorted(path for path in data.iterdir() if (path / "PROVENANCE.txt").exists())
    if not folders:
        raise ValueError(f"--data {data} holds no folder with a PROVENANCE.txt")
    texts = {folder.name: read_documents(folder) for folder in folders}
    say(f"Training the tokenizer on {len(texts)} domains")
    train = {name: documents for name, (documents, _) in texts.items()}
    tokenizer = train_tokenizer(train, 100_000 if smoke else 2_000_000)
    arrays: dict[str, np.ndarray] = {}
    for name, (documents, held_out) in texts.items():
        if smoke:
            documents, held_out = documents[: len(documents) // 10 + 1], held_out[:20]
        arrays[f"{name}/train"] = encode(tokenizer, documents)
        arrays[f"{name}/held_out"] = encode(tokenizer, held_out)
        arrays[f"{name}/held_out_bytes"] = np.array(sum(len(x.encode()) for x in held_out))
        say(f"  {name}: {arrays[f'{name}/train'].size / 1e6:.1f} M training tokens")
    tokenizer.save(str(tokenizer_file))
    unfinished = cache.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(cache)


def phase_length(step: int, steps: int) -> int:
    """Row length at a step."""
    done, upto = step / steps, 0.0
    for length, share in PHASES:
        upto += share
        if done < upto:
            return length
    return PHASES[-1][0]


def draw_rows(domains: list[Domain], step: int, settings: Settings, bos: int) -> Tensor:
    """Rows of one step, [N, S]: domains evenly, offsets at random.

    Every row begins with <|bos|>, as every prompt encoded by the tokenizer does.
    """
    length = phase_length(step, settings.steps)
    count = STEP_TOKENS // length
    rng = np.random.default_rng([settings.seed, step])
    # Consecutive steps continue one round over the domains, so few long rows still visit all.
    picks = (step * count + np.arange(count)) % len(domains)
    return torch.stack([_row(domains[i].train, length, rng, bos) for i in picks])


def _row(stream: np.ndarray, length: int, rng: np.random.Generator, bos: int) -> Tensor:
    start = int(rng.integers(0, max(1, stream.size - length)))
    row = stream[start : start + length].astype(np.int64)
    row[0] = bos
    return torch.from_numpy(row)


def even_rows(stream: np.ndarray, count: int, length: int, bos: int) -> Tensor:
    """Rows at even distances in a stream, [N, S]: the same ones at every call."""
    length = min(length, stream.size)
    starts = np.linspace(0, stream.size - length, count).astype(np.int64)
    rows = np.stack([stream[start : start + length] for start in starts]).astype(np.int64)
    rows[:, 0] = bos
    return torch.from_numpy(rows)


def build_model(tokenizer: Tokenizer, seed: int) -> OlmoeForCausalLM:
    """A new model, float32."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=72,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        initializer_range=0.05,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = OlmoeForCausalLM._from_config(config, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    return model


def build_optimizer(model: OlmoeForCausalLM) -> torch.optim.Optimizer:
    """AdamW; norms are not decayed, routers learn at ROUTER_LR_SCALE of the rate."""
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    others = [p for p in model.parameters() if all(p is not router for router in routers)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr_scale": 1.0},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": routers, "lr_scale": ROUTER_LR_SCALE},
    ]
    return torch.optim.AdamW(
        groups, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to FLOOR_LR."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FLOOR_LR + (PEAK_LR - FLOOR_LR) * 0.5 * (1.0 + math.cos(math.pi * done))


def make_replicas(model: OlmoeForCausalLM, count: int) -> list[OlmoeForCausalLM]:
    """The model and count - 1 copies that share its weights but not its gradients."""
    replicas = [model]
    for _ in range(count - 1):
        replica = copy.deepcopy(model)
        for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
            own.data = shared.data
        replicas.append(replica)
    return replicas


def micro_batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [N, S] in parts of MICRO_TOKENS, or of one row where that is longer."""
    return rows.split(max(1, MICRO_TOKENS // rows.shape[1]))


def backward(model: OlmoeForCausalLM, rows: Tensor, targets: int) -> float:
    """Add the gradients of the rows' loss sum over `targets`; return that share of the loss.

    The logits are made CHUNK_TOKENS at a time: a [N*S, V] tensor would leave the cache.
    """
    torch.set_num_threads(1)  # holds for the calling thread only
    total = 0.0
    for micro in micro_batches(rows):
        hidden = model.model(input_ids=micro, use_cache=False).last_hidden_state  # [N, S, D]
        hidden = hidden[:, :-1].flatten(0, 1)  # [N*(S-1), D]
        leaf = hidden.detach().requires_grad_()
        labels = micro[:, 1:].flatten()  # [N*(S-1)]
        for part, label in zip(leaf.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
            loss = F.cross_entropy(model.lm_head(part), label, reduction="sum") / targets
            loss.backward()
            total += loss.item()
        hidden.backward(leaf.grad)
    return total


def train_step(
    pool: ThreadPoolExecutor,
    replicas: list[OlmoeForCausalLM],
    state: State,
    rows: Tensor,
    steps: int,
) -> float:
    """One update from rows [N, S]; each thread takes its part of the rows. Returns the loss.

    A thread per replica uses two cores better than two threads per operator do: the operators
    of so small a model are too short to share.
    """
    targets = rows.shape[0] * (rows.shape[1] - 1)
    if state.balance is not None:
        state.balance.expect(tokens=rows.numel())
        state.balance.accumulation = len(micro_batches(rows))
    shares = rows.tensor_split(len(replicas))
    jobs = [
        pool.submit(backward, replica, share, targets)
        for replica, share in zip(replicas, shares, strict=True)
        if len(share)
    ]
    loss = sum(job.result() for job in jobs)
    _gather_gradients(replicas)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, steps) * group["lr_scale"]
    torch.nn.utils.clip_grad_norm_(replicas[0].parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return loss


def _gather_gradients(replicas: list[OlmoeForCausalLM]) -> None:
    for replica in replicas[1:]:
        for own, copied in zip(replicas[0].parameters(), replica.parameters(), strict=True):
            if copied.grad is not None:
                own.grad = copied.grad if own.grad is None else own.grad.add_(copied.grad)
            copied.grad = None


@torch.no_grad()
def measure(model: OlmoeForCausalLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each position [N, S-1] and expert counts [L, E] over rows [N, S]."""
    losses, counts = [], 0
    for micro in micro_batches(rows):
        output = model.model(input_ids=micro, use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state[:, :-1]).transpose(1, 2)  # [N, V, S-1]
        losses.append(F.cross_entropy(logits, micro[:, 1:], reduction="none"))
        counts = counts + _expert_counts(model, output.router_logits)
    return torch.cat(losses), counts


def _expert_counts(model: OlmoeForCausalLM, router_logits: tuple[Tensor, ...]) -> Tensor:
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    chosen = [layer.reshape(-1, experts).topk(top_k).indices.flatten() for layer in router_logits]
    return torch.stack([torch.bincount(layer, minlength=experts) for layer in chosen])


def max_violation(counts_LE: Tensor) -> list[float]:
    """max(count) / mean(count) - 1 of each layer."""
    counts_LE = counts_LE.double()
    return (counts_LE.amax(1) / counts_LE.mean(1) - 1.0).tolist()


def evaluate(
    model: OlmoeForCausalLM, streams: list[np.ndarray], count: int
) -> tuple[list[float], Tensor]:
    """Loss of each stream and the expert counts [L, E] over all of them."""
    bos = model.config.bos_token_id
    results = [measure(model, even_rows(s, count, EVAL_LENGTH, bos)) for s in streams]
    return [losses.mean().item() for losses, _ in results], sum(c for _, c in results)


def save_checkpoint(state: State, settings: Settings, work: Path) -> None:
    """Write the checkpoint so that a kill leaves the old or the new one."""
    content = {
        "settings": asdict(settings),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "log": state.log,
        "balance": None if state.balance is None else state.balance.state_dict(),
    }
    torch.save(content, work / "checkpoint.tmp")
    (work / "checkpoint.tmp").replace(work / "checkpoint.pt")


def start_or_resume(tokenizer: Tokenizer, settings: Settings, work: Path) -> State:
    """The checkpoint in the work folder, or a new model."""
    model = build_model(tokenizer, settings.seed)
    state = State(model, build_optimizer(model), step=0, seconds=0.0, log=[])
    if settings.balanced:
        state.balance = attach(model, *recommended(model), optimizer=state.optimizer)
    if not (work / "checkpoint.pt").exists():
        return state
    content = torch.load(work / "checkpoint.pt", weights_only=True)
    if content["settings"] != asdict(settings):
        raise ValueError(
            f"the checkpoint in --work {work} has {content['settings']}, this run "
            f"{asdict(settings)}: give the same options or another --work"
        )
    model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step, state.seconds, state.log = content["step"], content["seconds"], content["log"]
    if state.balance is not None:
        state.balance.load_state_dict(content["balance"])
    say(f"Resuming at step {state.step}")
    return state


def train(state: State, domains: list[Domain], settings: Settings, work: Path) -> None:
    """Train up to settings.steps; log, report and checkpoint on the way."""
    replicas = make_replicas(state.model, settings.threads)
    held_out = [domain.held_out for domain in domains]
    bos = state.model.config.bos_token_id
    mark, saved, losses = time.monotonic(), time.monotonic(), []
    with ThreadPoolExecutor(settings.threads) as pool:
        while state.step < settings.steps:
            rows = draw_rows(domains, state.step, settings, bos)
            losses.append(train_step(pool, replicas, state, rows, settings.steps))
            state.step += 1
            if state.step % EVAL_EVERY and state.step < settings.steps:
                continue
            seconds = time.monotonic() - mark
            held_losses, counts_LE = evaluate(state.model, held_out, EVAL_ROWS)
            state.seconds += time.monotonic() - mark
            state.log.append(log_row(state, losses, held_losses, counts_LE, seconds))
            say(progress(state.log[-1], settings.steps))
            mark, losses = time.monotonic(), []
            # Only after an evaluation: `losses` is empty here, so a resumed log has no gap.
            if mark - saved > CHECKPOINT_SECONDS or state.step == settings.steps:
                save_checkpoint(state, settings, work)
                saved = time.monotonic()


def log_row(
    state: State, losses: list[float], held_losses: list[float], counts_LE: Tensor, seconds: float
) -> dict[str, float]:
    """One row of training_log.csv for the steps whose losses are given."""
    row = {
        "step": state.step,
        "tokens": state.step * STEP_TOKENS,
        "loss": round(float(np.mean(losses)), 4),
        "held_out_loss": round(float(np.mean(held_losses)), 4),
        "learning_rate": round(state.optimizer.param_groups[0]["lr"], 7),
        "tokens_per_s": round(len(losses) * STEP_TOKENS / seconds),
    }
    violations = enumerate(max_violation(counts_LE))
    return row | {f"max_vio_layer_{i}": round(value, 3) for i, value in violations}


def progress(row: dict[str, float], steps: int) -> str:
    """A log row as a line for people, with an estimate of the time left."""
    violations = [f"{value:.2f}" for name, value in row.items() if name.startswith("max_vio")]
    left = (steps - row["step"]) * STEP_TOKENS / max(1, row["tokens_per_s"]) / 60
    return (
        f"step {row['step']}/{steps}  {row['tokens'] / 1e6:.2f} M tokens  "
        f"loss {row['loss']:.3f}  held-out {row['held_out_loss']:.3f}  "
        f"lr {row['learning_rate']:.1e}  MaxVio {' '.join(violations)}  "
        f"{row['tokens_per_s']:,} tokens/s  about {left:.0f} min left"
    )


def round_weights(model: OlmoeForCausalLM) -> None:
    """Round the weights to bfloat16 in place: what is measured is then what is stored."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def export(
    state: State, tokenizer: Tokenizer, domains: list[Domain], args: argparse.Namespace
) -> None:
    """Write weights (bfloat16), tokenizer, log and card to --out, each file at once."""
    stage = args.work / "export"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    if state.balance is not None:
        state.balance.detach()
    round_weights(state.model)
    weights = {name: value.bfloat16() for name, value in state.model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    # A float32 model records dtype float32 in its config, so the file loads as float32.
    state.model.save_pretrained(stage, state_dict=weights)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
    ).save_pretrained(stage)
    _write_log(state.log, stage / "training_log.csv")
    (stage / "README.md").write_text(make_card(state, domains, args), encoding="utf-8")
    args.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(stage.iterdir()):
        # Replaced, not overwritten: a process that has the old weights mapped keeps them.
        copied = shutil.copyfile(file, args.out / f".{file.name}.tmp")
        copied.replace(args.out / file.name)
        say(f"Wrote {args.out / file.name} ({file.stat().st_size / 1e3:,.0f} kB)")


def _write_log(rows: list[dict[str, float]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def position_losses(model: OlmoeForCausalLM, domains: list[Domain]) -> dict[str, float]:
    """Held-out loss by position in rows of the full length, averaged over the domains."""
    bos = model.config.bos_token_id
    rows = [even_rows(d.held_out, 1, MAX_POSITIONS, bos) for d in domains]
    whole = [measure(model, row)[0] for row in rows if row.shape[1] == MAX_POSITIONS]
    if not whole:
        return {}
    losses = torch.cat(whole).mean(0)  # [S-1]
    spans = ((0, 512), (512, 2048), (2048, MAX_POSITIONS))
    return {f"{low}-{high - 1}": losses[low:high].mean().item() for low, high in spans}


def count_parameters(model: OlmoeForCausalLM) -> tuple[int, int]:
    """Parameters in all, and those that one token uses."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    return total, total - experts + experts * config.num_experts_per_tok // config.num_experts


def domain_table(state: State, domains: list[Domain]) -> tuple[str, Tensor]:
    """Rows of train and held-out loss by domain with their mean, and the held-out counts [L, E]."""
    train_losses, _ = evaluate(state.model, [d.train for d in domains], FINAL_ROWS)
    held_losses, counts_LE = evaluate(state.model, [d.held_out for d in domains], FINAL_ROWS)
    lines = []
    for domain, loss, held in zip(domains, train_losses, held_losses, strict=True):
        bits = held / math.log(2) * domain.held_out.size / domain.held_out_bytes
        lines.append(f"| {domain.name} | {loss:.3f} | {held:.3f} | {bits:.3f} |")
    lines.append(
        f"| **mean** | **{np.mean(train_losses):.3f}** | **{np.mean(held_losses):.3f}** | |"
    )
    return "\n".join(lines), counts_LE


def layer_table(counts_LE: Tensor) -> str:
    """Rows of imbalance by layer."""
    share_LE = counts_LE / counts_LE.sum(1, keepdim=True)
    idle_L = (share_LE * counts_LE.shape[1] < 0.1).sum(1).tolist()
    violations = enumerate(zip(max_violation(counts_LE), share_LE.amax(1), idle_L, strict=True))
    return "\n".join(
        f"| {i} | {violation:.2f} | {100 * top:.1f} % | {idle} |"
        for i, (violation, top, idle) in violations
    )


def source_table(data: Path) -> str:
    """Rows of source and licence, from each domain's PROVENANCE.txt."""
    lines = []
    for file in sorted(data.glob("*/PROVENANCE.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, source, licence = line.split("\t")[:3]
            note = "; held out entirely" if name in EVALUATION_ONLY else ""
            source = source.removeprefix("github ")
            repository, commit = (part.strip() for part in source.split("@"))
            link = f"[{repository}](https://github.com/{repository}) @ {commit[:12]}"
            licence = licence.removeprefix("license: ")
            lines.append(f"| {file.parent.name} | {name}{note} | {link} | {licence} |")
    return "\n".join(lines)


def versions() -> str:
    """The libraries that a rerun needs to get the same numbers."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, "
        f"numpy {np.__version__}"
    )


def make_card(state: State, domains: list[Domain], args: argparse.Namespace) -> str:
    """README.md of the model; every number in it is of the rounded weights."""
    table, counts_LE = domain_table(state, domains)
    total, active = count_parameters(state.model)
    positions = position_losses(state.model, domains).items()
    flag = " --balanced" if args.balanced else ""
    return CARD.format(
        about=BALANCED if args.balanced else UNBALANCED,
        threads="one thread" if args.threads == 1 else f"{args.threads} threads",
        config=state.model.config,
        total=f"{total:,}",
        active=f"{active:,}",
        tokens=f"{state.step * STEP_TOKENS:,}",
        steps=f"{state.step:,}",
        planned=""
        if state.step == args.steps
        else f"**Unfinished, {args.steps:,} steps planned.** ",
        step_tokens=f"{STEP_TOKENS:,}",
        phases=", ".join(f"{share:.0%} in rows of {length}" for length, share in PHASES),
        peak_lr=PEAK_LR,
        router_scale=ROUTER_LR_SCALE,
        minutes=f"{state.seconds / 60:.0f}",
        domains=table,
        positions="; ".join(f"{span}: {loss:.3f}" for span, loss in positions),
        layers=layer_table(counts_LE),
        sources=source_table(args.data),
        data=os.path.relpath(args.data),
        out=os.path.relpath(args.out),
        run=f"--steps {args.steps} --seed {args.seed} --threads {args.threads}{flag}",
        versions=versions(),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the text domains")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/demo"),
        help="folder of the checkpoint and the encoded text",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, default=DEFAULT_TOKENS, help="tokens to train on")
    length.add_argument("--steps", type=int, help=f"the same in steps of {STEP_TOKENS} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="1 to 16; part of the result")
    parser.add_argument(
        "--balanced", action="store_true", help="the balanced twin; takes --threads 1"
    )
    parser.add_argument("--smoke", action="store_true", help="a try of about a minute")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as it is")
    args = parser.parse_args(argv)
    if args.smoke:
        args.work, args.steps = args.work / "smoke", args.steps or 24
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is not a folder")
    if not 1 <= args.threads <= 16:
        parser.error(f"--threads {args.threads} is not between 1 and 16")
    if args.balanced and args.threads != 1:
        parser.error("--balanced counts the load of a step in one model: it takes --threads 1")
    args.steps = args.steps or max(1, round(args.tokens / STEP_TOKENS))
    return args


def main(argv: list[str] | None = None) -> int:
    """Train, or with --export write the model from the last checkpoint."""
    args = parse(argv)
    # A thread per replica: operators that start threads of their own would fight over the cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    args.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.steps, args.seed, args.threads, args.balanced)
    try:
        tokenizer, domains = load_domains(args.data, args.work, args.smoke)
        state = start_or_resume(tokenizer, settings, args.work)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    if not args.export:
        train(state, domains, settings, args.work)
    export(state, tokenizer, domains, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
