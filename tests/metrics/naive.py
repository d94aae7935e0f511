"""Slow and obvious twins of the fast routines; written from the definitions, sharing no code."""

from __future__ import annotations

import math
from itertools import product


def count_ids(ids, num_experts, mask=None):
    counts = [0] * num_experts
    for t, row in enumerate(ids):
        if mask is None or mask[t]:
            for e in row:
                if e != -1:
                    counts[e] += 1
    return counts


def count_grouped(ids, groups, num_groups, num_experts):
    counts = [[0] * num_experts for _ in range(num_groups)]
    for row, g in zip(ids, groups, strict=True):
        for e in row:
            if g >= 0 and e != -1:
                counts[g][e] += 1
    return counts


def idle_runs(ids, num_experts):
    """Longest and current run of rows without each expert, by walking a list of booleans."""
    longest, current = [], []
    for e in range(num_experts):
        run = best = 0
        for row in ids:
            run = 0 if e in row else run + 1
            best = max(best, run)
        longest.append(best)
        current.append(run)
    return longest, current


def measures(counts):
    """Every measure of one layer, with pure Python's arithmetic."""
    n, total = len(counts), sum(counts)
    mean = total / n
    shares = [c / total for c in counts]
    nats = -sum(p * math.log(p) for p in shares if p > 0)
    pairs = sum(abs(a - b) for a, b in product(counts, counts))
    return {
        "max_vio": max(counts) / mean - 1,
        "min_vio": min(counts) / mean - 1,
        "avg_vio": sum(abs(c / mean - 1) for c in counts) / n,
        "cv": math.sqrt(sum((c - mean) ** 2 for c in counts) / n) / mean,
        "gini": pairs / (2 * n * n * mean),
        "entropy": nats / math.log(n) if n > 1 else 1.0,
        "effective_experts": math.exp(nats),
        "min_max": min(counts) / max(counts),
        "coverage": sum(c > 0 for c in counts) / n,
    }


def design_effect(counts_BE, tokens_B, top_k):
    """Per expert: variance of its share between blocks over p (1 - K p) / (T K)."""
    blocks, experts = len(counts_BE), len(counts_BE[0])
    total, tokens = sum(map(sum, counts_BE)), sum(tokens_B)
    effects = []
    for e in range(experts):
        p = sum(row[e] for row in counts_BE) / total
        squares = sum((row[e] - p * sum(row)) ** 2 for row in counts_BE)
        variance = squares * blocks / (blocks - 1) / total**2
        effects.append(variance / (p * (1 - top_k * p) / (tokens * top_k)))
    return effects


def benjamini_hochberg(p_values, alpha):
    """Which hypotheses the step-up procedure rejects."""
    m = len(p_values)
    ranked = sorted(range(m), key=lambda i: p_values[i])
    last = max((r for r, i in enumerate(ranked, 1) if p_values[i] <= alpha * r / m), default=0)
    return {i for r, i in enumerate(ranked, 1) if r <= last}


def binomial_tail(hits, trials, rate):
    """P(X >= hits)."""
    return sum(
        math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(hits, trials + 1)
    )
