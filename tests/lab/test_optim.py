"""Optimizers and learning rates."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from equipoise.lab import LanguageModel, ModelConfig, OptimizerConfig
from equipoise.lab.optim import Muon, make_optimizer, orthogonalised, rate_at

STEPS = 100


def rates(**values: object) -> list[float]:
    config = OptimizerConfig(**values)  # type: ignore[arg-type]
    return [rate_at(step, STEPS, config) for step in range(STEPS)]


def test_every_schedule_warms_up_in_a_line_to_the_highest_rate() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        found = rates(schedule=schedule, warmup_share=0.1)
        assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(found) == 1


def test_cosine_falls_to_the_floor_half_way_in_the_middle() -> None:
    found = rates(schedule="cosine", warmup_share=0.0, floor=0.2)
    assert found[0] == 1
    assert found[-1] == pytest.approx(0.2)
    assert (found[49] + found[50]) / 2 == pytest.approx(0.6)
    assert all(a > b for a, b in pairwise(found))


def test_wsd_stays_then_falls_in_a_line_to_the_floor() -> None:
    found = rates(schedule="wsd", warmup_share=0.1, decay_share=0.2, floor=0.1)
    assert set(found[9:80]) == {1.0}
    assert found[-1] == pytest.approx(0.1)
    assert {round(a - b, 6) for a, b in pairwise(found[79:])} == {0.045}


def test_constant_stays() -> None:
    assert set(rates(schedule="constant", warmup_share=0.0)) == {1.0}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_runs_of_a_few_steps_have_a_rate(schedule: str, steps: int) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_share=0.5, decay_share=0.5)  # type: ignore[arg-type]
    assert all(0 < rate_at(step, steps, config) <= 1 for step in range(steps))


def muon(parameter: nn.Parameter) -> Muon:
    group = {"params": [parameter], "lr": 0.02, "muon": True}
    return Muon([group], weight_decay=0.1)


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_muon_of_a_matrix_is_that_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine, other = muon(ours), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.equal(ours, start)


def test_muon_takes_the_matrices_of_a_stack_one_by_one() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 8, 24)
    stack = nn.Parameter(start.clone())
    single = [nn.Parameter(matrix.clone()) for matrix in start]
    together, apart = muon(stack), [muon(matrix) for matrix in single]
    for _ in range(3):
        stack.grad = torch.randn(3, 8, 24)
        together.step()
        for matrix, grad, optimizer in zip(single, stack.grad, apart, strict=True):
            matrix.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in single]))


@pytest.mark.parametrize("shape", [(16, 16), (2, 32, 8), (2, 8, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_are_in_one_group_each_with_the_rate_of_their_kind(name: str) -> None:
    sizes = {"hidden_size": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_size": 8}
    shape = ModelConfig(
        **sizes, layers=3, dense_layers=1, dense_size=8, router="softmax(noise=learned)"
    )
    model = LanguageModel(shape, 64)
    config = OptimizerConfig(name=name, router_lr_scale=0.5)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, model, config)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    gates = [layer.gate for layer in model.moe_layers()]
    routers = {id(weight) for gate in gates for weight in (gate.weight, gate.noise.weight)}
    assert len(routers) == 4
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (parameter.ndim == 1)
            if id(parameter) in routers:
                assert group["lr"] == config.lr / 2
            elif parameter.ndim == 1 or parameter is model.embedding.weight or name == "adamw":
                assert group["lr"] == config.lr
            else:
                assert group["lr"] == config.muon_lr
