"""The layer: its parts put together, found by `discover`, the same over two processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from equipoise.models import discover
from equipoise.nn.experts import Experts
from equipoise.nn.free import FreeExperts
from equipoise.nn.layer import MoELayer
from equipoise.nn.limiter import Capacity
from equipoise.nn.routers import TopKRouter
from equipoise.routing import NO_EXPERT
from tests.torchrun import torchrun


def layer(seed=0, **options):
    torch.manual_seed(seed)
    made = MoELayer(8, 12, 6, 2, **options)
    made.gate.weight.data.normal_()
    return made


def states(*shape, seed=1):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": MoELayer(8, 12, 6, 2, **options)}) for _ in range(3)
        )

    def forward(self, hidden):
        for block in self.layers:
            hidden = hidden + block["mlp"](hidden)
        return hidden


def test_the_layer_is_router_experts_and_shared_experts() -> None:
    made, hidden = layer(shared_experts=2), states(3, 5)
    _, weights, ids = made.gate(hidden.view(15, 8))
    wanted = made.experts(hidden.view(15, 8), ids, weights) + made.shared_experts(
        hidden.view(15, 8)
    )
    torch.testing.assert_close(made(hidden), wanted.view(3, 5, 8))
    one = Experts(1, 8, 24)
    one.load_state_dict(
        {
            "gate_up_proj": made.shared_experts.inner_proj.weight[None],
            "down_proj": made.shared_experts.down_proj.weight[None],
        }
    )
    alone = one(hidden.view(15, 8), torch.zeros(15, 1, dtype=torch.int64), torch.ones(15, 1))
    torch.testing.assert_close(made.shared_experts(hidden.view(15, 8)), alone)


@pytest.mark.parametrize("shape", [(3, 5), (15,), (0, 5), (2, 3, 4)])
def test_any_leading_shape_comes_back(shape: tuple[int, ...]) -> None:
    assert layer(shared_experts=1, capacity=1.0)(states(*shape)).shape == (*shape, 8)


def test_discover_finds_the_layer_without_a_config() -> None:
    model = Model(shared_experts=1)
    sites = discover(model)
    assert [site.path for site in sites] == [f"layers.{i}.mlp" for i in range(3)]
    for number, site in enumerate(sites):
        assert (site.layer, site.num_experts, site.top_k) == (number, 6, 2)
        assert (site.score_function, site.shared_experts) == ("softmax", 1)
        assert not site.selection_bias
    biased = Model(router=TopKRouter(8, 6, 2, score_function="sigmoid", selection_bias=True))
    assert all(site.selection_bias for site in discover(biased))


def test_what_is_heard_is_what_the_experts_computed() -> None:
    """Under a capacity the ids are those kept, and the scores are the router's."""
    model, seen = Model(capacity=0.5), []
    for site in discover(model):
        site.observe(seen.append)
    hidden = states(2, 9)
    model(hidden)
    assert len(seen) == 3
    scores, _, ids = model.layers[0]["mlp"].gate(hidden.view(18, 8))
    torch.testing.assert_close(seen[0].scores_TE, scores)
    kept = seen[0].expert_ids_TK
    dropped = kept == NO_EXPERT
    assert torch.equal(kept[~dropped], ids[~dropped])
    share = model.layers[0]["mlp"].dropped_share
    assert share == pytest.approx(dropped.float().mean().item())
    assert share > 0


def test_a_dropped_token_is_left_to_the_residual() -> None:
    made = layer(capacity=Capacity(1.0))
    hidden = states(1).expand(6, 8)
    out = made(hidden)
    assert (out[:2] != 0).any(dim=1).all()
    assert (out[2:] == 0).all()
    assert made.dropped_share == pytest.approx(4 / 6)
    assert layer()(hidden)[5].abs().sum() > 0


def test_padded_buffers_equal_dropping() -> None:
    hidden, outputs = states(4, 7), []
    for overflow in ("drop", "pad"):
        made = layer(capacity=Capacity(0.7, overflow=overflow))
        out = made(hidden)
        out.square().sum().backward()
        outputs.append([out, *(p.grad for p in made.parameters()), made.dropped_share])
    assert outputs[0][-1] > 0
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_does_not_displace_tokens() -> None:
    made, hidden = layer(capacity=1.0), states(2, 6)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0] = False
    torch.testing.assert_close(made(hidden, valid)[1], made(hidden[1]))
    assert not torch.allclose(made(hidden)[1], made(hidden[1]))
    everything_padding = made(hidden, torch.zeros_like(valid))
    assert (everything_padding == 0).all()
    padded = layer(capacity=Capacity(1.0, overflow="pad"))
    assert (padded(hidden, torch.zeros_like(valid)) == 0).all()


def test_rerouting_drops_less() -> None:
    hidden = states(4, 7)
    dropping, rerouting = (layer(capacity=Capacity(1.0, overflow=o)) for o in ("drop", "reroute"))
    dropping(hidden)
    rerouting(hidden).square().sum().backward()
    assert rerouting.dropped_share < dropping.dropped_share
    assert rerouting.gate.weight.grad.isfinite().all()


def test_recomputation_drops_the_same_and_counts_once() -> None:
    hidden = states(30).requires_grad_()
    gradients = []
    for again in (False, True):
        made = layer(capacity=Capacity(1.0, recent=0.5))
        for step in range(3):
            out = checkpoint(made, hidden, use_reentrant=False) if again else made(hidden)
            out.square().sum().backward()
            counted = made.limiter.counts_E.sum()
            assert counted == 60, step
            made.step()
        made.eval()(hidden)
        assert made.limiter.counts_E is None
        gradients.append([p.grad for p in made.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_free_experts_stand_beside_computing_ones() -> None:
    experts = FreeExperts(Experts(6, 8, 12), 8, zero=1, copy=1)
    router = TopKRouter(8, 6, 3, null_experts=2)
    made = MoELayer(8, 12, 6, 3, router=router, experts=experts, capacity=0.5)
    router.weight.data.normal_()
    hidden = states(20)
    seen = []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    made(hidden).sum().backward()
    _, _, ids = router(hidden)
    assert torch.equal(seen[0] >= 6, ids >= 6)
    assert (ids >= 6).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_come_through(dtype: torch.dtype) -> None:
    made, hidden = layer(shared_experts=1, capacity=Capacity(1.0, overflow="reroute")), states(9)
    out = made.to(dtype)(hidden.to(dtype))
    assert out.dtype == dtype
    out.square().sum().backward()
    assert all(p.grad.dtype == dtype for p in made.parameters())


def test_the_dropless_layer_compiles_without_a_break() -> None:
    made, hidden = layer(shared_experts=1), states(3, 5)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), made(hidden))


def test_parts_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="top_k=2, but the router has 3"):
        layer(router=TopKRouter(8, 6, 3))
    with pytest.raises(ValueError, match="overflow='pad' is there for Experts"):
        layer(experts=FreeExperts(Experts(6, 8, 12), 8, zero=1), capacity=Capacity(overflow="pad"))


CASES = {
    "every expert": {},
    "rank 1 without tokens": {"tokens": (7, 0)},
    "no token for rank 1": {"only": range(3)},
    "no token for rank 0": {"only": range(3, 6)},
    "one expert": {"only": [4]},
    "slots without expert": {"empty": 0.5},
    "no expert at all": {"empty": 1.0},
    "shapes of odd size": {"width": 7},
    "bfloat16": {"dtype": torch.bfloat16},
}

WORKER = """
import sys, torch, torch.distributed as dist
from equipoise.models import discover
from equipoise.nn.experts import Experts
from equipoise.nn.layer import MoELayer
from equipoise.nn.limiter import Capacity
from equipoise.nn.parallel import ParallelExperts
from tests.nn.test_layer import CASES, parallel_problem
from tests.torchrun import leave
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, group = dist.get_rank(), dist.group.WORLD
found = {}
for name, case in CASES.items():
    whole, inputs, probe = parallel_problem(**case)
    split = case.get("tokens", (7, 4))
    mine = slice(rank * split[0], split[0] + rank * split[1])
    shared = ParallelExperts(6, whole.hidden_size, 8, process_group=group).to(whole.down_proj.dtype)
    with torch.no_grad():
        for held, all_of_them in zip(shared.parameters(), whole.parameters()):
            held.copy_(all_of_them[shared.held.start : shared.held.stop])
    hidden, ids, weights = (x[mine].clone() for x in inputs)
    hidden.requires_grad_(); weights.requires_grad_()
    out = shared(hidden, ids, weights)
    out.backward(probe[mine])
    found[name] = [out.detach(), hidden.grad, weights.grad, *(p.grad for p in shared.parameters())]
errors = []
for make in (lambda: ParallelExperts(5, 8, 8, process_group=group),
             lambda: MoELayer(8, 8, 6, 2, process_group=group, capacity=Capacity(overflow="pad"))):
    try:
        make()
    except ValueError as error:
        errors.append(str(error))
layer = MoELayer(8, 8, 6, 2, process_group=group, shared_experts=1, capacity=Capacity(recent=0.5))
torch.manual_seed(rank)
ids = []
layer.gate.register_forward_hook(lambda m, a, out: ids.append(out[2]))
layer(torch.randn(4, 8)).sum().backward()
layer.step(group)
site = discover(torch.nn.ModuleDict({"mlp": layer}))[0]
torch.manual_seed(3)
drawn = ParallelExperts(6, 7, 8, process_group=group)
found["drawn"] = [torch.rand(4), *(p.detach() for p in drawn.parameters())]
found["layer"] = (errors, layer.limiter.share_E, ids[0], (site.num_experts, site.top_k))
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
leave()
"""


def parallel_problem(tokens=(7, 4), only=range(6), empty=0.0, width=8, dtype=torch.float32):
    """Experts, inputs of all ranks together, and a gradient for the output."""
    torch.manual_seed(0)
    whole = Experts(6, width, 8).to(dtype)
    total, only = sum(tokens), torch.tensor(list(only))
    k = min(2, len(only))
    ids = only[torch.rand(total, len(only)).argsort(dim=1)[:, :k]]
    gone = torch.rand(total, k) < empty
    weights = torch.rand(total, k).masked_fill(gone, 0.0).to(dtype)
    inputs = (torch.randn(total, width).to(dtype), ids.masked_fill(gone, NO_EXPERT), weights)
    return whole, inputs, torch.randn(total, width).to(dtype)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER)
    torchrun(script, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(ranks: list[dict[str, list[torch.Tensor]]], name: str) -> None:
    whole, (hidden, ids, weights), probe = parallel_problem(**CASES[name])
    hidden.requires_grad_()
    weights.requires_grad_()
    out = whole(hidden, ids, weights)
    out.backward(probe)
    wanted = [out.detach(), hidden.grad, weights.grad, *(p.grad for p in whole.parameters())]
    for parts in zip(wanted, *(rank[name] for rank in ranks), strict=True):
        torch.testing.assert_close(torch.cat(parts[1:]), parts[0])


@pytest.mark.distributed
def test_a_layer_over_two_processes(ranks: list[dict[str, list[torch.Tensor]]]) -> None:
    ids = torch.cat([rank["layer"][2] for rank in ranks]).flatten()
    for rank in ranks:
        errors, share, _, found = rank["layer"]
        assert "num_experts=5 over a group of 2 processes" in errors[0]
        assert "not for ParallelExperts" in errors[1]
        assert found == (6, 2)
        torch.testing.assert_close(share, torch.bincount(ids, minlength=6) / 16)


@pytest.mark.distributed
def test_one_seed_draws_each_process_its_share_of_the_experts(
    ranks: list[dict[str, list[torch.Tensor]]],
) -> None:
    torch.manual_seed(3)
    whole = Experts(6, 7, 8)
    next_numbers = torch.rand(4)
    for rank in ranks:
        assert torch.equal(rank["drawn"][0], next_numbers)
    for wanted, *parts in zip(
        whole.parameters(), *(rank["drawn"][1:] for rank in ranks), strict=True
    ):
        assert torch.equal(torch.cat(parts), wanted)
