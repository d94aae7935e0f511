"""How fast a stored trace is counted and analysed: `python benchmarks/reading.py [--json FILE]`.

Counting on one core from a warm file, against a hand-written script over a text log of the same
tokens; linearity in tokens; peak memory over a trace of `--large` GB; the whole of `stats` with
intervals on 1 million tokens x 48 layers x top-8.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import interleaved, ratios, report

import equipoise
from equipoise.capture.passes import RunSequence
from equipoise.capture.writer import sequences_batch
from equipoise.metrics.counting import count_ids
from equipoise.trace.batches import Rows, counts_batch, tokens_batch
from equipoise.trace.files import PartWriter
from equipoise.trace.schema import SEQUENCES_SCHEMA, Layer, Manifest, name_layers

LAYERS, EXPERTS, TOP_K, WINDOW, DOCUMENT = 48, 128, 8, 8192, 512


def make_trace(folder: Path, tokens: int, seed: int = 0) -> Path:
    """A trace of Qwen3-30B-A3B's shape with skewed random routing, documents of 512 tokens."""
    rng = np.random.default_rng(seed)
    layers = name_layers([Layer(i, f"model.layers.{i}", EXPERTS, TOP_K) for i in range(LAYERS)])
    writer_folder = folder
    writer_folder.mkdir()
    writer = PartWriter(writer_folder, Manifest(layers, level="ids"))
    skew_E = np.arange(EXPERTS) / EXPERTS
    ids = [
        np.argpartition(skew_E + rng.random((WINDOW, EXPERTS)) * 3, -TOP_K, 1)[:, -TOP_K:].astype(
            np.uint8
        )
        for _ in range(6)
    ]
    rows_of: dict[int, Any] = {}
    for window, start in enumerate(range(0, tokens, WINDOW)):
        count = min(WINDOW, tokens - start)
        number_T = (start + np.arange(count)) // DOCUMENT
        zeros_T = np.zeros(count, np.int64)
        chosen = [ids[(window + i) % len(ids)][:count] for i in range(LAYERS)]
        rows = Rows(
            number_T, np.arange(start, start + count) % DOCUMENT, zeros_T, zeros_T, zeros_T, chosen
        )
        key = (window % len(ids)) if count == WINDOW else -1
        if key not in rows_of:
            rows_of[key] = counts_batch(window, [rows], layers, [(None, None, None)])
        fresh = [RunSequence(int(n)) for n in np.unique(number_T[::DOCUMENT])]
        batch = sequences_batch(fresh)
        assert batch.schema.equals(SEQUENCES_SCHEMA)
        writer.write_window(rows_of[key], batch, [tokens_batch(rows, layers, "ids")])
    writer.close("complete")
    return folder


def write_text_log(trace: equipoise.Trace, path: Path, tokens: int) -> None:
    """A line per token and layer: layer, token, experts."""
    with path.open("w") as file:
        done = 0
        for batch in trace.batches("ids"):
            for layer, ids_TK in batch.ids.items():
                for token, experts in enumerate(ids_TK[: tokens - done].tolist(), done):
                    file.write(f"{layer} {token} {' '.join(map(str, experts))}\n")
            done += len(batch.sequence_T)
            if done >= tokens:
                return


def count_text_log(path: Path) -> dict[int, Counter[int]]:
    """The script that people write by hand over such a log."""
    counts: dict[int, Counter[int]] = {}
    with path.open() as file:
        for line in file:
            layer, _, *experts = map(int, line.split())
            counts.setdefault(layer, Counter()).update(experts)
    return counts


def seconds_of(call: Any, repeats: int) -> tuple[float, float]:
    """Median and best."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), min(times)


def in_cache(repeats: int) -> float:
    """Selections a second over one column of a window, again and again."""
    ids = np.random.default_rng(0).integers(0, EXPERTS, (WINDOW, TOP_K)).astype(np.uint8)
    counts_E = np.zeros(EXPERTS, np.int64)

    def count() -> None:
        for _ in range(500):
            count_ids(ids, EXPERTS, counts_E)

    count()
    return 500 * ids.size / seconds_of(count, repeats)[1]


PEAK = """
import resource, sys, equipoise
trace = equipoise.open(sys.argv[1])
trace.recount()
{work}
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""


def peak_bytes(path: Path, work: str = "") -> int:
    """Peak resident memory of a process that opens, counts, and does `work`."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK.format(work=work), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--large", type=float, default=10.0, help="GB of the large trace; 0 skips")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full = make_trace(folder / "full.trace", options.tokens)
        trace = equipoise.open(full)
        selections = options.tokens * LAYERS * TOP_K
        trace.recount()
        typical, best = seconds_of(trace.recount, options.repeats)
        rows.append(
            {
                "what": f"counting {selections / 1e6:,.0f} million stored selections, one core",
                "figure": f"{selections / typical / 1e9:.2f} thousand million a second"
                f" (best of {options.repeats}: {selections / best / 1e9:.2f})",
            }
        )
        ceiling = in_cache(options.repeats)
        rows.append(
            {
                "what": "the same loop over ids that lie in the cache: what this machine gave meanwhile",
                "figure": f"{ceiling / 1e9:.2f} thousand million a second",
            }
        )
        log, small = folder / "log.txt", 20_000
        write_text_log(trace, log, small)
        by_hand = count_text_log(log)
        assert sum(sum(c.values()) for c in by_hand.values()) == small * LAYERS * TOP_K
        slow, _ = seconds_of(lambda: count_text_log(log), 3)
        ratio = (slow / small) / (typical / options.tokens)
        rows.append(
            {
                "what": "times as fast as the hand-written script over a text log, per token",
                "figure": f"{ratio:,.0f}",
            }
        )
        half = equipoise.open(make_trace(folder / "half.trace", options.tokens // 2))
        turns = interleaved({"all": trace.recount, "half": half.recount}, options.repeats)
        grown = ratios(turns, "half")["all"][0]
        rows.append(
            {
                "what": "time for all tokens over time for half of them, in turns",
                "figure": f"{grown:.2f}",
            }
        )
        begin = time.perf_counter()
        from equipoise.diagnose.stats import stats

        stats(trace)
        first = time.perf_counter() - begin
        rows.append(
            {
                "what": f"full stats with intervals, {options.tokens:,} tokens x 48 x top-8",
                "figure": f"{first:.1f} s",
            }
        )
        if options.large:
            tokens = int(options.large * 1e9 / (LAYERS * TOP_K + 10))
            large = make_trace(folder / "large.trace", tokens)
            size = sum(f.stat().st_size for f in large.iterdir())
            rows.append(
                {
                    "what": f"peak memory of counting a trace of {size / 1e9:.1f} GB",
                    "figure": f"{peak_bytes(large) / 1e6:,.0f} MB",
                }
            )
            work = "from equipoise.diagnose.stats import stats; stats(trace)"
            rows.append(
                {
                    "what": "peak memory of full stats on it",
                    "figure": f"{peak_bytes(large, work) / 1e6:,.0f} MB",
                }
            )
    report("Reading a stored trace", rows, "python benchmarks/reading.py", options.json)


if __name__ == "__main__":
    main()
