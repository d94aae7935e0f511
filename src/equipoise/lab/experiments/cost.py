"""Experiment 6: what imbalance costs in step time and memory, under expert parallelism."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.cost import figures, timing
from equipoise.lab.cost.imposed import profiles
from equipoise.lab.cost.lines import BALANCED, FITTED, Lines, device_rows
from equipoise.lab.cost.model import busiest, interval
from equipoise.lab.cost.points import DEVICES, Points
from equipoise.lab.experiments import cost_devices
from equipoise.lab.experiments.base import Experiment, Page, Results, number
from equipoise.lab.recipes import gpu, small

ROUNDS = 16
FEWEST = 3
"""Rounds that intervals take."""
MB = 1e6


def setting(tier: str) -> Config:
    """The model and the tokens of a step. CPU tier: experts wide enough to be most of the step."""
    base = small() if tier == "cpu" else gpu()
    values: dict[str, object] = {"name": "cost", "expert_parallel": True, "model.router": "random"}
    if tier == "cpu":
        values |= {"model.layers": 2, "model.expert_size": 256}
    return base.change({**values, "batch_rows": DEVICES * base.micro_rows})


def measure(runs: Path, tier: str, say: timing.Say) -> None:
    """Measure what is missing of a tier's points."""
    if tier == "gpu" and torch.cuda.device_count() < DEVICES:
        raise EquipoiseError(
            f"'cost' --tier gpu shares experts out over {DEVICES} GPUs, and torch sees "
            f"{torch.cuda.device_count()}: NCCL takes one process for each. Use --tier cpu."
        )
    config, path = setting(tier), file_of(runs, "cost" if tier == "cpu" else f"cost-{tier}")
    asked = profiles(config.model.experts, config.model.top_k)
    points = Points.begin(path, config, "cuda" if tier == "gpu" else "cpu", asked)
    timing.measure(points, path, ROUNDS, say)


def file_of(runs: Path, page: str) -> Path:
    """Where a page's points are kept."""
    return runs / f"{page}.json"


def write(page: Page, _: Results) -> None:
    """Tables and figures, from the points in the folder of runs."""
    path = file_of(page.runs, page.name)
    points = Points.read(path)
    if len(points.rounds) < FEWEST or not points.sizes:
        raise EquipoiseError(
            f"{path} holds {len(points.rounds)} rounds; the page takes {FEWEST}: run it without "
            "--redraw."
        )
    found = Lines.of(points)
    _setup(page, points)
    _times(page, found)
    _memory(page, found)
    page.figure("points", _POINTS, lambda out: figures.draw_points(found, out))
    cost_devices.write(page, found.share())


def _setup(page: Page, points: Points) -> None:
    config, made = points.settings, points.environment
    model, tokens = config.model, config.micro_rows * config.data.row_length
    page.heading("What was measured")
    page.text(
        f"""`equipoise lab cost{" --tier gpu" * (points.device == "cuda")}`: a training step (forward,
        backward, clipping, AdamW) of two processes that share out the experts, each with {tokens:,}
        tokens drawn at random: {model.layers} layers, width {model.hidden_size}, {model.experts}
        experts of width {model.expert_size}, top-{model.top_k}; the first half of the experts on the
        first device. The router's selections are replaced by ones with an imposed load, exact in
        every layer of every step: a share of all selections on the first device, evenly over its
        experts or with one of them hot. {len(points.profiles)} profiles take turns within each of
        {len(points.rounds)} rounds, in an order drawn for each round; a turn is one step that is not
        timed and {len(points.rounds[0][BALANCED])} that are, of which the median counts. Brackets:
        95 % intervals, bootstrapped over rounds; ratios are medians of each round's ratio, which is not
        the ratio of the medians."""
    )
    busy = ", ".join(f"{load:g}" for load in points.load_averages) or "not known"
    threads = "" if made["gpu"] else f", {config.threads} thread a process of {made['cpus']} cores"
    page.text(
        f"""Machine: {made["gpu"] or made["processor"]}{threads}; its load average before each start:
        {busy} (mean of the minute before: of other programs, which may have taken time too). Commits:
        {", ".join(points.commits)} (+: with changes that were not committed). Torch
        {made["versions"]["torch"]}. The points are in
        `runs/{page.name}.json`; `--redraw` makes this page from them."""
    )


def _times(page: Page, found: Lines) -> None:
    page.heading("Step time")
    head = ("first device, its experts", "MaxVio of the experts", "busier device, fair shares",
            "ms a step", "of balanced", "line, ms", "error", "processor ms of each")  # fmt: skip
    page.table(head, [_time_row(found, name) for name in found.points.profiles])
    line, (share, low, high) = found.time, found.share()
    page.text(
        f"""The line: {1e3 * line.base:.0f} ms, and {1e6 * line.slope:.2f} ms for each thousand rows
        (selections of a token, summed over layers) of the busier device, fitted to the three points
        marked "fitted" and checked on the others. What scales with that load is {100 * share:.0f} %
        [{100 * low:.0f}, {100 * high:.0f}] of a balanced step. A fair share here is
        {found.fair:,.0f} rows.""",
        *findings(found),
    )
    if found.points.device == "cpu":
        share, low, high = found.share(worked=True)
        page.text(
            f"""Processor time is what a process computes, without what it waits; other programs
            lengthen it less. Of that of the busier process, {100 * share:.0f} %
            [{100 * low:.0f}, {100 * high:.0f}] of a balanced step scales with its load."""
        )


def _time_row(found: Lines, name: str) -> tuple[str, ...]:
    points = found.points
    times, balanced = points.seconds(name), points.seconds(BALANCED)
    line = found.time.at(found.rows[name])
    ms = [1e3 * value for value in interval(times)]
    ratio = interval(times / balanced)
    return (
        name,
        number(points.max_vio(name)),
        number(float(busiest(points.counts(name), DEVICES))),
        f"{ms[0]:.0f} [{ms[1]:.0f}, {ms[2]:.0f}]",
        "1" if name == BALANCED else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
        f"{1e3 * line:.0f}",
        "fitted" if name in FITTED else _error(line, found.seconds(name)),
        ", ".join(f"{1e3 * value:.0f}" for value in np.median(points.worked(name), axis=0)),
    )


def _error(told: float, seen: float) -> str:
    return f"{100 * (told / seen - 1):+.1f} %"


def findings(found: Lines) -> list[str]:
    """What the times say, in words made from them."""
    points = found.points
    errors = [abs(found.time.at(found.rows[n]) / found.seconds(n) - 1) for n in found.checked]
    inside = [
        low <= found.time.at(found.rows[n]) <= high
        for n in found.checked
        for _, low, high in [interval(points.seconds(n))]
    ]
    hot = "50 %, one hot"
    ratio = interval(points.seconds(hot) / points.seconds(BALANCED))
    slowest = interval(points.seconds("100 %, one hot") / points.seconds(hot))
    full = interval(points.seconds("100 %, even") / points.seconds(BALANCED))
    return [
        f"""On the {len(errors)} points that it was not fitted to, the line is off by
        {100 * np.mean(errors):.1f} % in the mean and {100 * max(errors):.1f} % at most, and inside the
        measured interval on {sum(inside)}. MaxVio of the experts does not tell the
        time: the profiles with one hot expert have the same, and all on one device take
        {slowest[0]:.2f} [{slowest[1]:.2f}, {slowest[2]:.2f}] times as long as evenly on both.""",
        f"""With MaxVio {points.max_vio(hot):.2f} but devices loaded alike, a step takes
        {_times_longer(ratio)}; with MaxVio {points.max_vio("100 %, even"):.2f} and all on one device,
        {_times_longer(full)}.""",
    ]


def _times_longer(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] times that of balance"


def _memory(page: Page, found: Lines) -> None:
    page.heading("Memory and bytes")
    head = ("first device, its experts", "peak MB, first and second device",
            "line, larger of the two", "error", "MB sent in a step, by each",
            "largest message, MB")  # fmt: skip
    page.table(head, [_memory_row(found, name) for name in found.points.profiles])
    points, line = found.points, found.memory
    light = [
        abs(line.at(float(device_rows(points, n).min())) / min(points.sizes[n].peak_bytes) - 1)
        for n in points.profiles
        if n.partition(",")[0] != BALANCED.partition(",")[0]
    ]
    how = (
        "torch.cuda.max_memory_allocated"
        if points.device == "cuda"
        else "all that torch's allocator took and gave back, as its profiler notes it"
    )
    page.text(
        f"""Peak: a step's largest moment above the {max(points.sizes[BALANCED].held_bytes) / MB:.1f} MB
        of weights and optimizer state that each process holds between steps ({how}; gradients are
        made in the step; buffers of the communication library are not in it): the highest of
        {timing.PEAKS} steps, which differ by a message that is let go of sooner or later. The
        line, {line.base / MB:.1f} MB and {1e3 * line.slope / MB:.2f} MB for each thousand
        rows, is fitted to the same three points; at the rows of the lighter device, which it was not
        fitted to either, it is off by up to {100 * max(light):.0f} %.""",
        """Bytes are counted at every all-to-all of the experts, forward and backward. With two devices
        and as many tokens on each, what one sends in dispatch the other sends in return, so that the
        sum over a step does not depend on the load; the largest message does. The gradients of the
        weights outside the experts, reduced in every step alike, are not in it.""",
    )


def _memory_row(found: Lines, name: str) -> tuple[str, ...]:
    sizes = found.points.sizes[name]
    line = found.memory.at(found.rows[name])
    sent = [sum(bytes_P) / MB for bytes_P in sizes.sent_bytes]
    return (
        name,
        ", ".join(f"{peak / MB:.1f}" for peak in sizes.peak_bytes),
        f"{line / MB:.1f}",
        "fitted" if name in FITTED else _error(line, max(sizes.peak_bytes)),
        ", ".join(f"{value:.2f}" for value in sent),
        f"{max(sizes.largest_bytes) / MB:.2f}",
    )


_POINTS = """Step time against the load of the busier device and against MaxVio of the experts, with 95 %
intervals over rounds; peak memory (the highest of 3 steps, without interval). Lines are fitted to the
three filled points; points with one hot expert are drawn a little to the right of their load."""

EXPERIMENT = Experiment(
    "cost",
    "What imbalance costs",
    """Published (DeepSeekMoE, arXiv 2401.06066, section 3.3): beside the balance of the experts, that
    of the devices has a loss of its own, over groups of experts, one for each device. What imbalance
    costs in time and memory is not given there. In a 43B model (2501.11873) a step took 1.55 s with load
    balanced over 8 sequences and 1.64 s over the buffer of 128: about 1 % for communication, the rest for
    the imbalance within a micro-batch, without a figure for that imbalance to set beside ours.""",
    lambda tier, seeds: [],
    write,
    (
        """what communication takes: both processes are on one machine and copy through its memory, so
        that the time of an all-to-all, and how it grows with imbalance, is in both parts of the line
        and cannot be told from computing; with two devices the largest message grows with the busier
        device's load;""",
        """times on other machines: the share of a step that scales with load depends on the width of
        the experts, the tokens and the hardware, and is that of one small model here;""",
        """what N devices take: the table is arithmetic on that share. It leaves out the network, launch
        latency, overlap of communication and computing, capacity limits (which bound the load by
        dropping), copies of busy experts, and that few rows an expert are computed less well;""",
        """anything from step times on a machine that was busy with other programs: processes that
        share its cores with them lose the difference, as the one that waits leaves its core to the
        other;""",
        """that small differences between profiles of equal device load are noise, or are not: the
        intervals are of one start on one machine.""",
    ),
    measure,
)
