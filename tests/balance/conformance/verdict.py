"""Is a step's gradient what the reference says? And is that what one full batch would have had?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tests.balance.conformance.reference import (
    Draws,
    Heard,
    Split,
    Term,
    gradients,
    heard,
    largest,
    loss,
)
from tests.balance.conformance.settings import WEIGHT, Outcome, Setting

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
"""Of the largest entry that balancing adds to the gradient of any parameter.

In float32 the page says what was seen: in a float64 model too, DeepSeek-V3's router computes its
logits in float32. In bfloat16 the reference goes the same way back through the model, in bfloat16; two
steps of that type at the largest entry.
"""


def difference(
    family: str, setting: Setting, terms: Sequence[Term], step: int, outcome: Outcome, draws: Draws
) -> float:
    """Largest difference of a step's gradients from the definition at the setting's split.

    The step is one of a run of steps, one for each of `terms`, on alternating batches.
    """
    run, history = _runs(family, setting, step)
    expected = int(run.valid_T.sum()) if setting.expects else None
    added = gradients(run, loss(terms[step], run, setting.split, history, draws, expected))
    main = gradients(run, run.main)
    found = outcome.gradients
    assert set(found) == set(added)
    both = ((found[n].double(), main[n].double() + WEIGHT * added[n].double()) for n in added)
    return max(float((ours - wanted).abs().max()) for ours, wanted in both) / largest(added)


def heard_in(setting: Setting, family: str, number: int) -> Heard:
    """What the reference of a setting hears of a batch."""
    rounded = None if setting.dtype == torch.float32 else setting.split
    return heard(family, setting.data, number, rounded)


def _runs(family: str, setting: Setting, step: int) -> tuple[Heard, list[Heard]]:
    runs = [heard_in(setting, family, s % 2) for s in range(step + 1)]
    return runs[-1], runs[:-1]


def same_as_full_batch(family: str, setting: Setting, term: Term) -> bool:
    """Whether a term, by its definition, does not feel the setting's split."""
    run, history = _runs(family, setting, 2)
    expected = int(run.valid_T.sum()) if setting.expects else None
    draws = {
        (m, r, layer): run.valid_T[setting.split.tokens(m, r)].nonzero()[:1, 0]
        for m in range(setting.split.micro)
        for r in range(setting.split.ranks)
        for layer in range(len(run.scores))
    }
    every = {(0, 0, layer): run.valid_T.nonzero()[:, 0] for layer in range(len(run.scores))}
    if setting.split == Split():
        draws = every
    here = gradients(run, loss(term, run, setting.split, history, draws, expected))
    full = gradients(run, loss(term, run, Split(), history, every))
    worst = max(float((here[n] - full[n]).abs().max()) for n in full)
    return worst <= TOLERANCE[torch.float32] * largest(full)


def differences(
    family: str, setting: Setting, terms: tuple[Term, ...], outcomes: list[list[Outcome]]
) -> dict[str, float]:
    """The difference of each term, the largest of any rank; `outcomes` are one list per rank."""
    out = {}
    for step, (term, *by_rank) in enumerate(zip(terms, *outcomes, strict=True)):
        draws = {key: rows for outcome in by_rank for key, rows in outcome.draws.items()}
        found = [difference(family, setting, terms, step, o, draws) for o in by_rank]
        out[term.name] = math.nan if any(map(math.isnan, found)) else max(found)
    return out


def judge(
    family: str, setting: Setting, terms: tuple[Term, ...], outcomes: list[list[Outcome]]
) -> dict[str, float]:
    """Differences that are too large, by term."""
    found = differences(family, setting, terms, outcomes)
    return {name: d for name, d in found.items() if not d <= TOLERANCE[setting.dtype]}
