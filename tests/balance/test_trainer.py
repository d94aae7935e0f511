"""BalanceCallback in transformers' Trainer: its loss untouched, its steps, logs and checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from equipoise.balance import (
    BalanceCallback,
    Bias,
    Handle,
    Lifecycle,
    Loss,
    QuantileHistogram,
    Sign,
    Subset,
    attach,
)
from equipoise.errors import EquipoiseError
from tests.torchrun import torchrun

pytestmark = pytest.mark.slow

VOCAB, LENGTH = 64, 12
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4, initializer_range=0.3))


def deepseek() -> Any:
    torch.manual_seed(0)
    own = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    lora = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    config = {**SIZE, **own, **lora, "v_head_dim": 8, "first_k_dense_replace": 0}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config, initializer_range=0.3))


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **extra: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **{**values, **extra})


def trainer(model: Any, args: TrainingArguments, *callbacks: Any, **extra: Any) -> Trainer:
    return Trainer(
        model, args, train_dataset=extra.pop("data", rows()), callbacks=list(callbacks), **extra
    )


def training_logs(made: Trainer) -> list[dict[str, Any]]:
    return [log for log in made.state.log_history if "loss" in log]


class Steps(TrainerCallback):  # type: ignore[misc]
    """Notes accumulation and counts of each step, as they are after the handle's."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.accumulation: list[int] = []
        self.tokens: list[int] = []
        self.number: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.accumulation.append(self.handle.accumulation)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tokens.append(self.handle.tokens()[0])
        self.number.append(self.handle.book.step)


def same(one: Any, other: Any, **tolerance: float) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, msg=name, **tolerance)
        else:
            assert torch.equal(a, b), name


# -- the Trainer's own loss -----------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_the_loss_of_the_first_step_is_that_without_balance(tmp_path: Path, average: bool) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, average_tokens_across_devices=average)
    plain = trainer(mixtral(), args)
    plain.train()
    model = mixtral()
    handle = attach(model, Loss("switch", weight=1.0), Bias(Sign(rate=1e-2)))
    balanced = trainer(model, args, BalanceCallback(handle))
    balanced.train()
    before, after = training_logs(plain), training_logs(balanced)
    assert before[0]["loss"] == after[0]["loss"]
    assert before[0]["grad_norm"] != after[0]["grad_norm"]
    assert before[-1]["loss"] != after[-1]["loss"]


def test_measuring_alone_changes_no_weight(tmp_path: Path) -> None:
    plain, watched = mixtral(), mixtral()
    trainer(plain, arguments(tmp_path)).train()
    trainer(watched, arguments(tmp_path), BalanceCallback(attach(watched))).train()
    same(plain, watched)


def test_the_gradient_is_the_formulas_by_plain_autograd(tmp_path: Path) -> None:
    """One SGD step over two micro-batches, against a loop that writes the losses down."""
    args = arguments(
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    model = mixtral()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = attach(model, Loss("switch", scope="micro", weight=0.5))
    trainer(model, args, BalanceCallback(handle), data=rows(8)).train()
    handle.detach()

    other = mixtral()
    for index in range(2):
        ids = torch.stack([row["input_ids"] for row in rows(8)[4 * index : 4 * index + 4]])
        out = other(input_ids=ids, labels=ids, output_router_logits=True)
        main = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)
        )
        ((main + 0.5 * switch(out.router_logits)) / 2).backward()
    for name, p in other.named_parameters():
        assert p.grad is not None
        step = start[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(step, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def switch(router_logits: tuple[Tensor, ...]) -> Tensor:
    """E sum f P, averaged over layers (Switch Transformer, equation 4), from logits."""
    total = torch.zeros(())
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(2, dim=-1).indices, 1.0)
        total = total + 4 * (chosen.mean(0) / 2 * probs.mean(0)).sum()
    return total / len(router_logits)


# -- steps ----------------------------------------------------------------------------------------


def test_each_optimizer_step_is_one_balancing_step_of_its_micro_batches(tmp_path: Path) -> None:
    """28 rows are 7 batches of 4: steps of 3, 3 and 1 micro-batches, epoch after epoch."""
    model = mixtral()
    handle = attach(model, Loss("switch"), Bias(Sign()))
    steps = Steps(handle)
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=3)
    trainer(model, args, BalanceCallback(handle), steps, data=rows(28)).train()
    assert steps.accumulation == [3, 3, 1, 3, 3, 1]
    assert steps.tokens == [n * 4 * LENGTH for n in steps.accumulation]
    assert steps.number == [1, 2, 3, 4, 5, 6]


def test_a_short_last_step_weighs_its_micro_batches_as_it_should(tmp_path: Path) -> None:
    """The balancing gradient of an epoch's last step is that of one with as few micro-batches."""
    seen: list[Tensor] = []

    class Gradient(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            seen.append(model.model.layers[0].mlp.gate.weight.grad.clone())

    for count, accumulation in ((4, 3), (4, 1)):
        model = mixtral()
        handle = attach(model, Loss("switch", scope="micro", weight=1.0))
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation)
        trainer(model, args, BalanceCallback(handle), Gradient(), data=rows(count)).train()
    assert torch.equal(seen[0], seen[1])


class Endless(IterableDataset[dict[str, Tensor]]):
    """Rows of unknown number; five batches an epoch, so that steps of two leave one over."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows(20))


def test_a_loader_of_unknown_length_trains_and_saves(tmp_path: Path) -> None:
    model = mixtral()
    handle = attach(model, Loss("switch"), Bias(Sign()))
    steps = Steps(handle)
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, save_strategy="epoch")
    trainer(model, args, BalanceCallback(handle), steps, data=Endless()).train()
    assert steps.accumulation == [2] * 5, "the third step of the first epoch gets one batch only"
    assert steps.tokens == [2 * 4 * LENGTH] * 4
    assert (tmp_path / "checkpoint-2" / "balance.pt").exists()


def test_an_optimizer_given_to_attach_ends_the_steps_alone(tmp_path: Path) -> None:
    models, biases = [mixtral(), mixtral()], []
    for number, model in enumerate(models):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        given = optimizer if number else None
        handle = attach(model, Loss("switch"), Bias(Sign(rate=1e-2)), optimizer=given)
        steps = Steps(handle)
        made = trainer(
            model, arguments(tmp_path), BalanceCallback(handle), steps, optimizers=(optimizer, None)
        )
        made.train()
        assert steps.number == [1, 2, 3, 4]
        biases.append(torch.stack(handle.bias()))
    assert torch.equal(*biases)
    same(*models)


def test_evaluation_does_not_count(tmp_path: Path) -> None:
    counts = []
    for strategy in ("no", "steps"):
        model = deepseek()
        handle = attach(model, Loss("switch"), Bias(Sign(rate=1e-2)))
        steps = Steps(handle)
        args = arguments(tmp_path, eval_strategy=strategy, eval_steps=1, eval_on_start=True)
        made = trainer(model, args, BalanceCallback(handle), steps, eval_dataset=rows(8))
        made.train()
        made.evaluate()
        assert handle.book.passes == 0
        assert steps.tokens == [4 * LENGTH] * 4
        counts.append(torch.stack([*handle.counts(), *handle.bias()]))
    assert torch.equal(*counts)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(tmp_path: Path, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = mixtral()
        handle = attach(model, Loss("switch", weight=0.1), Loss("z", weight=0.1), Bias(Sign()))
        steps = Steps(handle)
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=2,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        trainer(model, args, BalanceCallback(handle), steps).train()
        assert steps.tokens == [2 * 4 * LENGTH] * 4
        results.append(model)
    same(*results, rtol=1e-4, atol=1e-6)


def test_bfloat16_autocast_trains_and_biases_stay_float32(tmp_path: Path) -> None:
    model = deepseek()
    handle = attach(model, Loss("switch", weight=0.1), Bias(Sign(rate=1e-2)))
    made = trainer(model, arguments(tmp_path, bf16=True), BalanceCallback(handle))
    made.train()
    assert all(bias.dtype == torch.float32 and bias.any() for bias in handle.bias())
    assert training_logs(made)[-1]["balance/gradient_share"] > 0


# -- loss scaling ---------------------------------------------------------------------------------


class Scaled(Trainer):  # type: ignore[misc]
    """The Trainer as fp16 makes it: losses scaled, steps of infinite gradients skipped."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


class Overflow(TrainerCallback):  # type: ignore[misc]
    """Makes the gradients of one step infinite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
        if state.global_step == self.step:
            next(model.parameters()).grad.fill_(torch.inf)


def scaled_run(folder: Path, kind: Any, *callbacks: Any, **extra: Any) -> tuple[Any, Handle, Steps]:
    model = mixtral()
    handle = attach(model, Loss("switch", weight=1.0), Bias(Sign(rate=1e-2)))
    steps = Steps(handle)
    args = arguments(folder, max_grad_norm=0.0, gradient_accumulation_steps=2, max_steps=3, **extra)
    kind(
        model, args, train_dataset=rows(20), callbacks=[BalanceCallback(handle), steps, *callbacks]
    ).train()
    return model, handle, steps


def test_scaled_losses_take_scaled_balance(tmp_path: Path) -> None:
    plain, handle, _ = scaled_run(tmp_path, Trainer)
    scaled, other, steps = scaled_run(tmp_path, Scaled)
    assert steps.number == [1, 2, 3]
    assert torch.equal(torch.stack(handle.bias()), torch.stack(other.bias()))
    same(plain, scaled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_scaler_skips_is_no_balancing_step(tmp_path: Path, optim: str) -> None:
    """The skipped one has two micro-batches, the last of the epoch one."""
    _, handle, steps = scaled_run(tmp_path, Scaled, Overflow(1), optim=optim)
    assert steps.accumulation == [2, 2, 1]
    assert steps.number == [1, 1, 2]
    assert steps.tokens == [96, 96, 48]
    assert handle.book.step == 2


# -- logs -----------------------------------------------------------------------------------------


class Logged(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.seen.append(dict(logs))


def test_metrics_stand_in_the_log_under_their_own_names(tmp_path: Path) -> None:
    model = mixtral()
    handle = attach(model, Loss("switch"), Bias(Sign()))
    later = Logged()
    args = arguments(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=2)
    made = trainer(model, args, BalanceCallback(handle), later, eval_dataset=rows(8))
    made.train()
    last = training_logs(made)[-1]
    assert handle.metrics().items() <= last.items()
    assert {"balance/max_vio", "balance/layer_1/max_vio", "balance/loss/switch_global"} <= set(last)
    assert [log["balance/step"] for log in training_logs(made)] == [2, 4]
    json.dumps(made.state.log_history, allow_nan=False)
    others = [log for log in made.state.log_history if "loss" not in log]
    assert not [key for log in others for key in log if key.startswith("balance")]
    shown = [log for log in later.seen if "loss" in log][-1]
    assert shown["balance/max_vio"] == last["balance/max_vio"]
    assert shown["balance/loss/switch_global"] == last["balance/loss/switch_global"]
    assert not [key for key in shown if "layer_" in key]


def test_sinks_are_given_what_is_logged(tmp_path: Path) -> None:
    model, given = mixtral(), []
    handle = attach(model, Loss("switch"))
    callback = BalanceCallback(handle, sinks=[lambda metrics, step: given.append((step, metrics))])
    made = trainer(model, arguments(tmp_path, logging_steps=2), callback)
    made.train()
    assert [step for step, _ in given] == [2, 4]
    assert given[-1][1] == handle.metrics()


# -- checkpoints ----------------------------------------------------------------------------------

TERMS: dict[str, Callable[[], list[Any]]] = {
    "loss and sign": lambda: [Loss("switch", weight=0.1), Bias(Sign(rate=1e-2))],
    "running and quantile": lambda: [
        Loss("squared", scope="running", weight=0.1),
        Bias(QuantileHistogram()),
    ],
    "random subset": lambda: [Loss("switch", scope=Subset(seed=5), weight=0.1)],
}


@pytest.mark.parametrize("make", [mixtral, deepseek])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, make: Callable[[], Any], terms: Callable[[], list[Any]]
) -> None:
    """28 rows, three batches a step: the checkpoint lies within an epoch, before a short step."""
    args = arguments(
        tmp_path,
        max_steps=5,
        gradient_accumulation_steps=3,
        save_strategy="steps",
        save_steps=2,
    )
    model = make()
    handle = attach(model, *terms())
    trainer(model, args, BalanceCallback(handle), data=rows(28)).train()

    # The Trainer of transformers 5.23 loads no experts where checkpoints keep them one by one, as
    # Mixtral's and DeepSeek's do; from_pretrained does.
    again = type(model).from_pretrained(tmp_path / "checkpoint-2")
    other = attach(again, *terms())
    steps = Steps(other)
    made = trainer(again, args, BalanceCallback(other), steps, data=rows(28))
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps.accumulation == [1, 3, 3]
    same(model, again)
    assert known(handle) == known(other)
    for one, two in zip(handle.bias(), other.bias(), strict=True):
        assert torch.equal(one, two)


def known(handle: Handle) -> dict[str, float]:
    """Metrics without those that are not measured in every step."""
    sampled = ("gradient_share", "margin", "overruled_share")
    return {k: v for k, v in handle.metrics().items() if not k.endswith(sampled)}


def saved_run(folder: Path) -> None:
    model = mixtral()
    args = arguments(folder, max_steps=2, save_strategy="steps", save_steps=2)
    trainer(model, args, BalanceCallback(attach(model, Bias(Sign())))).train()


def resumed(folder: Path, checkpoint: Path, **options: Any) -> Handle:
    model = mixtral()
    handle = attach(model, Bias(Sign()))
    args = arguments(folder, max_steps=3)
    callback = BalanceCallback(handle, **options)
    trainer(model, args, callback).train(resume_from_checkpoint=str(checkpoint))
    return handle


def test_a_checkpoint_that_moved_is_refused_or_named(tmp_path: Path) -> None:
    saved_run(tmp_path / "one")
    moved = tmp_path / "elsewhere"
    (tmp_path / "one" / "checkpoint-2").rename(moved)
    with pytest.raises(EquipoiseError, match=r"balance\.pt .* resume_from="):
        resumed(tmp_path / "two", moved)
    assert resumed(tmp_path / "two", moved, resume_from=moved).book.step == 3


def test_another_runs_checkpoint_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    saved_run(tmp_path / "one")
    saved_run(tmp_path / "two")
    moved = tmp_path / "moved"
    (tmp_path / "one" / "checkpoint-2").rename(moved)
    with pytest.raises(EquipoiseError, match="resumes at step 2"):
        resumed(tmp_path / "two", moved)


def test_a_checkpoint_without_balance_begins_it_anew(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer(mixtral(), args).train()
    assert resumed(tmp_path, tmp_path / "checkpoint-2").book.step == 1


def test_the_best_checkpoint_brings_its_bias(tmp_path: Path) -> None:
    """The bias of a family without one is no part of the model that the Trainer loads."""
    model = mixtral()
    handle = attach(model, Bias(Sign(rate=0.1)))
    args = arguments(
        tmp_path,
        learning_rate=10.0,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    made = trainer(model, args, BalanceCallback(handle), eval_dataset=rows(8))
    made.train()
    best = Path(made.state.best_model_checkpoint)
    step = int(best.name.split("-")[1])
    assert step < 4
    assert handle.book.step == step


# -- beginning and end ----------------------------------------------------------------------------


def test_training_twice_forgets_what_an_interrupted_run_left(tmp_path: Path) -> None:
    class Break(TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    model = mixtral()
    handle = attach(model, Loss("switch"))
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    made = trainer(model, args, BalanceCallback(handle), stop := Break())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert handle.book.passes == 1
    made.remove_callback(stop)
    made.train()
    assert handle.book.step == 4


@pytest.mark.parametrize("detach", [True, False])
def test_the_end_detaches_only_when_asked(tmp_path: Path, detach: bool) -> None:
    model = mixtral()
    handle = attach(model, Loss("switch"))
    trainer(model, arguments(tmp_path), BalanceCallback(handle, detach=detach)).train()
    model.train()
    before = handle.book.passes
    model(input_ids=rows(2)[0]["input_ids"][None])
    assert handle.book.passes - before == (0 if detach else 1)


def test_a_handle_of_another_model_is_refused(tmp_path: Path) -> None:
    handle = attach(mixtral(), Loss("switch"))
    with pytest.raises(EquipoiseError, match=r"model\.layers\.0.* is not in the model"):
        trainer(mixtral(), arguments(tmp_path), BalanceCallback(handle)).train()


def test_a_detached_handle_is_refused_at_the_start_and_let_go_within(tmp_path: Path) -> None:
    class Detaches(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                handle.detach()

    model = mixtral()
    handle = attach(model, Loss("switch"))
    made = trainer(model, arguments(tmp_path), BalanceCallback(handle), Detaches())
    made.train()
    assert handle.book.step == 2
    assert ["balance/max_vio" in log for log in training_logs(made)] == [True, False, False, False]
    with pytest.raises(EquipoiseError, match="the handle is detached"):
        trainer(model, arguments(tmp_path), BalanceCallback(handle)).train()


def test_data_parallel_copies_are_refused(tmp_path: Path) -> None:
    model = mixtral()
    made = trainer(model, arguments(tmp_path), BalanceCallback(attach(model)))
    made.args._n_gpu = 2
    callback = made.callback_handler.callbacks[-2]
    with pytest.raises(EquipoiseError, match="torchrun"):
        callback.on_train_begin(made.args, made.state, made.control, model=model, optimizer=None)


# -- several processes ----------------------------------------------------------------------------


def sequential_run(folder: Path, rows_per_rank: int) -> dict[str, Any]:
    """Two steps of two micro-batches over rows in their order; what is left of it."""
    args = arguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=rows_per_rank,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        optim="sgd",
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        save_strategy="steps",
        save_steps=2,
    )
    model = mixtral()
    handle = attach(model, Loss("switch", weight=1.0), Bias(Sign(rate=1e-2)))
    trainer(model, args, BalanceCallback(handle), data=rows(32)).train()
    return {
        "ranks": handle.book.ranks,
        "counts": torch.stack(handle.counts()),
        "bias": torch.stack(handle.bias()),
        "router": model.model.layers[1].mlp.gate.weight.detach(),
    }


@pytest.mark.distributed
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """The group is bound when training begins; launched as torchrun does, attached before that."""
    code = f"""
import torch
from pathlib import Path
torch.set_num_threads(1)
from tests.balance import test_trainer as t
from tests.torchrun import leave
import importlib
# As where attach() comes before TrainingArguments start torch.distributed.
importlib.import_module("equipoise.balance.attach").group_of = lambda model, group: None
found = t.sequential_run(Path({str(tmp_path / "two")!r}), 4)
rank = torch.distributed.get_rank()
torch.save(found, {str(tmp_path)!r} + f"/found-{{rank}}.pt")
leave()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    torchrun(script)
    one = sequential_run(tmp_path / "one", 8)
    for rank in range(2):
        found = torch.load(tmp_path / f"found-{rank}.pt")
        assert found["ranks"] == 2
        assert torch.equal(found["counts"], one["counts"])
        assert torch.equal(found["bias"], one["bias"])
        torch.testing.assert_close(found["router"], one["router"], rtol=1e-5, atol=1e-7)
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert {f.name for f in checkpoint.glob("balance*")} == {"balance.pt", "balance_1.pt"}


def test_the_trainers_optimizer_is_known_to_a_life_cycle(tmp_path: Path) -> None:
    """Reviving needs the optimizer's state, which attach() was not given."""
    model = deepseek()
    dead = model.model.layers[0].mlp.gate.e_score_correction_bias
    dead[0] = -9.0
    handle = attach(model, Lifecycle(patience=2))
    trainer(model, arguments(tmp_path), BalanceCallback(handle)).train()
    revived = [event for event in handle.events if event.what == "revived"]
    assert [(event.layer, event.expert) for event in revived][:1] == [(0, 0)]
    assert handle.counts()[0][0] > 0
