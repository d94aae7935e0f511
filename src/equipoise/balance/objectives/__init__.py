"""What a balancing term penalises: pure functions, keyword-only, on loads, probabilities, logits.

The letters are those of `equipoise.routing`. `load_E` is each expert's share of the selections,
`prob_E` its mean probability; both sum to 1 over the last dimension, leading dimensions
(sequences, layers) are kept. All is computed in float32, or in float64 where that comes in.

| objective | at perfect balance | at collapse on one expert | gradient flows through |
|---|---|---|---|
| `switch`, `squared` | 1 | E | probabilities |
| `importance` | 1 | E | probabilities |
| `load_cv` | 1 | E | probabilities, or a smooth load |
| `group`, `communication` | 1 | G | probabilities |
| `entropy` | 0 | 1 (every token sure of one expert) | probabilities |
| `z`, `score_variance`, orthogonality | has no such value | | see there |

Switch on sequences (leading dimension S) is the sequence-wise loss of DeepSeek-V3 (2412.19437).
"""

from equipoise.balance.objectives.adversarial import idle, idleness, reverse_gradient
from equipoise.balance.objectives.balancing import (
    communication,
    group,
    importance,
    load_cv,
    squared,
    switch,
)
from equipoise.balance.objectives.router import (
    entropy,
    output_orthogonality,
    router_orthogonality,
    score_variance,
    z,
)
from equipoise.balance.objectives.shares import (
    PROBABILITY_FUNCTIONS,
    contiguous_groups,
    counts,
    load,
    mean_prob,
    probabilities,
    sent,
    sent_counts,
    share,
    smooth_load,
)

__all__ = [
    "PROBABILITY_FUNCTIONS",
    "communication",
    "contiguous_groups",
    "counts",
    "entropy",
    "group",
    "idle",
    "idleness",
    "importance",
    "load",
    "load_cv",
    "mean_prob",
    "output_orthogonality",
    "probabilities",
    "reverse_gradient",
    "router_orthogonality",
    "score_variance",
    "sent",
    "sent_counts",
    "share",
    "smooth_load",
    "squared",
    "switch",
    "z",
]
