"""Other frameworks' balancing losses, each as it is, and what their weight is worth in ours.

Each reference below is the framework's formula written down anew, faults included, but for
transformers, whose own function is called. `logits_LTE` are stacked over layers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.balance import objectives as o
from equipoise.balance.conventions import CONVENTIONS, convert
from equipoise.errors import EquipoiseError

L, T, E = 3, 24, 8
SEQUENCES = 4
ALPHA = 0.03
F64 = torch.float64
Reference = Callable[[Tensor, int], Tensor]


def routers(seed: int = 0, layers: int = L) -> Tensor:
    """Logits with a tilt of its own in each layer, so that loads are uneven and differ."""
    draw = torch.Generator().manual_seed(seed)
    tilt = torch.randn(layers, 1, E, generator=draw, dtype=F64)
    return tilt + torch.randn(layers, T, E, generator=draw, dtype=F64)


def chosen(logits_TE: Tensor, top_k: int) -> Tensor:
    """One-hot sum of the selected experts of each token, [..., T, E], in order of score."""
    ids = logits_TE.topk(top_k, -1).indices
    return F.one_hot(ids, E).sum(-2).to(F64)


def by_layer(term: Reference) -> Reference:
    """Layers added up, as where each layer's term is attached or returned by itself."""
    return lambda logits_LTE, top_k: sum(
        (term(logits_TE, top_k) for logits_TE in logits_LTE), torch.zeros((), dtype=F64)
    )


def by_sequence(logits_TE: Tensor) -> Tensor:
    return logits_TE.unflatten(0, (SEQUENCES, T // SEQUENCES))


# --- the formulas, as they are ---


def transformers(logits_LTE: Tensor, top_k: int) -> Tensor:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    loss: Tensor = modeling.load_balancing_loss_func(tuple(logits_LTE), E, top_k)
    return loss


def megatron(logits_TE: Tensor, top_k: int) -> Tensor:
    scores, counts_E = logits_TE.softmax(-1), chosen(logits_TE, top_k).sum(0)
    return E / (top_k * T**2) * (counts_E * scores.sum(0)).sum()


def megatron_sequences(logits_TE: Tensor, top_k: int) -> Tensor:
    """The same on [tokens of a sequence, sequences x E], over the number of sequences."""
    length = T // SEQUENCES
    scores = by_sequence(logits_TE.softmax(-1)).transpose(0, 1).reshape(length, -1)
    counts = by_sequence(chosen(logits_TE, top_k)).transpose(0, 1).reshape(length, -1).sum(0)
    return E / (top_k * length**2) * (counts * scores.sum(0)).sum() / SEQUENCES


def deepspeed(logits_TE: Tensor, top_k: int) -> Tensor:
    gates = logits_TE.softmax(-1)
    if top_k <= 2:  # top1gating and top2gating: the mask of the first choice
        me, ce = gates.mean(0), chosen(logits_TE, 1).mean(0)
        return (me * ce).sum() * E if top_k == 1 else (me * ce).mean() * E * E
    me, ce = gates.mean(0), chosen(logits_TE, top_k).mean(0)
    return (me * ce).mean() * E * E / top_k


def tutel(logits_TE: Tensor, top_k: int) -> Tensor:
    first = chosen(logits_TE, 1).sum(0)
    return E / T**2 * (logits_TE.softmax(-1).sum(0) * first).sum()


def megablocks(logits_LTE: Tensor, top_k: int) -> Tensor:
    counts = torch.cat([chosen(logits_TE, top_k).sum(0) for logits_TE in logits_LTE])
    scores = torch.cat([logits_TE.softmax(-1).mean(0) for logits_TE in logits_LTE])
    return E / (len(logits_LTE) * T * top_k) * counts.dot(scores)


def olmo(logits_TE: Tensor, top_k: int, tokens: int = T) -> Tensor:
    counts = chosen(logits_TE, top_k).sum(0)
    return E / top_k * counts.dot(logits_TE.softmax(-1).mean(0)) / tokens


def nemo(logits_TE: Tensor, top_k: int) -> Tensor:
    f = chosen(logits_TE, top_k).sum(0) * E / (top_k * T)
    return (f * logits_TE.softmax(-1).mean(0)).sum()


def xtuner(logits_LTE: Tensor, top_k: int) -> Tensor:
    counts_LE, prob_LE = chosen(logits_LTE, top_k).sum(1), logits_LTE.softmax(-1).mean(1)
    return (E / (top_k * T) * counts_LE * prob_LE).sum()


def deepseek_v2(logits_TE: Tensor, top_k: int) -> Tensor:
    counts_SE = by_sequence(chosen(logits_TE, top_k)).sum(1)
    ce = counts_SE / (T // SEQUENCES * top_k / E)
    return (ce * by_sequence(logits_TE.softmax(-1)).mean(1)).sum(1).mean()


def fastmoe_switch(logits_TE: Tensor, top_k: int, capacity: int = T) -> Tensor:
    first = chosen(logits_TE, 1)
    kept = first * (first.cumsum(0) <= capacity)
    survivors = kept.sum()
    return E * (kept.sum(0) / survivors * (logits_TE.softmax(-1).sum(0) / survivors)).sum()


def fastmoe_gshard(world_size: int) -> Reference:
    def term(logits_TE: Tensor, top_k: int) -> Tensor:
        c, m = chosen(logits_TE, 1).sum(0) / T, logits_TE.softmax(-1).mean(0)
        return (c * m).mean() * (E // world_size) ** 2

    return term


def maxtext(logits_LTE: Tensor, top_k: int) -> Tensor:
    terms = []
    for logits_TE in logits_LTE:
        density = by_sequence(chosen(logits_TE, top_k)).mean(1)
        terms.append((density * by_sequence(logits_TE.softmax(-1)).mean(1)).mean() * E**2)
    return torch.stack(terms).mean()


def st_moe(logits_TE: Tensor, top_k: int) -> Tensor:
    density = by_sequence(chosen(logits_TE, 1)).mean(1)
    return (density * by_sequence(logits_TE.softmax(-1)).mean(1)).mean() * E**2


def sonic_moe(logits_TE: Tensor, top_k: int) -> Tensor:
    prob, counts = logits_TE.softmax(-1).sum(0), chosen(logits_TE, top_k).sum(0)
    return E * (F.normalize(prob, p=1, dim=0) * F.normalize(counts, p=1, dim=0)).sum()


# --- ours ---


def ours(logits_LTE: Tensor, top_k: int, sequences: bool = False) -> Tensor:
    """The mean over layers of switch over all tokens, or of each sequence."""
    terms = []
    for logits_TE in logits_LTE:
        rows = by_sequence(logits_TE) if sequences else logits_TE
        load = o.load(expert_ids_TK=rows.topk(top_k, -1).indices, num_experts=E)
        prob = o.mean_prob(probs_TE=o.probabilities(scores_TE=rows, function="softmax"))
        terms.append(o.switch(load_E=load, prob_E=prob).mean())
    return torch.stack(terms).mean()


def gradient(loss: Callable[[Tensor], Tensor], logits_LTE: Tensor) -> Tensor:
    logits_LTE = logits_LTE.clone().requires_grad_()
    return torch.autograd.grad(loss(logits_LTE), logits_LTE)[0]


def uniform(top_k: int, layers: int = L) -> Tensor:
    """All but equal logits; token t selects the top_k experts from t on, so loads are equal."""
    tokens = torch.arange(T).repeat_interleave(top_k)
    experts = (torch.arange(top_k).repeat(T) + tokens) % E
    logits = torch.zeros(T, E, dtype=F64)
    logits[tokens, experts] = 1e-6 * (top_k - torch.arange(top_k).repeat(T)).to(F64)
    return logits.expand(layers, T, E)


# name, reference over all layers, top_k, whether f is of each sequence, other arguments, value at
# perfect balance for these three layers
CASES = [
    ("megatron", by_layer(megatron), 1, False, {}, L),
    ("megatron", by_layer(megatron), 2, False, {}, L),
    ("megatron", by_layer(megatron_sequences), 2, True, {}, L),
    ("deepspeed", by_layer(deepspeed), 1, False, {}, L),
    ("deepspeed", by_layer(deepspeed), 3, False, {}, L),
    ("tutel", by_layer(tutel), 1, False, {}, L),
    ("megablocks", megablocks, 2, False, {}, 1),
    ("olmo", by_layer(olmo), 2, False, {"layers": "sum"}, L),
    ("olmo", lambda x, k: by_layer(olmo)(x, k) / L, 2, False, {}, 1),
    ("nemo", by_layer(nemo), 2, False, {}, L),
    ("xtuner", xtuner, 2, False, {}, L),
    ("deepseek_v2", by_layer(deepseek_v2), 2, True, {}, L),
    ("fastmoe_switch", by_layer(fastmoe_switch), 1, False, {}, L),
    ("fastmoe_gshard", by_layer(fastmoe_gshard(4)), 1, False, {"world_size": 4}, L / 16),
    ("maxtext", maxtext, 2, True, {}, 2),
    ("st_moe", by_layer(st_moe), 1, True, {}, L),
    ("sonic_moe", by_layer(sonic_moe), 2, False, {}, L),
]


@pytest.mark.parametrize(
    ("name", "theirs", "top_k", "sequences", "extra", "ideal"),
    CASES,
    ids=[f"{c[0]}-top{c[2]}{'-sequences' if c[3] else ''}" for c in CASES],
)
class TestFactor:
    def test_converted_weight_gives_the_same_router_gradient(
        self, name, theirs, top_k, sequences, extra, ideal
    ):
        logits = routers()
        weight = convert(ALPHA, name, top_k=top_k, num_layers=L, **extra)
        expected = gradient(lambda x: ALPHA * theirs(x, top_k), logits)
        got = gradient(lambda x: weight * ours(x, top_k, sequences), logits)
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-10)

    def test_value_at_perfect_balance_is_as_stated(
        self, name, theirs, top_k, sequences, extra, ideal
    ):
        assert theirs(uniform(top_k), top_k).item() == pytest.approx(ideal, rel=1e-5)
        factor = convert(1, name, top_k=top_k, num_layers=L, **extra)
        assert ours(uniform(top_k), top_k).item() * factor == pytest.approx(ideal, rel=1e-5)

    def test_there_and_back(self, name, theirs, top_k, sequences, extra, ideal):
        numbers = {"top_k": top_k, "num_layers": L, **extra}
        weight = convert(ALPHA, name, **numbers)
        assert convert(weight, name, back=True, **numbers) == pytest.approx(ALPHA)


# --- transformers ---


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_transformers_is_top_k_at_perfect_balance_and_ours_is_one(top_k):
    assert transformers(uniform(top_k), top_k).item() == pytest.approx(top_k, rel=1e-5)
    assert ours(uniform(top_k), top_k).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_transformers_weight_times_top_k_is_ours_for_one_layer(top_k):
    logits = routers(layers=1)
    weight = convert(ALPHA, "transformers", top_k=top_k, num_layers=1)
    assert weight == pytest.approx(top_k * ALPHA)
    expected = gradient(lambda x: ALPHA * transformers(x, top_k), logits)
    got = gradient(lambda x: weight * ours(x, top_k), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_transformers_weight_is_exact_for_layers_of_the_same_load_only():
    def apart(logits: Tensor) -> float:
        weight = convert(ALPHA, "transformers", top_k=2, num_layers=L)
        expected = gradient(lambda x: ALPHA * transformers(x, 2), logits)
        got = gradient(lambda x: weight * ours(x, 2), logits)
        return ((got - expected).norm() / expected.norm()).item()

    assert apart(routers(layers=1).expand(L, T, E)) < 1e-5
    assert apart(routers()) > 0.1


def test_layers_collapsed_on_different_experts_are_perfect_to_transformers_and_worst_to_ours():
    logits = torch.zeros(E, T, E, dtype=F64)
    for layer in range(E):
        logits[layer, :, layer] = 50.0
    assert transformers(logits, 1).item() == pytest.approx(1, rel=1e-6)
    assert ours(logits, 1).item() == pytest.approx(E, rel=1e-6)


# --- what depends on ranks, on drops, on the first choice ---


def test_megatron_global_is_too_small_by_the_number_of_ranks():
    """Counts summed over ranks, P over the group's tokens, then gradients averaged over ranks."""
    ranks, top_k = 2, 2
    logits_RTE = routers(layers=ranks)  # one layer, two ranks
    counts_E = chosen(logits_RTE, top_k).sum((0, 1))

    def theirs(x: Tensor) -> Tensor:
        tokens = ranks * T
        terms = [E / (top_k * tokens**2) * (counts_E * rank.softmax(-1).sum(0)).sum() for rank in x]
        return ALPHA * torch.stack(terms).mean()

    weight = convert(ALPHA, "megatron_global", top_k=top_k, num_layers=1, world_size=ranks)

    def ours_global(x: Tensor) -> Tensor:
        load = o.share(counts_E=counts_E)
        prob_RE = o.mean_prob(probs_TE=x.softmax(-1))
        return weight * o.switch(load_E=load, prob_E=prob_RE).mean()

    torch.testing.assert_close(gradient(ours_global, logits_RTE), gradient(theirs, logits_RTE))
    assert weight == pytest.approx(ALPHA / ranks)


def test_olmo_micro_batches_add_up_to_their_mean():
    logits = routers(layers=2)  # two micro-batches of one layer
    expected = gradient(lambda x: sum(olmo(part, 2, tokens=2 * T) for part in x), logits)
    got = gradient(lambda x: ours(x, 2), logits)  # here the mean is over micro-batches
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-10)


def test_fastmoe_switch_with_drops_is_stronger_by_one_over_the_kept_share():
    logits, capacity = routers(layers=1), 4
    first = chosen(logits[0], 1)
    kept_TE = first * (first.cumsum(0) <= capacity)
    kept_share = kept_TE.sum().item() / T
    weight = convert(ALPHA, "fastmoe_switch", top_k=1, num_layers=1)

    def ours_kept(x: Tensor) -> Tensor:
        load = o.share(counts_E=kept_TE.sum(0))
        return weight * o.switch(load_E=load, prob_E=o.mean_prob(probs_TE=x[0].softmax(-1)))

    expected = gradient(lambda x: ALPHA * fastmoe_switch(x[0], 1, capacity), logits)
    assert kept_share < 0.9
    torch.testing.assert_close(gradient(ours_kept, logits) / kept_share, expected)


FIRST_CHOICE = [
    ("deepspeed", deepspeed, {}, False),
    ("tutel", tutel, {}, False),
    ("fastmoe_gshard", fastmoe_gshard(4), {"world_size": 4}, False),
    ("st_moe", st_moe, {}, True),
]


@pytest.mark.parametrize(("name", "theirs", "extra", "sequences"), FIRST_CHOICE)
def test_first_choice_counts_convert_only_to_loads_of_first_choices(name, theirs, extra, sequences):
    numbers = {"top_k": 2, "num_layers": L, **extra}
    with pytest.raises(EquipoiseError, match="only the first of 2 choices"):
        convert(ALPHA, name, **numbers)
    weight = convert(ALPHA, name, first_choice=True, **numbers)
    expected = gradient(lambda x: ALPHA * by_layer(theirs)(x, 2), routers())
    got = gradient(lambda x: weight * ours(x, 1, sequences), routers())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(("name", "theirs", "extra", "sequences"), FIRST_CHOICE)
def test_no_factor_would_do_for_a_first_choice_count(name, theirs, extra, sequences):
    expected = gradient(lambda x: by_layer(theirs)(x, 2), routers()).flatten()
    got = gradient(lambda x: ours(x, 2, sequences), routers()).flatten()
    best = got.dot(expected) / got.dot(got)
    assert (best * got - expected).norm() > 0.1 * expected.norm()


def test_tutel_load_and_importance_are_half_of_each_with_the_sample_variance():
    logits = routers(layers=1)[0]
    load_E = chosen(logits, 2).sum(0)

    def theirs(x: Tensor) -> Tensor:
        total = 0.0
        for values in (x.softmax(-1).sum(0), load_E + 5 * x.sigmoid().sum(0)):
            total = total + values.var() / values.mean() ** 2
        return ALPHA * total / 2

    weight = convert(ALPHA, "tutel_load_importance", top_k=2, num_layers=1, num_experts=E)

    def both(x: Tensor) -> Tensor:
        prob, smooth = o.mean_prob(probs_TE=x.softmax(-1)), load_E + 5 * x.sigmoid().sum(0)
        importance = o.importance(load_E=prob, prob_E=prob)
        return weight * (importance + o.load_cv(load_E=smooth))

    torch.testing.assert_close(gradient(both, logits), gradient(theirs, logits))


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"convention": "transformer"}, "Did you mean 'transformers'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"layers": "max"}, "layers is 'max'"),
        ({"convention": "megatron_global"}, "world_size is None.*data-parallel"),
        ({"convention": "fastmoe_gshard", "top_k": 1}, "world_size is None.*expert-parallel"),
        ({"convention": "tutel_load_importance"}, "num_experts is None"),
        ({"convention": "fastmoe_switch"}, "only the first of 2"),
        ({"convention": "megatron", "first_choice": True}, "counts all 2 choices"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    call = {"weight": 0.1, "convention": "megatron", "top_k": 2, "num_layers": 2} | arguments
    with pytest.raises(EquipoiseError, match=words):
        convert(**call)


def test_every_convention_is_tested_against_its_formula():
    elsewhere = {"equipoise", "transformers", "megatron_global", "tutel_load_importance"}
    assert {case[0] for case in CASES} | elsewhere == set(CONVENTIONS)
    assert convert(0.5, "equipoise", top_k=4, num_layers=9) == 0.5
