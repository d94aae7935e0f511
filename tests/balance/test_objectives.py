"""Objectives: known values, independent loops for values and gradients, and what they ignore."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.balance import objectives as o
from equipoise.errors import EquipoiseError
from equipoise.routing import NO_EXPERT

T, E, K, G = 12, 6, 2, 3
GROUPS_E = torch.arange(E) // (E // G)
F64 = torch.float64


def one_hot(expert: int) -> Tensor:
    return torch.eye(E)[expert]


def fair(size: int = E) -> Tensor:
    return torch.full((size,), 1 / size)


def logits_TE(seed: int = 0, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (T, E)), generator=draw, dtype=F64)


def uneven_load() -> Tensor:
    return torch.tensor([0.4, 0.25, 0.15, 0.1, 0.1, 0.0], dtype=F64)


def load_of_groups(load_E: Tensor) -> Tensor:
    """What `sent` gives when each token is sent for one expert only."""
    wide_E = load_E if load_E.dtype is F64 else load_E.float()
    return torch.stack([wide_E[..., e : e + E // G].sum(-1) for e in range(0, E, E // G)], -1)


ON_LOAD = {
    "switch": o.switch,
    "squared": o.squared,
    "importance": o.importance,
    "load_cv": o.load_cv,
    "group": lambda **kw: o.group(**kw, group_of_E=GROUPS_E, num_groups=G),
    "communication": lambda load_E, prob_E: o.communication(
        sent_G=load_of_groups(load_E), prob_E=prob_E, group_of_E=GROUPS_E, num_groups=G
    ),
}
COLLAPSED = {name: G if name in ("group", "communication") else E for name in ON_LOAD}


def naive_slope(name: str, f: list[float], p: list[float]) -> list[float]:
    """dL/dP_e of each objective, written out from its formula."""
    if name == "switch":
        return [E * fe for fe in f]
    if name in ("squared", "load_cv"):  # d/dx E sum x^2 / (sum x)^2 at x = f, sum f = 1
        constant = 0.0 if name == "squared" else sum(fe * fe for fe in f)
        return [2 * E * (fe - constant) for fe in f]
    if name == "importance":
        return [2 * E * (pe - sum(q * q for q in p)) for pe in p]
    of_group = [sum(f[j] for j in range(E) if j // (E // G) == g) for g in range(G)]
    return [G * of_group[e // (E // G)] for e in range(E)]


# --- objectives on load and probability ---


@pytest.mark.parametrize("name", ON_LOAD)
def test_value_is_one_at_perfect_balance(name):
    assert ON_LOAD[name](load_E=fair(), prob_E=fair()).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ON_LOAD)
@pytest.mark.parametrize("expert", [0, E - 1])
def test_value_at_collapse_on_one_expert(name, expert):
    value = ON_LOAD[name](load_E=one_hot(expert), prob_E=one_hot(expert))
    assert value.item() == pytest.approx(COLLAPSED[name], abs=1e-5)


def test_load_times_probability_is_no_measure_of_imbalance():
    worst = {"load_E": torch.tensor([1.0, 0.0]), "prob_E": torch.tensor([0.0, 1.0])}
    assert o.switch(**worst).item() == 0
    assert o.squared(**worst).item() == 2
    assert o.switch(load_E=torch.tensor([1.0, 0.0]), prob_E=fair(2)).item() == 1


@pytest.mark.parametrize("name", ["squared", "load_cv"])
def test_measures_equal_one_plus_squared_cv_of_the_load(name):
    load = uneven_load()
    cv = load.std(correction=0) / load.mean()
    value = ON_LOAD[name](load_E=load, prob_E=fair().to(F64))
    assert value.item() == pytest.approx(1 + cv.item() ** 2, rel=1e-12)


@pytest.mark.parametrize("name", ON_LOAD)
def test_router_gradient_equals_the_formula_written_out(name):
    scores = logits_TE().requires_grad_()
    probs = scores.softmax(-1)
    load = uneven_load()
    ON_LOAD[name](load_E=load, prob_E=o.mean_prob(probs_TE=probs)).backward()
    p = probs.tolist()
    mean = [sum(row[e] for row in p) / T for e in range(E)]
    slope = naive_slope(name, load.tolist(), mean)
    for t in range(T):
        inner = sum(p[t][e] * slope[e] for e in range(E))
        expected = [p[t][e] * (slope[e] - inner) / T for e in range(E)]
        assert scores.grad[t].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("name", ["switch", "importance", "group", "communication"])
def test_gradcheck(name):
    def value(scores: Tensor) -> Tensor:
        prob = o.mean_prob(probs_TE=scores.softmax(-1))
        return ON_LOAD[name](load_E=uneven_load(), prob_E=prob)

    assert torch.autograd.gradcheck(value, logits_TE().requires_grad_())


def test_squared_has_twice_the_gradient_of_switch():
    grads = []
    for objective in (o.switch, o.squared):
        prob = fair().to(F64).requires_grad_()
        objective(load_E=uneven_load(), prob_E=prob).backward()
        grads.append(prob.grad)
    assert torch.allclose(2 * grads[0], grads[1])


@pytest.mark.parametrize("name", ON_LOAD)
def test_no_gradient_reaches_the_load(name):
    load = uneven_load().requires_grad_()
    prob = fair().to(F64).requires_grad_()
    ON_LOAD[name](load_E=load, prob_E=prob).backward()
    assert load.grad is None
    assert prob.grad is not None


@pytest.mark.parametrize("name", ON_LOAD)
def test_leading_dimensions_are_kept(name):
    load = logits_TE(1, 2, 3, E).softmax(-1)
    prob = logits_TE(2, 2, 3, E).softmax(-1)
    together = ON_LOAD[name](load_E=load, prob_E=prob)
    assert together.shape == (2, 3)
    alone = ON_LOAD[name](load_E=load[1, 2], prob_E=prob[1, 2])
    assert together[1, 2].item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("name", ON_LOAD)
def test_half_precision_is_computed_in_float32(name):
    load, prob = uneven_load().bfloat16(), logits_TE(3, E).softmax(-1).bfloat16()
    value = ON_LOAD[name](load_E=load, prob_E=prob)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(
        ON_LOAD[name](load_E=load.to(F64), prob_E=prob.to(F64)).item(), rel=1e-6
    )


@pytest.mark.parametrize("name", ON_LOAD)
def test_without_tokens_value_and_gradient_are_zero(name):
    scores = logits_TE().requires_grad_()
    nothing = torch.zeros(T, dtype=torch.bool)
    prob = o.mean_prob(probs_TE=scores.softmax(-1), valid_T=nothing)
    load = o.load(expert_ids_TK=torch.zeros(T, K, dtype=torch.long), num_experts=E, valid_T=nothing)
    value = ON_LOAD[name](load_E=load, prob_E=prob)
    value.backward()
    assert value.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_groups_of_different_size_are_balanced_at_their_experts_share():
    groups = torch.tensor([0, 1, 1, 1, 2, 2])
    value = o.group(load_E=fair(), prob_E=fair(), group_of_E=groups, num_groups=3)
    assert value.item() == pytest.approx(1, abs=1e-6)


def test_group_ignores_imbalance_within_a_group():
    inside = torch.tensor([1 / 3, 0, 1 / 3, 0, 0, 1 / 3])
    prob = inside.clone().requires_grad_()
    value = o.group(load_E=inside, prob_E=prob, group_of_E=GROUPS_E, num_groups=G)
    value.backward()
    assert value.item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(prob.grad, prob.grad[0].expand(E))  # the same for all: nothing to learn
    assert o.squared(load_E=inside, prob_E=inside).item() == pytest.approx(2, abs=1e-6)


def test_group_is_the_sum_of_mean_loads_times_summed_probabilities():
    load, prob = uneven_load(), logits_TE(4, E).softmax(-1)
    expected = 0.0
    for g in range(G):
        members = [e for e in range(E) if e // (E // G) == g]
        mean_load = sum(E * load[e].item() for e in members) / len(members)
        expected += mean_load * sum(prob[e].item() for e in members)
    value = o.group(load_E=load, prob_E=prob, group_of_E=GROUPS_E, num_groups=G)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_load_cv_without_probability_learns_through_the_load_and_ignores_its_scale():
    raw = uneven_load().requires_grad_()
    assert torch.autograd.gradcheck(lambda load: o.load_cv(load_E=load), raw)
    assert o.load_cv(load_E=raw).item() == pytest.approx(o.load_cv(load_E=7 * raw).item())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: o.switch(load_E=fair(4), prob_E=fair(5)), r"\(4,\) and prob_E \(5,\)"),
        (
            lambda: o.group(
                load_E=fair(), prob_E=fair(), group_of_E=torch.zeros(4).long(), num_groups=1
            ),
            r"must be \(6,\)",
        ),
        (
            lambda: o.communication(
                sent_G=fair(2), prob_E=fair(), group_of_E=GROUPS_E, num_groups=3
            ),
            "num_groups is 3",
        ),
        (lambda: o.contiguous_groups(num_experts=6, num_groups=4), "6 experts do not divide"),
        (
            lambda: o.probabilities(scores_TE=fair(), function="softmx"),
            "Did you mean 'softmax'",
        ),
        (
            lambda: o.mean_prob(probs_TE=torch.ones(4, 2), valid_T=torch.ones(3)),
            r"must be \(4,\)",
        ),
        (
            lambda: o.smooth_load(
                logits_TE=torch.ones(4, 2),
                noise_std_TE=torch.ones(4, 2),
                noisy_logits_TE=torch.ones(4, 2),
                top_k=2,
            ),
            "top_k < 2 experts, not top_k=2",
        ),
        (lambda: o.entropy(probs_TE=torch.ones(3, 1)), "2 experts or more, not 1"),
        (lambda: o.output_orthogonality(outputs_TKD=torch.ones(3, 1, 4)), "top_k >= 2, not 1"),
        (
            lambda: o.router_orthogonality(weight_ED=torch.eye(2), kind="l2"),
            "ernie and simbal",
        ),
        (lambda: o.reverse_gradient(tensor=fair(), strength=-1), "strength -1"),
        (lambda: o.idleness(idle_logits_E=fair(), idle_E=fair(2) > 0), "one label for each"),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(EquipoiseError, match=words):
        call()


# --- loads and probabilities ---

ROUTED = st.lists(
    st.tuples(st.lists(st.integers(-1, E - 1), min_size=K, max_size=K), st.booleans()),
    min_size=1,
    max_size=15,
)


@given(ROUTED)
@settings(max_examples=100, deadline=None)
def test_counts_loads_and_sendings_equal_a_loop(rows):
    ids = torch.tensor([row for row, _ in rows])
    valid = torch.tensor([real for _, real in rows])
    count, reached = [0] * E, [0] * G
    for row, real in rows:
        chosen = [e for e in row if e != NO_EXPERT] if real else []
        for e in chosen:
            count[e] += 1
        for g in {e // (E // G) for e in chosen}:
            reached[g] += 1
    groups = {"group_of_E": GROUPS_E, "num_groups": G}
    assert o.counts(expert_ids_TK=ids, num_experts=E, valid_T=valid).tolist() == count
    load = o.load(expert_ids_TK=ids, num_experts=E, valid_T=valid)
    assert load.tolist() == pytest.approx([c / max(sum(count), 1) for c in count])
    assert o.sent_counts(expert_ids_TK=ids, valid_T=valid, **groups).tolist() == reached
    sent = o.sent(expert_ids_TK=ids, valid_T=valid, **groups)
    assert sent.tolist() == pytest.approx([r / max(sum(reached), 1) for r in reached])


def test_counts_of_sequences_and_of_small_integer_ids():
    ids = torch.tensor([[[0, 1], [0, 2]], [[5, 5], [NO_EXPERT, 3]]], dtype=torch.int16)
    counts = o.counts(expert_ids_TK=ids, num_experts=E)
    assert counts.tolist() == [[2, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 2]]
    sent = o.sent_counts(expert_ids_TK=ids, group_of_E=GROUPS_E, num_groups=G)
    assert sent.tolist() == [[2, 1, 0], [0, 1, 1]]


def test_communication_of_exactly_m_devices_is_the_papers_form():
    """G / (T M) sum_t 1[token sent to g] when each token reaches M of G devices."""
    most, prob = 2, logits_TE(5, E).softmax(-1)
    ids = torch.tensor([[0, 2], [1, 4], [3, 5], [0, 3]])  # each on two of three devices
    groups = {"group_of_E": GROUPS_E, "num_groups": G}
    received = [3, 3, 2]
    expected = sum(
        G / (len(ids) * most) * received[g] * prob[g == GROUPS_E].sum().item() for g in range(G)
    )
    sent = o.sent(expert_ids_TK=ids, **groups)
    value = o.communication(sent_G=sent, prob_E=prob, **groups)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_mean_probability_leaves_padding_out():
    probs = logits_TE(6, 2, T, E).softmax(-1)
    valid = torch.rand(2, T, generator=torch.Generator().manual_seed(0)) < 0.5
    mean = o.mean_prob(probs_TE=probs, valid_T=valid)
    for s in range(2):
        assert torch.allclose(mean[s], probs[s][valid[s]].mean(0))
    assert torch.allclose(o.mean_prob(probs_TE=probs), probs.mean(-2))


@pytest.mark.parametrize(
    ("function", "score"),
    [
        ("softmax", math.exp),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("sqrtsoftplus", lambda x: math.sqrt(math.log1p(math.exp(x)))),
        ("probabilities", None),
    ],
)
def test_probabilities_are_scores_over_their_sum(function, score):
    scores = logits_TE(7).softmax(-1) if score is None else 4 * logits_TE(7)
    probs = o.probabilities(scores_TE=scores, function=function)
    for row, got in zip(scores.tolist(), probs.tolist(), strict=True):
        s = row if score is None else [score(x) for x in row]
        assert got == pytest.approx([x / sum(s) for x in s], rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: o.probabilities(scores_TE=x, function=function), scores.requires_grad_()
    )


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("shift", [-1e4, -100.0, -30.0, 1e4])
def test_probabilities_and_gradients_stay_finite_far_out(function, shift):
    scores = (logits_TE(8).float() + shift).requires_grad_()
    probs = o.probabilities(scores_TE=scores, function=function)
    probs[:, 0].sum().backward()
    assert torch.allclose(probs.sum(-1), torch.ones(T))
    assert torch.isfinite(scores.grad).all()


def noisy_case() -> dict[str, Tensor]:
    clean, std = logits_TE(9, 4, E), 0.3 + logits_TE(10, 4, E).abs()
    return {
        "logits_TE": clean,
        "noise_std_TE": std,
        "noisy_logits_TE": clean + std * logits_TE(11, 4, E),
    }


@pytest.mark.parametrize("top_k", [1, 2, E - 1])
def test_smooth_load_is_how_often_redrawn_noise_selects(top_k):
    case = noisy_case()
    draws = 20_000
    chance = torch.zeros(E, dtype=F64)
    noise = torch.randn(draws, generator=torch.Generator().manual_seed(1), dtype=F64)
    for t in range(4):
        for e in range(E):
            others = [case["noisy_logits_TE"][t, j].item() for j in range(E) if j != e]
            threshold = sorted(others)[-top_k]
            redrawn = case["logits_TE"][t, e] + case["noise_std_TE"][t, e] * noise
            chance[e] += (redrawn > threshold).double().mean()
    load = o.smooth_load(**case, top_k=top_k)
    assert torch.allclose(load, chance / chance.sum(), atol=0.01)


def test_smooth_load_and_its_cv_have_the_right_gradient():
    case = noisy_case()
    valid = torch.tensor([True, True, False, True])

    def value(clean: Tensor, std: Tensor, noisy: Tensor) -> Tensor:
        load = o.smooth_load(
            logits_TE=clean, noise_std_TE=std, noisy_logits_TE=noisy, top_k=2, valid_T=valid
        )
        return o.load_cv(load_E=load)

    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in case.values()])


# --- objectives on the router and the experts ---


def test_z_is_the_squared_logsumexp_and_zero_at_normalised_logits():
    scores = logits_TE(12)
    expected = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in scores.tolist()]
    assert o.z(logits_TE=scores).tolist() == pytest.approx(expected, rel=1e-9)
    assert o.z(logits_TE=torch.zeros(1, E)).item() == pytest.approx(math.log(E) ** 2)
    assert o.z(logits_TE=scores.log_softmax(-1)).abs().max().item() < 1e-20
    assert o.z(logits_TE=torch.full((1, E), 3e4, dtype=torch.bfloat16)).isfinite().all()
    assert torch.autograd.gradcheck(lambda x: o.z(logits_TE=x), scores.requires_grad_())


def test_entropy_is_zero_undecided_and_one_decided():
    assert o.entropy(probs_TE=fair()[None]).item() == pytest.approx(0, abs=1e-6)
    assert o.entropy(probs_TE=one_hot(2)[None]).item() == 1
    two_sure = torch.tensor([[0.5, 0.5, 0, 0]])
    assert o.entropy(probs_TE=two_sure).item() == pytest.approx(0.5)
    assert torch.autograd.gradcheck(
        lambda x: o.entropy(probs_TE=x.softmax(-1)), logits_TE(13).requires_grad_()
    )


def test_entropy_has_a_finite_gradient_where_a_probability_is_zero():
    scores = torch.tensor([[0.0, -500.0, -1e4]], requires_grad=True)
    o.entropy(probs_TE=scores.softmax(-1)).sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_score_variance_is_minus_the_mean_variance_over_valid_tokens():
    probs = logits_TE(14).softmax(-1)
    valid = torch.arange(T) % 3 > 0
    rows = probs[valid].tolist()
    variances = []
    for e in range(E):
        mean = sum(row[e] for row in rows) / len(rows)
        variances.append(sum((row[e] - mean) ** 2 for row in rows) / len(rows))
    value = o.score_variance(probs_TE=probs, valid_T=valid)
    assert value.item() == pytest.approx(-sum(variances) / E, rel=1e-9)
    assert o.score_variance(probs_TE=probs[:1].expand(T, E)).item() == 0
    assert torch.autograd.gradcheck(
        lambda x: o.score_variance(probs_TE=x.softmax(-1), valid_T=valid),
        logits_TE(14).requires_grad_(),
    )


def test_output_orthogonality_is_the_mean_length_of_projections():
    outputs = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]]])
    value = o.output_orthogonality(outputs_TKD=outputs)
    assert value.tolist() == pytest.approx([(1 + math.sqrt(0.5)) / 2, 0], abs=1e-6)
    many = logits_TE(15, 3, 4, 5)
    for t in range(3):
        lengths = [
            (many[t, j].dot(many[t, k]) / many[t, k].dot(many[t, k]) * many[t, k]).norm().item()
            for j in range(4)
            for k in range(4)
            if j != k
        ]
        value = o.output_orthogonality(outputs_TKD=many)[t]
        assert value.item() == pytest.approx(sum(lengths) / len(lengths), rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: o.output_orthogonality(outputs_TKD=x), many.requires_grad_()
    )


def test_output_orthogonality_takes_rows_of_dropped_experts():
    outputs = logits_TE(16, 2, 3, 5)
    outputs[:, 2] = 0
    outputs.requires_grad_()
    value = o.output_orthogonality(outputs_TKD=outputs)
    value.sum().backward()
    kept = o.output_orthogonality(outputs_TKD=outputs[:, :2])
    assert torch.allclose(value, kept * 2 / 6)
    assert torch.isfinite(outputs.grad).all()


@pytest.mark.parametrize(
    ("kind", "slanted", "longer"), [("ernie", 0.25, 0.0), ("simbal", 0.75, 1.5)]
)
def test_router_orthogonality_of_known_rows(kind, slanted, longer):
    def value(weight: Tensor) -> float:
        return o.router_orthogonality(weight_ED=weight, kind=kind).item()

    assert value(torch.eye(3, 5)) == 0
    assert value(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(slanted)
    assert value(2 * torch.eye(2)) == pytest.approx(longer)  # only simbal minds the length
    assert torch.autograd.gradcheck(
        lambda w: o.router_orthogonality(weight_ED=w, kind=kind), logits_TE(17).requires_grad_()
    )


# --- adversarial pieces ---


def test_reversed_gradient_is_minus_the_strength_times_the_gradient():
    tensor = logits_TE(18, 3).requires_grad_()
    out = o.reverse_gradient(tensor=tensor, strength=0.3)
    out.square().sum().backward()
    assert torch.equal(out, tensor)
    assert torch.allclose(tensor.grad, -0.3 * 2 * tensor)


def test_idle_experts_are_below_a_part_of_their_fair_share():
    load = torch.tensor([0.5, 0.3, 0.11, 0.09])
    assert o.idle(load_E=load, below=0.4).tolist() == [False, False, False, True]


def test_idleness_is_one_when_blind_and_zero_when_right():
    labels = torch.tensor([True, False, False, False])
    blind = o.idleness(idle_logits_E=torch.zeros(4), idle_E=labels)
    sure = o.idleness(idle_logits_E=torch.where(labels, 50.0, -50.0), idle_E=labels)
    always_busy = o.idleness(idle_logits_E=torch.full((4,), -9.0), idle_E=labels)
    assert blind.item() == pytest.approx(1)
    assert sure.item() == pytest.approx(0, abs=1e-6)
    assert always_busy.item() > 1  # the common answer does not pay
    assert torch.autograd.gradcheck(
        lambda x: o.idleness(idle_logits_E=x, idle_E=labels), logits_TE(19, 4).requires_grad_()
    )


@pytest.mark.parametrize("label", [True, False])
def test_idleness_teaches_nothing_where_all_experts_are_alike(label):
    logits = logits_TE(20, 4).requires_grad_()
    value = o.idleness(idle_logits_E=logits, idle_E=torch.full((4,), label))
    value.backward()
    assert value.item() == 1
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_step_on_the_adversarial_term_hides_the_idle_expert():
    """The discriminator learns that a low probability means idle; the router raises it."""
    scores = torch.tensor([[2.0, 2.0, -2.0]], dtype=F64, requires_grad=True)
    slope = torch.tensor(-1.0, dtype=F64, requires_grad=True)  # discriminator: logit = slope P
    prob = o.mean_prob(probs_TE=scores.softmax(-1))
    hidden = o.reverse_gradient(tensor=prob)
    value = o.idleness(idle_logits_E=slope * hidden, idle_E=o.idle(load_E=prob.detach()))
    value.backward()
    assert slope.grad > 0  # descent makes it more negative
    assert scores.grad[0, 2] < 0  # descent raises the idle expert's logit
