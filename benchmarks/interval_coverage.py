"""Coverage of the 95 % intervals: how often they hold the truth, simulated (docs/concepts.md).

    python benchmarks/interval_coverage.py [--repeats 400] [--only max_vio]

Documents with their own tastes are drawn around a known distribution over experts: each has a
Dirichlet(strength x p) distribution and a log-normal number of tokens. From their counts the
package's interval and the textbook ones (percentile, basic, BCa) are made, and compared with the
measure of p itself. Prints a markdown table: coverage in %, and the median width.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np
from scipy.special import ndtr, ndtri

from equipoise.metrics import load
from equipoise.metrics.blocks import MAX_BLOCKS, deal
from equipoise.metrics.intervals import layer_intervals, resampling_weights, share_intervals

MEASURES = ("max_vio", "gini", "cv", "entropy")
CASES = [
    # (truth, experts, documents, strength of the documents' agreement)
    ("uniform", 16, 12, 200),
    ("uniform", 64, 40, 200),
    ("uniform", 256, 1000, 200),
    ("mild", 16, 40, 200),
    ("mild", 64, 12, 50),
    ("mild", 64, 250, 20),
    ("mild", 128, 1000, 200),
    ("skewed", 16, 12, 200),
    ("skewed", 64, 250, 20),
    ("skewed", 128, 1000, 200),
    ("one hot", 16, 12, 200),
    ("one hot", 64, 250, 50),
    ("one hot", 256, 1000, 200),
]
RESAMPLES = 500
TOKENS = 800


def truth(kind: str, experts: int) -> np.ndarray:
    """A distribution over experts: log-normal of spread 0.15 or 0.8, or one at four times."""
    rng = np.random.default_rng(experts)
    if kind == "one hot":
        p = np.ones(experts)
        p[0] = 4
    else:
        spread = {"uniform": 0.0, "mild": 0.15, "skewed": 0.8}[kind]
        p = np.exp(spread * rng.standard_normal(experts))
    return p / p.sum()


def sample(p, documents, strength, rng):
    """Counts by block [B, E] and tokens by block [B] of one simulated run (K = 1)."""
    tokens = np.maximum(rng.lognormal(np.log(TOKENS), 0.5, documents), 20).astype(int)
    counts = rng.multinomial(tokens, rng.dirichlet(strength * p, documents))
    block = deal(documents)
    blocks = min(documents, MAX_BLOCKS)
    counts_BE = np.zeros((blocks, len(p)), np.int64)
    np.add.at(counts_BE, block, counts)
    return counts_BE, counts_BE.sum(1)


def textbook(counts_BE: np.ndarray, name: str) -> dict[str, tuple[float, float]]:
    """Percentile, basic and BCa intervals of one measure."""
    measure = load.MEASURES[name]
    total = counts_BE.sum(0)
    here = float(measure(total))
    drawn = measure(resampling_weights(len(counts_BE), RESAMPLES) @ counts_BE)
    low, high = np.quantile(drawn, [0.025, 0.975])
    below = np.clip((drawn < here).mean(), 1 / RESAMPLES, 1 - 1 / RESAMPLES)
    left_out = measure(total - counts_BE)
    d = left_out.mean() - left_out
    skew = (d**3).sum() / (6 * (d**2).sum() ** 1.5 + 1e-300)
    z0 = ndtri(below)
    levels = [ndtr(z0 + (z0 + z) / (1 - skew * (z0 + z))) for z in (-1.96, 1.96)]
    return {
        "percentile": (low, high),
        "BCa": tuple(np.quantile(drawn, levels)),
        "basic": (2 * here - high, 2 * here - low),
    }


def run(case, repeats: int, measures) -> dict[str, list[tuple[bool, float]]]:
    """For each "measure method": whether it held the truth, and its width, in every repeat."""
    kind, experts, documents, strength = case
    p = truth(kind, experts)
    rng = np.random.default_rng(1)
    found = defaultdict(list)

    def note(key, interval, true):
        low, high = interval
        found[key].append((low - 1e-9 <= true <= high + 1e-9, high - low))

    for _ in range(repeats):
        counts_BE, tokens_B = sample(p, documents, strength, rng)
        ours = layer_intervals(counts_BE, RESAMPLES)
        for name in measures:
            true = float(load.MEASURES[name](p))
            for method, (low, high) in textbook(counts_BE, name).items():
                top = 1.0 if name == "entropy" else np.inf
                note(f"{name} {method}", (np.clip(low, 0, top), np.clip(high, 0, top)), true)
            note(f"{name} used", ours[name], true)
        low_E, high_E = share_intervals(counts_BE, tokens_B, 1)
        cells = sorted({int(p.argmin()), int(p.argmax()), experts // 2})
        for e in cells:
            note("share used", (low_E[e], high_E[e]), p[e])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--only", choices=MEASURES)
    args = parser.parse_args()
    measures = (args.only,) if args.only else MEASURES
    start = time.perf_counter()
    keys: list[str] = []
    for case in CASES:
        found = run(case, args.repeats, measures)
        if not keys:
            keys = list(found)
            print("| truth | E | documents | strength |", " | ".join(keys), "|")
            print("|---" * (len(keys) + 4) + "|")
        cells = [f"{100 * np.mean([hit for hit, _ in found[k]]):.0f}" for k in keys]
        widths = [f"{np.median([width for _, width in found[k]]):.2g}" for k in keys]
        shown = [f"{c} ({w})" for c, w in zip(cells, widths, strict=True)]
        print("|", " | ".join([*map(str, case), *shown]), "|", flush=True)
    print(f"\n{args.repeats} repeats, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
