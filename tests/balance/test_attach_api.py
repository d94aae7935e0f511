"""`attach` and its handle as the user meets them: refusals, steps, metrics, undoing."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from equipoise import balance
from equipoise.balance import (
    Bias,
    Handle,
    Loss,
    Running,
    Sign,
    Subset,
    TargetMaxVio,
    attach,
    objectives,
)
from equipoise.balance.measures import NAMES
from equipoise.errors import EquipoiseError, RoutingError

from .test_trainer import LENGTH, SIZE, deepseek, mixtral, rows


def batch(number: int = 0) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows()[4 * number : 4 * number + 4]])
    return {"input_ids": ids, "labels": ids}


def backward(handle: Handle, number: int = 0) -> None:
    handle.model.train()
    handle.model(**batch(number)).loss.backward()


def olmoe() -> Any:
    """A model whose MoE layers have the names and shapes of mixtral()'s."""
    return OlmoeForCausalLM(OlmoeConfig(**SIZE, num_experts=4, eos_token_id=None, pad_token_id=0))


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        ((Sign(),), {}, "a controller goes into Bias"),
        ((Bias(Sign()), Bias(Sign())), {}, "2 biases would move one"),
        ((Loss("switch"), Loss("switch", weight=1.0)), {}, "two losses are called 'switch_global'"),
        ((), {"reduction": "max"}, "not one of mean, sum"),
        ((), {"accumulation": 0}, "at least one micro-batch"),
        ((), {"layers": lambda site: False}, "no router to balance .2 found, none chosen"),
        ((), {"group": object()}, "torch.distributed is not running"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_is(
    terms: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    model = mixtral()
    model.config.output_router_logits = True
    with pytest.raises(EquipoiseError, match=message):
        attach(model, *terms, **options)
    assert model.config.output_router_logits
    attach(model, Loss("switch")).detach()


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(EquipoiseError, match="no router to balance"):
        attach(nn.Sequential(nn.Linear(2, 2)), Loss("switch"))


def test_two_handles_on_one_model_are_refused_and_the_first_goes_on() -> None:
    handle = attach(mixtral(), Loss("switch"))
    with pytest.raises(RoutingError, match="detach"):
        attach(handle.model, Loss("z"))
    backward(handle)
    handle.step()
    assert handle.book.step == 1


# -- steps ----------------------------------------------------------------------------------------


def test_a_wrong_number_of_micro_batches_is_an_error() -> None:
    handle = attach(mixtral(), Loss("switch"), accumulation=2)
    backward(handle)
    with pytest.raises(EquipoiseError, match=r"1 micro-batches were seen .* accumulation=2"):
        handle.step()
    backward(handle)
    handle.step()
    assert handle.tokens() == [8 * LENGTH] * 2


def test_a_step_without_a_token_is_none() -> None:
    handle = attach(mixtral(), Loss("switch"), Bias(Sign()))
    handle.step()
    assert handle.book.step == 0
    assert handle.metrics() == {}
    assert handle.tokens() == [0, 0]
    assert not torch.stack(handle.bias()).any()


def test_the_optimizers_step_ends_the_step_whether_given_early_or_late() -> None:
    biases = []
    for early in (True, False):
        model = mixtral()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = attach(model, Bias(Sign(rate=0.1)), optimizer=optimizer if early else None)
        if not early:
            handle.drive_with(optimizer)
        assert handle.optimizer is optimizer
        backward(handle)
        optimizer.step()
        assert handle.book.step == 1
        biases.append(torch.stack(handle.bias()))
        handle.detach()
        backward(handle)
        optimizer.step()
        assert handle.book.step == 1
    assert biases[0].any()
    assert torch.equal(*biases)


def test_discarded_micro_batches_leave_no_trace() -> None:
    counts = []
    for interrupted in (False, True):
        handle = attach(mixtral(), Loss("switch", weight=1.0), Bias(Sign()))
        if interrupted:
            backward(handle, 3)
            handle.discard()
            handle.model.zero_grad()
        backward(handle)
        handle.step()
        gradient = handle.model.model.layers[0].mlp.gate.weight.grad
        counts.append(torch.cat([gradient.flatten(), *handle.counts(), *handle.bias()]))
        assert handle.tokens() == [4 * LENGTH] * 2
    assert torch.equal(*counts)


def test_a_step_of_a_detached_handle_is_refused() -> None:
    handle = attach(mixtral(), Loss("switch"))
    backward(handle)
    handle.step()
    handle.detach()
    with pytest.raises(EquipoiseError, match=r"the handle is detached.*attach\(\) again"):
        handle.step()
    assert handle.state_dict()["step"] == 1


def test_binding_within_a_step_is_refused() -> None:
    handle = attach(mixtral(), Loss("switch"))
    handle.bind()
    backward(handle)
    with pytest.raises(EquipoiseError, match="1 micro-batches of a step are under way"):
        handle.bind()


def test_the_selections_sum_to_tokens_times_k() -> None:
    handle = attach(deepseek(), Loss("switch"))
    backward(handle)
    handle.step()
    assert [int(c.sum()) for c in handle.counts()] == [2 * n for n in handle.tokens()]


# -- metrics --------------------------------------------------------------------------------------


def test_metrics_have_their_names_in_every_layer() -> None:
    handle = attach(deepseek(), Loss("switch", weight=0.1), Loss("z"), Bias(Sign()))
    for number in range(2):
        backward(handle, number)
        handle.step()
    found = handle.metrics()
    extra = ("loss/switch_global", "loss/z_global", "bias_min", "bias_max", "bias_mean")
    for name in (*NAMES, *extra):
        layers = [found[f"balance/layer_{layer}/{name}"] for layer in (0, 1)]
        assert found[f"balance/{name}"] == pytest.approx(sum(layers) / 2), name
    assert found["balance/step"] == 2
    assert all(type(value) is float for value in found.values())


def test_every_metric_stands_in_the_docs() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "balance.md").read_text()
    for name in (*NAMES, "bias_min", "bias_max", "bias_mean", "loss/<name>", "step"):
        assert f"`{name}`" in page, name


# -- saving and undoing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: attach(mixtral(), Loss("switch")), "controller"),
        (lambda: attach(olmoe(), Loss("switch"), Bias(Sign())), "'mixtral' model.*'olmoe'"),
        (lambda: attach(mixtral(), Loss("z"), Bias(Sign())), "losses"),
        (
            lambda: attach(
                mixtral(), Loss("switch"), Bias(Sign()), layers=lambda site: site.layer == 0
            ),
            "of 2 MoE layers, this model has 1",
        ),
    ],
    ids=["controller", "family", "losses", "layers"],
)
def test_a_state_of_other_terms_or_layers_is_refused(other: Any, message: str) -> None:
    saved = attach(mixtral(), Loss("switch"), Bias(Sign())).state_dict()
    handle = other()
    before = handle.state_dict()
    with pytest.raises(EquipoiseError, match=message):
        handle.load_state_dict(saved)
    assert str(before) == str(handle.state_dict())


def test_no_state_is_saved_within_a_step() -> None:
    handle = attach(mixtral(), Loss("switch"))
    backward(handle)
    with pytest.raises(EquipoiseError, match="1 micro-batches of a step are under way"):
        handle.state_dict()


def test_the_with_block_gives_the_model_back() -> None:
    model, plain = mixtral().train(), mixtral().train()
    model.config.output_router_logits = plain.config.output_router_logits = True
    with attach(model, Loss("switch", weight=1.0), Bias(Sign(rate=0.5))) as handle:
        backward(handle)
        handle.step()
    model.zero_grad()
    for one in (model, plain):
        one(**batch()).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert set(model.state_dict()) == set(plain.state_dict())


def test_a_weight_in_transformers_convention_gives_the_gradient_of_its_own_loss() -> None:
    """One layer, where pooling over layers changes nothing: K times ours."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=3,
        router_aux_loss_coef=0.02,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).train()
    ids = torch.randint(0, 64, (2, 32))
    gate = model.model.layers[0].mlp.gate.weight

    def gradient(**extra: bool) -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids, **extra).loss.backward()
        assert gate.grad is not None
        return gate.grad.clone()

    plain = gradient()
    theirs = gradient(output_router_logits=True) - plain
    with attach(model, Loss("switch", weight=0.02, convention="transformers")):
        ours = gradient() - plain
    assert torch.allclose(ours, theirs, atol=1e-7)
    assert theirs.abs().max() > 1e-5


def test_conventions_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(EquipoiseError, match="transformers"):
        Loss("switch", convention="transfomers")
    with pytest.raises(EquipoiseError, match="switch loss only"):
        Loss("z", convention="transformers")


def test_a_detached_handle_and_its_optimizer_go_with_their_last_user() -> None:
    gc.disable()
    try:
        model = mixtral()
        optimizer = torch.optim.AdamW(model.parameters())
        handle = attach(model, Loss("switch"), Bias(Sign()), optimizer=optimizer)
        backward(handle)
        optimizer.step()
        handle.detach()
        kept = weakref.ref(handle), weakref.ref(optimizer)
        del handle, optimizer
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


def test_what_batch_says_has_to_fit_what_the_model_is_called_with() -> None:
    model = mixtral().train()
    with attach(model, Loss("switch")) as handle:
        with (
            handle.batch(valid=torch.ones(3, 3)),
            pytest.raises(EquipoiseError, match=r"valid=...\) is \[3, 3\]"),
        ):
            model(**batch())
        with pytest.raises(EquipoiseError, match="has to be a tensor"), handle.batch(valid=[[1]]):
            pass


@pytest.mark.parametrize("seen", [1, 3])
def test_a_preview_holds_the_micro_batches_of_the_step(seen: int) -> None:
    model = mixtral().train()
    terms = Loss("switch", scope="exact")
    with (
        attach(model, terms, accumulation=2) as handle,
        pytest.raises(EquipoiseError, match=f"{seen} micro-batches were run inside"),
        handle.preview(),
        torch.no_grad(),
    ):
        for number in range(seen):
            model(**batch(number))


def test_a_number_of_tokens_that_was_not_seen_is_refused_before_the_optimizer_moves() -> None:
    model = mixtral()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with attach(model, Loss("switch"), optimizer=optimizer) as handle:
        handle.expect(tokens=10)
        backward(handle)
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(EquipoiseError, match=f"{4 * LENGTH} valid tokens were seen"):
            optimizer.step()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        handle.expect(tokens=4 * LENGTH)
        backward(handle)
        optimizer.step()


def test_steps_that_never_end_are_noticed_at_the_next_micro_batch() -> None:
    model = mixtral()
    with attach(model, Loss("switch")) as handle:
        backward(handle)
        with pytest.raises(EquipoiseError, match="Micro-batch 2 of an optimizer step"):
            backward(handle)
        handle.discard()
        backward(handle)


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = torch.optim.SGD(mixtral().parameters(), lr=0.1)
    with pytest.raises(EquipoiseError, match="no parameter of this model"):
        attach(mixtral(), Loss("switch"), optimizer=other)


def test_a_config_saved_while_attached_keeps_the_models_own_coefficient(tmp_path: Path) -> None:
    model = mixtral()
    model.config.output_router_logits = True
    wanted = model.config.router_aux_loss_coef
    assert wanted > 0
    with attach(model, Loss("switch")):
        model.save_pretrained(tmp_path)
    saved = MixtralConfig.from_pretrained(tmp_path)
    assert saved.router_aux_loss_coef == wanted
    assert saved.output_router_logits


def test_a_loss_on_the_routers_weight_is_measured_and_has_nothing_to_check() -> None:
    model = mixtral()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, Loss("router_orthogonality"), optimizer=optimizer) as handle:
        backward(handle)
        optimizer.step()
        weight = model.model.layers[0].mlp.gate.weight.detach()
        value = objectives.router_orthogonality(weight_ED=weight)
        name = "balance/layer_0/loss/router_orthogonality_global"
        assert handle.metrics()[name] == pytest.approx(float(value), rel=1e-5)
        with pytest.raises(EquipoiseError, match="about the backward pass"):
            handle.check(**batch())


@pytest.mark.parametrize(
    "loss",
    [
        Loss("switch"),
        Loss("switch", scope=Running(decay=0.5), weight=0.1, count="kept"),
        Loss("communication", options={"groups": 4}),
        Loss("switch", controller=TargetMaxVio(0.3), convention="megatron"),
        Loss("entropy", scope=Subset(seed=3), weight=-1.0, name="mine"),
    ],
    ids=repr,
)
def test_a_loss_prints_as_the_call_that_makes_it(loss: Loss) -> None:
    made = eval(repr(loss), vars(balance))
    assert (made.scope, made.weight, made.count) == (loss.scope, loss.weight, loss.count)
    assert (made.options, made.controller) == (loss.options, loss.controller)
    assert (made.convention, made.name) == (loss.convention, loss.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loss("switch", weight="0.1"), "neither a number nor a schedule"),
        (lambda: Loss("switch", controller=Sign()), "steers a bias"),
        (lambda: Loss("router_orthogonality", options={"kind": "erni"}), "ernie, simbal"),
        (lambda: Bias(Sign), "a controller with update"),
        (lambda: attach(mixtral(), Loss("switch"), accumulation=1.5), "a whole number"),
        (lambda: attach(mixtral(), Loss("switch"), layers=[0]), "is not callable"),
        (lambda: attach(mixtral(), Loss("switch"), optimizer="adamw"), "no torch.optim.Optimizer"),
        (lambda: attach("mixtral", Loss("switch")), "str is no model"),
    ],
)
def test_things_of_the_wrong_kind_are_refused_in_words(make: Any, message: str) -> None:
    with pytest.raises(EquipoiseError, match=message):
        make()


def test_a_broken_state_is_refused_before_anything_changes() -> None:
    handle = attach(mixtral(), Bias(Sign()))
    state = handle.state_dict()
    state["biases"][0][0] = float("nan")
    with pytest.raises(EquipoiseError, match="not finite"):
        handle.load_state_dict(state)
    with pytest.raises(EquipoiseError, match="losses missing"):
        handle.load_state_dict({k: v for k, v in state.items() if k != "losses"})
