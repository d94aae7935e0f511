"""Each way of going wrong is refused in words that name the layer, before anything has moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.balance import Bias, Handle, Loss, QuantileHistogram, Running, Sign, attach
from equipoise.errors import EquipoiseError, RoutingError
from tests.balance.conformance.models import FAMILIES, SHARED, Batch, batch, build
from tests.balance.conformance.reference import Term, gradients, heard, loss
from tests.balance.conformance.settings import ONE, loss_of

DATA = batch("full", 0)
GLOBAL = Loss("switch", "global", weight=1.0)


def backward(model: Any, data: Batch = DATA) -> None:
    data.main_loss(model(**data.given).logits).backward()


NAN, INF = float("nan"), float("inf")
SPOILT = [
    *(
        (family, NAN, terms)
        for family in FAMILIES
        for terms in ([], [GLOBAL], [Loss("z", "micro")])
    ),
    *((family, INF, terms) for family in FAMILIES for terms in ([], [Loss("z", "micro")])),
    # The sigmoid of an infinite logit is 1: there a loss on probabilities sees nothing amiss.
    ("mixtral", INF, [GLOBAL]),
]


@pytest.mark.parametrize(("family", "value", "terms"), SPOILT, ids=str)
def test_scores_that_are_no_numbers_name_the_layer(
    family: str, value: float, terms: list[Loss]
) -> None:
    model = build(family)
    handle = attach(model, *terms, Bias(Sign(0.1)))
    gate = model.get_submodule(handle.sites[1].path).gate
    weight = gate.weight.detach().clone()
    before = torch.stack(handle.bias())
    gate.weight.data[2] = value
    if value == INF:
        gate.register_forward_pre_hook(lambda _, args: (args[0].abs() + 1,))
    backward(model)
    with pytest.raises(
        EquipoiseError, match=rf"^{handle.sites[1].path}: router scores were NaN or infinite"
    ):
        handle.step()
    assert torch.equal(before, torch.stack(handle.bias()))
    gate.weight.data = weight
    gate._forward_pre_hooks.clear()
    backward(model)
    handle.step()
    assert not torch.equal(before, torch.stack(handle.bias()))


@pytest.mark.distributed
@pytest.mark.parametrize("scope", ["micro", "global"])
def test_scores_of_one_rank_are_refused_on_all(scope: str, ranks: list[dict[str, Any]]) -> None:
    """Else the others would wait for it."""
    said = [rank["refused"][scope] for rank in ranks]
    assert said[0] == said[1]
    assert said[0].startswith("model.layers.1.mlp: router scores were NaN or infinite")


def test_a_step_that_was_refused_leaves_nothing_in_the_next() -> None:
    """Neither counts nor the scores that a controller saw."""

    def biases(spoilt: bool) -> torch.Tensor:
        model = build("mixtral")
        handle = attach(model, Loss("switch", Running(0.5)), GLOBAL, Bias(QuantileHistogram()))
        if spoilt:
            weight = model.model.layers[0].mlp.gate.weight
            kept, weight.data = weight.data, weight.data * float("nan")
            backward(model, batch("full", 1))
            with pytest.raises(EquipoiseError, match="NaN or infinite"):
                handle.step()
            weight.data = kept
            model.zero_grad()
        backward(model)
        handle.step()
        grads = [p.grad.flatten() for n, p in model.named_parameters() if n.endswith("gate.weight")]
        return torch.cat([*handle.bias(), *grads])

    assert torch.equal(biases(spoilt=False), biases(spoilt=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_of_zero_adds_nothing_and_check_says_so(family: str) -> None:
    model = build(family)
    names = ("switch", "importance", "z", "score_variance", "router_orthogonality")
    handle = attach(model, *(Loss(name, "micro", weight=0.0) for name in names))
    backward(model)
    handle.step()
    run = heard(family, "full", 0)
    for name, wanted in gradients(run, run.main).items():
        found = model.get_parameter(name).grad
        assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max() + 1e-9), name
    with pytest.raises(EquipoiseError, match=r"check\(\): the formula gives no gradient at all"):
        handle.check(**DATA.given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["micro", "group", "global", "exact", "previous"])
def test_check_finds_the_gradient_right_and_disturbs_nothing(family: str, scope: str) -> None:
    model, padded = build(family), batch("padded", 0)
    terms = [Term("switch", scope), Term("importance", scope), Term("communication", scope)]
    handle = attach(model, *map(loss_of, [*terms, Term("z", scope)]), accumulation=2)
    backward(model, padded.rows(0, 4)) if scope != "exact" else None
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    report = handle.check(**padded.given)
    assert report.difference < 1e-5
    assert len(report.routers) == 2
    assert all(norm > 0 for norm in report.routers.values())
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert handle.book.passes == (0 if scope == "exact" else 1)


def test_check_finds_a_gradient_that_does_not_arrive() -> None:
    model = build("mixtral")
    handle = attach(model, GLOBAL)
    found = handle.layers[0].gradient

    def halved(record: Any, scores: torch.Tensor) -> Any:
        given = found(record, scores)
        return None if given is None else given * 0.5

    handle.layers[0].gradient = halved  # type: ignore[method-assign]
    with pytest.raises(EquipoiseError, match="gets a balancing gradient of norm"):
        handle.check(**DATA.given)


def attached(*terms: Any, family: str = "mixtral", **options: Any) -> Handle:
    return attach(build(family), *terms, **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "objective": (
        lambda: Loss("swich"),
        r"Loss\('swich'\): not one of switch, .*Did you mean .?switch",
    ),
    "scope": (lambda: Loss("switch", "globl"), "scope='globl' is not one of sequence, .*global"),
    "count": (lambda: Loss("switch", count="dropped"), "count='dropped' is not one of selected"),  # type: ignore[arg-type]
    "weight": (lambda: Loss("switch", weight=-1.0), "has to be a finite number of at least 0"),
    "weight nan": (lambda: Loss("switch", weight=float("nan")), "has to be a finite number"),
    "option": (lambda: Loss("switch", options={"groups": 2}), "no option 'groups'; it takes none"),
    "option missing": (lambda: Loss("group"), r"Loss\('group'\) needs options=\{'groups'"),
    "subset of unbiased": (
        lambda: Loss("switch", "subset", count="unbiased"),
        "count='unbiased' is not to be had with the communication loss or scope='subset'",
    ),
    "decay": (lambda: Running(decay=1.0), r"decay=1.0 has to be in \[0, 1\)"),
    "bias scope": (lambda: Bias(Sign(), scope="group"), "scope='group' is not one of global"),  # type: ignore[arg-type]
    "bias without controller": (lambda: Bias(0.1), r"a controller with update\(\) is needed"),
    "quantile by micro": (
        lambda: Bias(QuantileHistogram(), scope="micro"),
        'it knows no scope="micro"',
    ),
    "groups": (
        lambda: attached(Loss("group", options={"groups": 3})),
        "8 experts of model.layers.0.mlp do not divide into 3 equal groups",
    ),
    "group list": (
        lambda: attached(Loss("communication", options={"groups": [0, 1]})),
        "groups names 2 experts, but model.layers.0.mlp has 8",
    ),
    "two biases": (lambda: attached(Bias(Sign()), Bias(Sign())), "2 biases would move one"),
    "two losses of one name": (lambda: attached(GLOBAL, GLOBAL), "two losses are called"),
    "a controller alone": (lambda: attached(Sign()), "goes into Bias"),
    "reduction": (lambda: attached(GLOBAL, reduction="max"), "reduction='max' is not one of mean"),
    "accumulation": (lambda: attached(GLOBAL, accumulation=0), "at least one micro-batch"),
    "layers": (
        lambda: attached(GLOBAL, layers=lambda site: False),
        r"no router to balance \(2 found, none chosen\). layers= left none",
    ),
    "group without processes": (lambda: attached(GLOBAL, group=object()), "is not running"),
    "tokens": (lambda: attached(GLOBAL).expect(tokens=0), "at least one token"),
    "check without loss": (lambda: attached(Bias(Sign())).check(**DATA.given), "no Loss is"),
    "check without batch": (lambda: attached(GLOBAL).check(), "needs a batch"),
    "check of a history": (
        lambda: attached(Loss("switch", "running")).check(**DATA.given),
        "scope 'running' of switch_running depends on more than one batch",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_refused_in_words(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(EquipoiseError, match=message):
        mistake()


def test_dense_model_has_no_router() -> None:
    config = {k: v for k, v in SHARED.items() if k != "num_experts_per_tok"}
    dense = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=1))
    with pytest.raises(EquipoiseError, match=r"LlamaForCausalLM: no router .*Its layers are dense"):
        attach(dense, GLOBAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_attach_is_refused_and_the_first_goes_on(family: str) -> None:
    alone, model = build(family), build(family)
    handles = [attach(m, GLOBAL, Bias(Sign(0.1))) for m in (alone, model)]
    with pytest.raises(RoutingError, match=r"model.layers.\d.mlp is already steered: detach\(\)"):
        attach(model, Loss("z", "micro"), Bias(Sign(0.2)))
    for m in (alone, model):
        backward(m)
    for handle in handles:
        handle.step()
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    assert torch.equal(torch.stack(handles[0].bias()), torch.stack(handles[1].bias()))
    handles[1].detach()
    attach(model, Loss("z", "micro"), Bias(Sign(0.2))).detach()


def test_steps_of_another_number_of_micro_batches_are_refused() -> None:
    model = build("mixtral")
    handle = attach(model, GLOBAL, accumulation=2)
    backward(model)
    with pytest.raises(EquipoiseError, match=r"1 micro-batches were seen .* accumulation=2"):
        handle.step()
    handle.accumulation = 1
    handle.step()


def test_exact_scope_without_the_whole_step_says_how_to_get_it() -> None:
    model = build("mixtral")
    attach(model, Loss("switch", "exact"), accumulation=2)
    with pytest.raises(EquipoiseError, match=r"1 of 2 micro-batches .*handle.preview\(\)"):
        backward(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_of_another_model_changes_nothing(family: str) -> None:
    handle = attached(GLOBAL, Bias(Sign(0.1)), family=family)
    backward(handle.model)
    handle.step()
    good, bias = handle.state_dict(), torch.stack(handle.bias())
    path = handle.sites[0].path
    for change, message in (
        ({"layers": good["layers"][:1]}, "the state is of 1 MoE layers, this model has 2"),
        ({"layers": [[path, 16, 2], good["layers"][1]]}, f"{path} has 8 experts, top-2; the state"),
        ({"losses": ["z_micro"]}, "saved with losses .*z_micro.*Attach the same terms"),
        ({"controller": "PID"}, "saved with controller 'PID', attached with 'Sign'"),
        ({"version": 99}, "a balance state of version 1 is needed, this is 99"),
    ):
        with pytest.raises(EquipoiseError, match=message):
            handle.load_state_dict({**good, "biases": [b + 1 for b in good["biases"]], **change})
        assert torch.equal(bias, torch.stack(handle.bias()))
    with pytest.raises(EquipoiseError, match="this is 'list'"):
        handle.load_state_dict([])  # type: ignore[arg-type]


def test_state_in_the_middle_of_a_step_is_refused() -> None:
    handle = attached(GLOBAL, accumulation=2)
    backward(handle.model)
    with pytest.raises(EquipoiseError, match="1 micro-batches of a step are under way"):
        handle.state_dict()


def test_losses_of_a_step_are_those_of_the_reference() -> None:
    """The values in the metrics, not only the gradients."""
    terms = [Term("switch", "global"), Term("group", "micro"), Term("z", "group")]
    handle = attached(*map(loss_of, terms))
    backward(handle.model)
    handle.step()
    run = heard("mixtral", "full", 0)
    for term in terms:
        wanted = float(loss(term, run, ONE).detach())
        assert handle.metrics()[f"balance/loss/{term.name}"] == pytest.approx(wanted, rel=1e-5)
