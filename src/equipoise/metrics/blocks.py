"""Blocks: groups of whole documents, the units that the bootstrap draws.

Tokens of one document choose alike, so they are not independent observations; documents are taken
to be. A block is a whole document, or, where there are more than MAX_BLOCKS, a random hand of
them, which keeps the bootstrap small and its variance right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_BLOCKS = 256
"""Documents are dealt into at most so many blocks."""

MIN_BLOCKS = 8
"""With fewer, the spread between blocks is itself too uncertain: no interval is given."""

MIN_SPAN = 64
"""Tokens in a span, the block that stands in for documents where none are known."""

MAX_SPANS = 64
"""Fewer and longer spans than documents: a span must be long against what tokens remember."""


def deal(documents: int, max_blocks: int = MAX_BLOCKS, seed: int = 0) -> NDArray[np.int64]:
    """Block of each of the documents, int64 [S]; seeded, hands differ by one document at most.

    Neighbouring documents (same subject, same prompt) land in unrelated blocks: the sampling is
    of documents, not of subjects.
    """
    if documents <= max_blocks:
        return np.arange(documents)
    return np.random.default_rng(seed).permutation(documents) % max_blocks


def span_length(tokens: int) -> int:
    """Length of equal spans of consecutive tokens, at most MAX_SPANS and none below MIN_SPAN."""
    return max(-(-tokens // MAX_SPANS), MIN_SPAN)
