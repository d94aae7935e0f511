"""Dead experts are revived, frozen, woken and retired; everything else stays as it was."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance import Adversarial, Bias, Lifecycle, Loss, Quantile, Sign, attach
from equipoise.balance.experts import expert_rows
from equipoise.errors import EquipoiseError
from equipoise.models import discover

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny import build, inputs_for, randomise_routing

pytestmark = pytest.mark.slow

DEAD, LAYER = 3, 1


@pytest.fixture
def model() -> nn.Module:
    """A tiny Mixtral in training mode whose routers decide by token."""
    found = build("mixtral", num_hidden_layers=2).train()
    randomise_routing(found)
    return found


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 250, (4, 32), generator=generator)
    return {"input_ids": ids, "labels": ids}


def kill(model: Any, expert: int = DEAD, layer: int = LAYER) -> None:
    """Turn the router's row of an expert until its score is far from the two best everywhere."""
    gate, heard = model.model.layers[layer].mlp.gate, []
    handle = gate.register_forward_pre_hook(lambda _, args: heard.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**inputs())
        handle.remove()
        hidden_TD, weight_ED = heard[0], gate.weight.data
        for _ in range(1000):
            scores_TE = hidden_TD @ weight_ED.T
            near_T = scores_TE[:, expert] > scores_TE.topk(2).values[:, 1] - 1.0
            if not near_T.any():
                return
            weight_ED[expert] -= 0.1 * hidden_TD[near_T].mean(0)
    raise AssertionError("the expert would not die")


def train(model: Any, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs()).loss.backward()
        optimizer.step()


def parts(model: Any, layer: int) -> dict[str, Tensor]:
    block = model.model.layers[layer].mlp
    return {
        "gate": block.gate.weight,
        "inner": block.experts.gate_up_proj,
        "down": block.experts.down_proj,
    }


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-4, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_dead_expert_gets_tokens_again_and_no_other_is_touched(model: Any, kind: str) -> None:
    """Beside a twin that goes the same way without a Lifecycle."""
    kill(model)
    twin = copy.deepcopy(model)
    optimizer, of_twin = (OPTIMIZERS[kind](m.parameters()) for m in (model, twin))
    handle = attach(model, Lifecycle(patience=3, noise=0.01), optimizer=optimizer)
    train(model, optimizer, 2)
    train(twin, of_twin, 2)
    assert handle.counts()[LAYER][DEAD] == 0
    assert not handle.events
    train(model, optimizer)
    train(twin, of_twin)
    (event,) = handle.events
    assert (event.step, event.layer, event.expert, event.what) == (2, LAYER, DEAD, "revived")
    assert event.donor == int(handle.counts()[LAYER].argmax())
    assert handle.metrics()["balance/revived"] == 1
    for (name, now), (_, was) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        if not any(now is held for held in parts(model, LAYER).values()):
            assert torch.equal(now, was), name
    for name, now in parts(model, LAYER).items():
        was = parts(twin, LAYER)[name]
        others = [e for e in range(8) if e != DEAD]
        assert torch.equal(now[others], was[others]), name
        assert not torch.equal(now[DEAD], was[DEAD]), name
    train(model, optimizer)
    assert handle.counts()[LAYER][DEAD] > 0


def test_the_copy_is_the_donor_plus_noise_of_the_size_that_was_asked_for(model: Any) -> None:
    kill(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for noise in (0.0, 0.05):
        alike = copy.deepcopy(model)
        optimizer = torch.optim.SGD(alike.parameters(), lr=0.0)
        with attach(alike, Lifecycle(patience=1, noise=noise), optimizer=optimizer) as handle:
            train(alike, optimizer)
            donor = handle.events[0].donor
        for tensor in parts(alike, LAYER).values():
            difference = (tensor[DEAD] - tensor[donor]).detach()
            wanted = noise * float(tensor[donor].detach().std(correction=0))
            assert float(difference.std()) == pytest.approx(wanted, rel=0.3)


@pytest.mark.parametrize("moments", ["fresh", "zero", "copy"])
def test_the_optimizers_memory_goes_with_the_expert(model: Any, moments: Any) -> None:
    kill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    handle = attach(model, Lifecycle(patience=2, moments=moments), optimizer=optimizer)
    train(model, optimizer)
    optimizer.zero_grad()
    model(**inputs()).loss.backward()
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in parts(model, LAYER).items()}
    handle.step()
    donor = handle.events[0].donor
    for name, parameter in parts(model, LAYER).items():
        state, was = optimizer.state[parameter], before[name]
        for moment in ("exp_avg", "exp_avg_sq"):
            zeroed = moments == "zero" or (moments == "fresh" and moment == "exp_avg")
            wanted = torch.zeros_like(was[moment][DEAD]) if zeroed else was[moment][donor]
            assert torch.equal(state[moment][DEAD], wanted)
            others = [e for e in range(8) if e != DEAD]
            assert torch.equal(state[moment][others], was[moment][others])
        assert state["step"] == was["step"]
        assert not parameter.grad[DEAD].any()
    assert parts(model, LAYER)["gate"].grad.any()


def test_two_ranks_draw_the_same_noise(model: Any) -> None:
    """Two processes with their own random state; counts are the same on all ranks."""
    kill(model)
    found = []
    for rank in range(2):
        mine = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-4)
        with attach(mine, Lifecycle(patience=1, router="fresh"), optimizer=optimizer):
            torch.manual_seed(rank)
            torch.rand(rank * 7)
            train(mine, optimizer, 2)
        found.append(mine.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_resumed_equals_never_stopped(model: Any) -> None:
    kill(model)
    term = Lifecycle(patience=3, noise=0.1, freeze={0: [2]}, asleep=2, awake=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    handle = attach(model, term, Bias(Sign(rate=1e-4)), optimizer=optimizer)
    train(model, optimizer, 2)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    train(model, optimizer, 4)
    wanted, events, bias = copy.deepcopy(model.state_dict()), list(handle.events), handle.bias()
    handle.detach()
    model.load_state_dict(saved[0])
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-4)
    fresh.load_state_dict(saved[1])
    with attach(model, term, Bias(Sign(rate=1e-4)), optimizer=fresh) as resumed:
        resumed.load_state_dict(saved[2])
        train(model, fresh, 4)
        assert resumed.events == events
        assert {"revived", "frozen", "woken"} <= {event.what for event in events}
        for here, there in zip(resumed.bias(), bias, strict=True):
            assert torch.equal(here, there)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_the_frozen_wake_in_turns_and_the_retired_stay_out(arch: str) -> None:
    """Under a controller, which never sees an infinite bias nor moves that of the frozen."""
    model = build(arch).train()
    randomise_routing(model)
    batch = inputs_for(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    layer = next(site.layer for site in discover(model))
    term = Lifecycle(freeze={layer: [0]}, retire={layer: [5]}, asleep=3, awake=2, patience=10_000)
    with attach(model, term, Bias(Sign(rate=1e-3)), optimizer=optimizer) as handle:
        out = []
        for _ in range(10):
            model(**batch)
            handle.step()
            counts, bias = handle.counts()[0], handle.bias()[0]
            out.append(bool(counts[0] == 0))
            assert counts[5] == 0
            assert bool(bias[5].isneginf())
            assert counts.sum() == int(batch["attention_mask"].sum()) * handle.sites[0].top_k
        assert out == [True, True, True, False, False] * 2
        whats = [(e.step, e.expert, e.what) for e in handle.events]
        assert whats[:3] == [(0, 5, "retired"), (0, 0, "frozen"), (2, 0, "woken")]
        assert whats[3:] == [(4, 0, "frozen"), (7, 0, "woken"), (9, 0, "frozen")]
        assert (handle.metrics()["balance/frozen"], handle.metrics()["balance/retired"]) == (1, 1)
        owned = handle.biases[0].own
    if owned:
        with attach(model, term) as again:
            assert torch.isfinite(again.bias()[0]).sum() == 6


def test_the_frozen_keep_their_place_on_detach(model: Any) -> None:
    batch = inputs()
    model.eval()
    free = model(**batch).logits
    with attach(model, Lifecycle(freeze={0: [1]})):
        assert not torch.equal(model(**batch).logits, free)
    assert torch.equal(model(**batch).logits, free)


def test_a_dead_expert_is_frozen_until_it_is_selected_and_retired_after_attempts(
    model: Any,
) -> None:
    kill(model)
    term = Lifecycle(dead="freeze", patience=2, asleep=2, awake=2, attempts=2)
    with attach(model, term) as handle:
        for _ in range(12):
            model(**inputs())
            handle.step()
        whats = [(e.step, e.what) for e in handle.events if e.expert == DEAD and e.layer == LAYER]
    assert whats == [(1, "frozen"), (3, "woken"), (5, "frozen"), (7, "woken"), (9, "retired")]


def test_below_a_share_counts_as_dead_too(model: Any) -> None:
    with attach(model, Lifecycle(dead="retire", patience=1, below=0.99)) as handle:
        model(**inputs())
        handle.step()
        for layer, counts in enumerate(handle.counts()):
            fair = counts.sum() / 8
            low = (counts < 0.99 * fair).nonzero()[:, 0].tolist()
            gone = [e.expert for e in handle.events if e.layer == layer]
            assert gone == low[:6]
            assert gone


def test_a_revived_experts_bias_is_the_mean_of_the_others(model: Any) -> None:
    kill(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, Lifecycle(patience=2), Bias(Sign(rate=1e-4)), optimizer=optimizer) as handle:
        train(model, optimizer, 2)
        bias = handle.bias()[LAYER]
    others = [e for e in range(8) if e != DEAD]
    assert float(bias[DEAD]) == pytest.approx(float(bias[others].mean()), abs=1e-9)


@pytest.mark.parametrize(
    "arch", ["dbrx", "gpt_oss", "longcat_flash", "zaya", "muse_spark", "gemma4"]
)
def test_every_parameter_of_an_expert_is_found(arch: str) -> None:
    """What is found of all experts makes up the whole of the stacked parameters."""
    model = build(arch)
    site = next(s for s in discover(model) if s.score_function != "hash")
    rows = expert_rows(site)
    stacked = {n: p for n, p in site.module.named_parameters() if not n.endswith("norm.weight")}
    found = {id(several[0].parameter): several for several in rows}
    for parameter in stacked.values():
        several = found[id(parameter)]
        own = torch.cat([row.of(parameter) for row in several])
        assert torch.equal(own, parameter[: len(own)])
        assert len(parameter) - len(own) in (0, site.null_experts)
    assert len(rows) == len(stacked)
    assert all(len(several) == site.num_experts for several in rows)


def loaded(model: Any, counts: list[int], course: Any) -> None:
    """A step of every layer's life in which its experts had these loads."""
    course.before()
    course.after([torch.tensor(counts)] * len(course.layers), course._step + 1)


def test_the_reserve_is_woken_one_by_one_exactly_when_the_awake_are_out_of_balance(
    model: Any,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    term = Lifecycle(dead="keep", reserve=0.5, demand=1.0, window=3, noise=0.0)
    with attach(model, term, optimizer=optimizer) as handle:
        course = handle.courses
        assert course is not None
        train(model, optimizer, 1)
        assert all((counts[4:] == 0).all() and counts[:4].all() for counts in handle.counts())
        skewed, even = [9, 1, 1, 1, 0, 0, 0, 0], [8, 4, 2, 2, 0, 0, 0, 0]  # MaxVio 2, and just 1
        for counts in (even, skewed, skewed, even, skewed, skewed):
            loaded(model, counts, course)
        assert {event.what for event in handle.events} == {"reserved"}
        loaded(model, skewed, course)  # the third in a row
        woken = [(e.layer, e.expert, e.donor) for e in handle.events if e.what == "woken"]
        assert woken == [(0, 4, 0), (1, 4, 0)]
        for name, tensor in parts(model, 0).items():
            assert torch.equal(tensor[4], tensor[0]), name
            assert not torch.equal(tensor[5], tensor[0]), name
        for _ in range(2):
            loaded(model, skewed, course)
        assert handle.metrics()["balance/reserve"] == 6
        loaded(model, skewed, course)
        assert handle.metrics()["balance/reserve"] == 4
        train(model, optimizer, 1)
        for counts in handle.counts():
            assert counts[4] > 0
            assert (counts[6:] == 0).all()
        for _ in range(20):
            loaded(model, skewed, course)
        assert handle.metrics()["balance/reserve"] == 0
        assert [e.expert for e in handle.events if e.what == "woken" and e.layer == 0] == [
            4,
            5,
            6,
            7,
        ]


def test_a_run_with_a_reserve_resumes_where_it_was(model: Any) -> None:
    term = Lifecycle(reserve=3, demand=0.1, window=2, noise=0.1, patience=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, term, optimizer=optimizer)
    train(model, optimizer, 3)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    train(model, optimizer, 4)
    wanted, events = copy.deepcopy(model.state_dict()), list(handle.events)
    assert len([e for e in events if e.what == "woken" and e.step > 2]) > 1
    handle.detach()
    model.load_state_dict(saved[0])
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fresh.load_state_dict(saved[1])
    with attach(model, term, optimizer=fresh) as resumed:
        resumed.load_state_dict(saved[2])
        train(model, fresh, 4)
        assert resumed.events == events
        assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())


def test_an_expert_woken_as_it_is_keeps_its_weights_and_needs_no_optimizer(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    term = Lifecycle(dead="keep", reserve=2, demand=0.0, window=1, woken="own")
    with attach(model, term) as handle:
        model(**inputs())
        handle.step()
        assert [(e.expert, e.donor) for e in handle.events if e.what == "woken"] == [(6, None)] * 2
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_cannot_be_done_is_refused(model: Any) -> None:
    with pytest.raises(EquipoiseError, match="at least one step"):
        Lifecycle(patience=0)
    with pytest.raises(EquipoiseError, match="dead='kill'"):
        Lifecycle(dead="kill")  # type: ignore[arg-type]
    with pytest.raises(EquipoiseError, match="no MoE layer 7"):
        attach(model, Lifecycle(freeze={7: [0]}))
    with pytest.raises(EquipoiseError, match="7 of them cannot be out"):
        attach(model, Lifecycle(retire={0: list(range(7))}))
    with pytest.raises(EquipoiseError, match=r"reserve=1\.5 has to be a whole number"):
        Lifecycle(reserve=1.5)
    with pytest.raises(EquipoiseError, match="7 of them cannot be out"):
        attach(model, Lifecycle(reserve=7))
    with pytest.raises(EquipoiseError, match=r"reserve=0\.1 of the 8 experts of .* less than one"):
        attach(model, Lifecycle(reserve=0.1))
    with pytest.raises(EquipoiseError, match="Quantile sets the bias"):
        attach(model, Lifecycle(dead="freeze"), Bias(Quantile()))
    kill(model)
    with attach(model, Lifecycle(patience=1)) as handle:
        model(**inputs())
        with pytest.raises(EquipoiseError, match="no optimizer is known"):
            handle.step()
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    with pytest.raises(EquipoiseError, match="does not train"):
        attach(model, Lifecycle())


def test_sharded_weights_are_refused_for_revival_only(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(EquipoiseError, match="sharded"):
            attach(model, Lifecycle())
        with attach(model, Lifecycle(dead="freeze", freeze={0: [1]})) as handle:
            model(**inputs())
            handle.step()
            assert handle.counts()[0][1] == 0
    finally:
        dist.destroy_process_group()


def test_the_adversary_learns_and_its_gradient_is_reversed(model: Any) -> None:
    """The discriminator's loss falls while the router stands still; the router's gradient raises it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    term = Adversarial(weight=1.0, below=0.9, rate=1e-2)
    with attach(model, term, optimizer=optimizer) as handle:
        course = []
        for _ in range(60):
            train(model, optimizer)
            course.append(handle.metrics()["balance/adversarial"])
        assert course[-1] < course[0] - 0.05
        layer, gate = handle.layers[0], model.model.layers[0].mlp.gate.weight
        model.zero_grad()
        (model(**inputs()).loss * 0).backward()
        gradient = gate.grad.clone()
        assert gradient.any()
        handle.discard()
        values = []
        part = layer.adversary
        assert part is not None
        for sign in (-1.0, 1.0):
            with torch.no_grad():
                gate += sign * 1e-2 * gradient / gradient.norm()
            part._values.clear()
            (model(**inputs()).loss * 0).backward()
            values.append(float(part._values[-1]))
            with torch.no_grad():
                gate -= sign * 1e-2 * gradient / gradient.norm()
            handle.discard()
        assert values[0] > values[1]


def test_the_adversary_learns_nothing_from_a_discarded_step(model: Any) -> None:
    def learned(*discarded: int) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with attach(model, Adversarial(weight=0.1, below=0.9), optimizer=optimizer) as handle:
            for step in range(3):
                if step in discarded:
                    model(**inputs()).loss.backward()
                    handle.discard()
                    optimizer.zero_grad()
                train(model, optimizer)
            part = handle.layers[0].adversary
            assert part is not None
            return [p.detach().clone() for p in part.nets.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(learned(), learned(0, 2), strict=True))


def test_the_adversary_resumes(model: Any) -> None:
    terms = (Adversarial(weight=0.1, below=0.9), Loss("switch", weight=1e-2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, *terms, optimizer=optimizer)
    train(model, optimizer, 2)
    saved = copy.deepcopy([model.state_dict(), handle.state_dict()])
    train(model, optimizer, 3)
    wanted = copy.deepcopy(model.state_dict())
    handle.detach()
    model.load_state_dict(saved[0])
    with attach(model, *terms, optimizer=optimizer) as resumed:
        resumed.load_state_dict(saved[1])
        train(model, optimizer, 3)
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
    with pytest.raises(EquipoiseError, match="parts"), attach(model, terms[1]) as other:
        other.load_state_dict(saved[1])
