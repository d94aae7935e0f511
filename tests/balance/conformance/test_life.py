"""Over several real steps: resuming, evaluation, packing, experts and batches without tokens."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.balance import (
    Bias,
    Handle,
    Loss,
    MomentumTanh,
    QuantileHistogram,
    Subset,
    TargetMaxVio,
    attach,
)
from tests.balance.conformance.models import EXPERTS, FAMILIES, Batch, batch, build
from tests.balance.conformance.reference import Term, gradients, heard, loss
from tests.balance.conformance.settings import SINGLE, Runner, Setting, loss_of, run
from tests.balance.conformance.verdict import heard_in

pytestmark = pytest.mark.slow

STEPS = 6


def terms(controller: Any) -> list[Loss | Bias]:
    """What keeps a state between steps, of every kind."""
    return [
        Loss("switch", "running", weight=0.1),
        Loss("importance", Subset(seed=7), weight=0.1),
        Loss("squared", "previous", weight=0.1),
        Loss("switch", "global", weight=1e-2, controller=TargetMaxVio(0.5, 0.1)),
        Bias(controller),
    ]


class Training:
    """A model, momentum, and a handle; `save` and `load` as a checkpoint does."""

    def __init__(self, family: str, controller: Any) -> None:
        self.model = build(family)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.handle = attach(
            self.model, *terms(controller), optimizer=self.optimizer, accumulation=2
        )

    def step(self, number: int) -> None:
        data = batch("padded", number % 2)
        for piece in (data.rows(0, 4), data.rows(4, 8)):
            (piece.main_loss(self.model(**piece.given).logits) * 1e3).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.handle)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.handle), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("controller", [MomentumTanh(0.05), QuantileHistogram(ema=0.5)], ids=repr)
def test_resumed_equals_never_stopped(family: str, controller: Any) -> None:
    whole = Training(family, controller)
    for number in range(STEPS):
        if number == STEPS // 2:
            saved = whole.save()
        whole.step(number)
    resumed = Training(family, controller)
    resumed.step(0)
    resumed.load(saved)
    for number in range(STEPS // 2, STEPS):
        resumed.step(number)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.handle.bias(), resumed.handle.bias(), strict=True):
        assert torch.equal(one, other)
    mine, theirs = whole.handle.metrics(), resumed.handle.metrics()
    assert mine == theirs


def test_a_state_left_out_is_noticed() -> None:
    """The comparison above can fail: without the handle's state the runs differ."""
    whole, resumed = (Training("mixtral", MomentumTanh(0.05)) for _ in range(2))
    for number in range(2):
        whole.step(number)
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    for training in (whole, resumed):
        training.step(2)
    pairs = zip(whole.handle.bias(), resumed.handle.bias(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def counts(handle: Handle) -> Tensor:
    return torch.stack(handle.counts())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SINGLE, ids=lambda s: s.name)
def test_every_token_is_counted_once(setting: Setting, family: str) -> None:
    runner = Runner(family, setting, [loss_of(Term("switch", "exact"))])
    runner.step(0)
    run_ = heard_in(setting, family, 0)
    wanted = [torch.bincount(ids[run_.valid_T].reshape(-1), minlength=EXPERTS) for ids in run_.ids]
    assert torch.equal(counts(runner.handle).long(), torch.stack(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_segment_ids_say_what_position_ids_say(family: str) -> None:
    """The same packed sequences, told by numbers of any kind instead of restarting positions."""
    data = batch("packed", 0)
    told, found = [], []
    for by in ("positions", "segments"):
        model = build(family)
        handle = attach(model, loss_of(Term("switch", "sequence")))
        names = data.segment_BS * 37 + 11
        if by == "segments":
            handle._undo.pop()()  # the hooks that look at positions
            with handle.batch(segment_ids=names):
                model(**data.given).logits.mul(0).sum().backward()
        else:
            model(**data.given).logits.mul(0).sum().backward()
        (told if by == "segments" else found).append(
            {n: p.grad for n, p in model.named_parameters() if n.endswith("gate.weight")}
        )
    for name, grad in found[0].items():
        assert torch.equal(grad, told[0][name])
        assert grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_that_nobody_selects(family: str) -> None:
    """Its load is 0: no NaN, the bias goes up, and the others' gradient is the formula's."""
    model, data = build(family), batch("full", 0)
    handle = attach(
        model, loss_of(Term("switch", "global")), Bias(MomentumTanh(0.05)), optimizer=None
    )
    for bias in handle.biases:
        bias.write(torch.tensor([0.0] * 3 + [-9.0] + [0.0] * 4))
    model(**data.given).logits.sum().backward()
    before = torch.stack(handle.bias())
    handle.step()
    assert not counts(handle)[:, 3].any()
    after = torch.stack(handle.bias())
    assert (after - before).argmax(1).tolist().count(3) >= 1
    assert ((after - before)[:, 3] > 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def zero_tokens(data: Batch) -> Batch:
    nothing = torch.zeros_like(data.valid_BS)
    given = {**data.given, "attention_mask": nothing.long()}
    return Batch(given, nothing, data.segment_BS, data.slope_BSV * 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["switch", "importance", "communication", "z", "entropy"])
def test_batch_without_a_token_moves_nothing(family: str, objective: str) -> None:
    data = zero_tokens(batch("full", 0))
    for scope in ("micro", "global", "sequence", "running"):
        model = build(family)
        handle = attach(model, loss_of(Term(objective, scope)), Bias(QuantileHistogram()))
        before = torch.stack(handle.bias())
        data.main_loss(model(**data.given).logits).backward()
        handle.step()
        assert torch.equal(before, torch.stack(handle.bias()))
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or not parameter.grad.any(), (scope, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_add_up(family: str) -> None:
    """Terms of several scopes at once, padded: the gradient is the sum of theirs."""
    setting = SINGLE[1]
    several = [Term("switch", "sequence"), Term("switch", "micro"), Term("z", "group")]
    several.append(Term("importance", "global"))
    found = Runner(family, setting, [loss_of(t) for t in several]).step(0).gradients
    run_ = heard(family, setting.data, 0)
    wanted = gradients(run_, run_.main + sum(loss(t, run_, setting.split) for t in several))
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, grad in wanted.items():
        assert float((found[name] - grad).abs().max()) <= 2e-6 * largest, name


def test_forward_passes_without_backward_are_forgotten() -> None:
    """A step whose passes had no backward leaves nothing behind for the next."""
    setting, term = SINGLE[0], Term("switch", "global")
    wanted = next(run("mixtral", setting, [term])).gradients
    runner = Runner("mixtral", setting, [loss_of(term)])
    runner.model(**batch("full", 1).given)
    runner.handle.step()
    found = runner.step(0).gradients
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
