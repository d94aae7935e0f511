"""The words of the page: each figure's formula, its floor and its interval, in a line or two."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """A figure of the report and what it is."""

    name: str
    formula: str
    text: str


DEFINITIONS = (
    Term("Count", "selections of an expert by valid tokens.", "Padding is not load."),
    Term(
        "Share and ratio",
        "share = count / all selections of the layer; ratio = share x experts.",
        "A ratio of 1 is a fair share. The interval is the exact binomial one (95 %) on effective"
        " tokens: tokens over the design effect, because tokens of one document choose alike.",
    ),
    Term(
        "MaxVio",
        "max(count) / mean(count) - 1, between 0 and experts / top-k - 1.",
        "How far the busiest expert is above the mean (arXiv 2408.15664). Its floor is the mean"
        " MaxVio of simulated uniform routing of as many tokens; the grey area reaches to what"
        " chance passes in one run of twenty. Interval: 95 %, from whole documents.",
    ),
    Term(
        "Gini",
        "sum of (2i - E - 1) c(i) over E sum(c), counts ascending.",
        "0 when all experts are used alike, 1 - 1/E when one takes all; twice the area between the"
        " Lorenz curve and the diagonal.",
    ),
    Term("CV", "standard deviation of the counts / mean.", "Population form, not squared."),
    Term(
        "Effective experts",
        "exp(H), H = - sum of share x ln(share).",
        "How many equally used experts would be as mixed.",
    ),
    Term(
        "Never selected, and true share at most",
        "count = 0; 95 % upper bound 1 - 0.05^(1/n) on n effective tokens, over top-k.",
        "Unseen is not dead: the bound says how large the true share may still be.",
    ),
    Term(
        "Verdict",
        "dead, cold, specialist, idle, undetermined or active.",
        "Dead: never selected, and the upper bound of the ratio is below 1 %. Cold: the interval of"
        " the ratio lies below 10 %. Specialist: cold, but not in some subject, category or domain"
        " (false finds held at 5 %). Idle: a run without a selection as long as the threshold or"
        " longer. Undetermined: too few effective tokens to tell.",
    ),
    Term(
        "Times, by group",
        "share of an expert in the group / its share in all tokens.",
        "Listed when outside what chance gives: normal approximation with the layer's design"
        " effect, 95 % for all experts and groups at once (Bonferroni).",
    ),
    Term(
        "Accuracy",
        "right answers / questions, the answer with the highest log-likelihood.",
        "Interval: exact binomial (Clopper and Pearson), 95 %.",
    ),
)
