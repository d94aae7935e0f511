"""Is a step's gradient what the reference says? And is that what one full batch would have had?"""

from __future__ import annotations

from collections.abc import Sequence

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

TOLERANCE = 2e-6
"""Of the largest entry that balancing adds to the gradient of any parameter.

Seen is 1e-6 at most: in a float64 model too, DeepSeek-V3's router computes its logits in float32.
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
    both = ((found[n].double(), main[n] + WEIGHT * added[n]) for n in added)
    return max(float((ours - wanted).abs().max()) for ours, wanted in both) / largest(added)


def _runs(family: str, setting: Setting, step: int) -> tuple[Heard, list[Heard]]:
    runs = [heard(family, setting.data, s % 2) for s in range(step + 1)]
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
    return worst <= TOLERANCE * largest(full)


def judge(
    family: str, setting: Setting, terms: tuple[Term, ...], outcomes: list[list[Outcome]]
) -> dict[str, float]:
    """Differences that are too large, by term; `outcomes` are one list per rank."""
    bad = {}
    for step, (term, *by_rank) in enumerate(zip(terms, *outcomes, strict=True)):
        draws = {key: rows for outcome in by_rank for key, rows in outcome.draws.items()}
        for outcome in by_rank:
            found = difference(family, setting, terms, step, outcome, draws)
            if not found <= TOLERANCE:
                bad[term.name] = found
    return bad
