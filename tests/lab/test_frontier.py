"""What the frontier's and the recipe's pages say of paired seeds, on made-up results."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from equipoise.lab.experiments import frontier, paired, recipe
from equipoise.lab.results import mean_interval

NOISE = (0.004, -0.003, 0.001, -0.004, 0.002)


def runs(loss: float, load: float, seeds: Sequence[int] = range(5)) -> list[Any]:
    """Runs whose seeds share most of their noise, as paired ones do, each with a little of its own."""
    own = np.random.default_rng(round(1000 * loss + 100 * load)).normal(size=(5, 2))
    return [
        SimpleNamespace(
            seed=seed,
            final=SimpleNamespace(
                loss=loss + 50 * NOISE[seed] + 0.001 * own[seed, 0],
                max_vio=load * (1 + 0.02 * own[seed, 1]),
            ),
        )
        for seed in seeds
    ]


WEAK, MIDDLE, STRONG = paired.LINE[:3]


def test_at_equal_load_a_loss_is_set_against_the_lines_between_the_switch_losses() -> None:
    methods = {WEAK: runs(3.9, 1.0), MIDDLE: runs(4.0, 0.25), STRONG: runs(4.1, 0.125)}
    # The middle of ln 1 and ln 0.25 is ln 0.5, where the line is at 3.95.
    assert paired.at_equal_load(runs(3.93, 0.5), methods) == pytest.approx([-0.02] * 5, abs=0.01)
    # And that of the stronger two at 4.05.
    near = runs(4.08, 0.125 * 2**0.5)
    assert paired.at_equal_load(near, methods) == pytest.approx([0.03] * 5, abs=0.01)


def test_a_weight_that_evens_the_load_no_more_is_no_end_of_the_line() -> None:
    methods = {WEAK: runs(3.9, 1.0), MIDDLE: runs(4.0, 0.25), STRONG: runs(5.0, 0.5)}
    assert paired.at_equal_load(runs(3.93, 0.5), methods) == pytest.approx([-0.02] * 5, abs=0.01)


@pytest.mark.parametrize(
    ("load", "words"), [(0.1, "more even than all"), (5.0, "less even than all")]
)
def test_of_another_load_than_all_switch_losses_only_that_is_said(load: float, words: str) -> None:
    methods = {WEAK: runs(3.9, 1.0), MIDDLE: runs(4.0, 0.25), STRONG: runs(4.1, 0.125)}
    assert paired.at_equal_load(runs(3.93, load), methods) == []
    assert paired.told_at_equal_load(runs(3.93, load), methods) == words
    assert paired.told_at_equal_load(runs(3.93, load), {WEAK: methods[WEAK]}) == "–"


def test_at_equal_load_takes_the_seeds_that_can_be_compared_and_says_how_many() -> None:
    methods = {WEAK: runs(3.9, 1.0), MIDDLE: runs(4.0, 0.25)}
    inside, above, below = runs(3.93, 0.5, range(3)), runs(3.93, 0.1, [3]), runs(3.93, 5.0, [4])
    mine = inside + above + below
    assert len(paired.at_equal_load(mine, methods)) == 3
    mean, half = mean_interval(paired.at_equal_load(inside, methods))
    assert paired.told_at_equal_load(mine, methods) == (
        f"{mean:+.3f} ± {half:.3f} (3 of 5, 1 more even than all, 1 less even than all)"
    )
    assert paired.told_at_equal_load(inside, methods).startswith(f"{mean:+.3f} ± {half:.3f}, lower")
    # Two seeds picked by their outcome make no interval, and none no mean.
    assert "±" not in paired.told_at_equal_load(inside[:2] + above, methods)
    assert paired.told_at_equal_load(above + below, methods) == (
        "1 more even than all, 1 less even than all"
    )


def test_at_equal_load_all_seeds_of_a_method_have_the_same_line() -> None:
    methods = {WEAK: runs(3.9, 1.0), MIDDLE: runs(4.0, 0.25)}
    mine = runs(3.93, 0.1)
    # A stronger loss that one seed has would make that seed the only one compared.
    more = {**methods, STRONG: runs(4.1, 0.05, [0])}
    assert paired.told_at_equal_load(mine, more) == "more even than all"
    assert paired.told_at_equal_load(mine[:1], more).startswith("-0.1")
    assert paired.told_at_equal_load(mine, {**methods, MIDDLE: methods[MIDDLE][1:]}) == "–"


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([], "–"),
        ([0.3], "+0.300"),
        ([0.1 + x for x in NOISE], "+0.100 ± 0.004, higher"),
        ([x - 0.1 for x in NOISE], "-0.100 ± 0.004, lower"),
        ([x + 0.01 for x in NOISE], "+0.010 ± 0.004, higher, equivalent"),
        (list(NOISE), "+0.000 ± 0.004, equivalent"),
        ([20 * x for x in NOISE], "+0.000 ± 0.084"),
    ],
)
def test_a_verdict_tells_direction_and_equivalence(differences: list[float], words: str) -> None:
    assert paired.verdict(differences) == words


LEADERS = {"switch 0.01": (3.90, 1.2), "switch 0.1": (4.0, 0.4), "sign 0.01": (3.88, 0.25)}
# `sign 0.01` is better than both others, so that it is the whole frontier.


@pytest.mark.parametrize(
    ("loss", "load", "place"),
    [
        (3.80, 0.20, "beyond"),
        (3.80, 0.25, "beyond"),
        (3.80, 0.60, "on"),  # lower loss, less even
        (3.95, 0.10, "on"),
        (3.88, 0.25, "on"),
        (3.95, 0.30, "behind"),  # better than switch 0.1, which is not of the frontier
        (3.88, 0.50, "behind"),
    ],
)
def test_a_candidate_is_placed_to_the_frontier(loss: float, load: float, place: str) -> None:
    leaders = {name: runs(*at) for name, at in LEADERS.items()}
    assert recipe._place(runs(loss, load), leaders) == place


@pytest.mark.parametrize(("loss", "load", "alone"), [(3.88, 0.50, True), (3.95, 0.30, False)])
def test_behind_by_max_vio_alone_is_said(loss: float, load: float, alone: bool) -> None:
    leaders = {name: runs(*at) for name, at in LEADERS.items()}
    assert recipe._by_load_alone(runs(loss, load), leaders) is alone


def test_a_verdict_takes_the_seeds_of_all_and_says_where() -> None:
    leaders = {
        "switch 0.01": runs(3.9, 1.2),
        "switch 0.1": runs(4.0, 0.4),
        "switch 1": runs(4.2, 0.3),
        "proportional 0.01": runs(3.95, 0.3),
        "RMS-normalised 0.01": runs(3.95, 0.35),
        "quantile by histogram": runs(3.95, 0.36),
        "quantile": runs(3.86, 0.2),
    }
    methods = {**leaders, "sign 0.01": runs(3.88, 0.25), "sign, decaying": runs(3.80, 0.15)}
    few = {**methods, "quantile": runs(3.86, 0.2, range(4))}
    assert "No candidate" in recipe.verdicts({"16 experts": few})[0]
    without = {name: found for name, found in methods.items() if name != "quantile"}
    assert (
        "No candidate" in recipe.verdicts({"16 experts": without})[0]
    )  # the frontier may lie there
    found = recipe.verdicts({"16 experts": methods, "64 experts": few})
    assert found[:2] == [
        "The frontier of the single methods. 16 experts: quantile.",
        "On or beyond the frontier wherever its seeds are run: sign, decaying (16 experts). "
        "Beyond it: sign, decaying.",
    ]
    other = {**methods, "quantile": runs(3.86, 0.2), "sign 0.01": runs(3.70, 0.25)}
    sizes = {"16 experts": methods, "64 experts": other}
    assert (
        "64 experts: sign 0.01, quantile. On it at all 2 sizes: quantile."
        in recipe.verdicts(sizes)[0]
    )
    other["quantile"] = runs(3.86, 0.3)
    assert recipe.verdicts(sizes)[0].endswith("64 experts: sign 0.01. On it at all 2 sizes: none.")
    alike = recipe.verdicts({"16 experts": {**methods, "sign, decaying": runs(3.86, 0.2)}})
    assert "Beyond it: none, so that none of them" in alike[1]
    assert found[2].startswith(
        "sign, decaying. 16 experts: beyond the frontier (against switch 0.01"
    )
    assert "nan" not in " ".join(found)


def test_families_lose_their_strength_where_there_are_several() -> None:
    names = (
        "switch 0.01",
        "switch 0.1",
        "quantile, ema 0.9",
        "quantile",
        "PID",
        "sign 1e-3",
        "sign 1e-2",
    )
    assert list(frontier.families_of(names).values()) == [
        "switch", "switch", "quantile, ema 0.9", "quantile", "PID", "sign", "sign"
    ]  # fmt: skip


def test_whether_it_lasts_sets_both_lengths_beside_one_another() -> None:
    bias, loss = "quantile by histogram", frontier.STRONG
    short, longer = "64 experts", f"64 experts{frontier.LENGTH}"
    groups = {
        short: {loss: runs(3.9, 0.7), bias: runs(3.84, 0.2)},
        longer: {loss: runs(2.9, 0.6), bias: runs(2.88, 0.1)},
    }
    ends = [
        paired.verdict(paired.paired(methods[bias], methods[loss])) for methods in groups.values()
    ]
    assert [end[:5] for end in ends] == ["-0.06", "-0.02"]
    (told,) = frontier.lasting(groups)
    assert told.endswith(f"{bias} {ends[0]}, then {ends[1]}.")
    # Without all seeds of both, nothing is said.
    groups[longer][bias] = runs(2.88, 0.1, range(4))
    assert frontier.lasting(groups) == []
    assert frontier.lasting({short: groups[short]}) == []
