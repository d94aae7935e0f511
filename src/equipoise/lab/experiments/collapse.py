"""Experiment 1: what becomes of the experts without balancing, and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipoise.lab import figures
from equipoise.lab.config import Config
from equipoise.lab.experiments.base import Experiment, Page, Results, first_seed, number, seeded
from equipoise.lab.recipes import gpu, small
from equipoise.lab.results import Result, smooth, starved, windows
from equipoise.metrics import load

WINDOW = 10
"""Steps that shares are summed over."""
STARVED = 0.01
"""Of a fair share: cells below count as starved."""
SWITCH = "switch(scope=global, weight=0.01)"


def configs(tier: str, seeds: int) -> list[Config]:
    """The base with and without the Switch loss; without it, one condition changed at a time."""
    base = small() if tier == "cpu" else gpu().change({"tokens": 50_000_000})
    base = base.change({"model.router": "softmax(weighting=scores)", "model.init_std": 0.02})
    conditions: dict[str, dict[str, object]] = {
        "no balancing": {},
        "Switch loss 0.01": {"balance": SWITCH},
        "router in bfloat16": {
            "model.router": "softmax(weighting=scores, precision=bfloat16)"
        },
        "learning rate x 4": {"optimizer.lr": 4 * base.optimizer.lr},
        "top-1": {"model.top_k": 1},
        "4 x the experts": {"model.experts": 4 * base.model.experts},
        "router weights x 10": {"model.router_std": 10 * base.model.router_std},
        "all weights x 3": {"model.init_std": 3 * base.model.init_std},
        "one domain at a time": {"data.arrangement": "domain", "micro_rows": base.data.block},
        "learning rate x 4, top-1, 4 x the experts": {
            "optimizer.lr": 4 * base.optimizer.lr, "model.top_k": 1,
            "model.experts": 4 * base.model.experts,
        },
    }  # fmt: skip
    return seeded([base.change({"name": n, **c}) for n, c in conditions.items()], seeds)


def write(page: Page, results: Results) -> None:
    """Table and figures."""
    page.heading("Result")
    page.table(
        (
            "run",
            "held-out loss",
            "MaxVio_global (chance)",
            "starved at 5 %, 20 %, 50 %, 100 % of training",
            "starved to the end: first layer, all",
            "recovered",
        ),
        [_row(name, run) for name, runs in results.items() for run in runs],
    )
    page.text(
        f"""Starved: share of the layer-expert cells with less than {STARVED:.0%} of a fair share of a
        window of {WINDOW} steps. Starved to the end: in every window of the last quarter. Recovered:
        of the cells starved in some window of the first half, the share that is not in the last
        window. Loss in nats per token, mean of the domains. MaxVio_global: busiest
        expert's selections over the mean, minus 1, on the held-out text, every domain weighing alike,
        mean over layers."""
    )
    first = first_seed(results)
    pair = {n: run for n, run in first.items() if n in ("no balancing", "Switch loss 0.01")}
    if pair:
        page.figure("shares", _SHARES, lambda path: _draw_shares(pair, path))
    page.text(*_findings(results))
    page.figure("over-time", _OVER_TIME, lambda path: _draw_over_time(first, path))


_SHARES = """Share of every expert of the first MoE layer and of the last over training, as in OLMoE's
figures 9 and 10 (seed 0)."""
_OVER_TIME = (
    """Starved cells and MaxVio of each step (mean of the last 10) over training (seed 0)."""
)


OLMOE = 0.75
"""Share of dead experts in OLMoE's figure, at least."""
NEAR = 0.05
"""Of the cells: a line drawn by eye, below which shares of one seed are not told apart."""
PLAIN = "no balancing"


def _findings(results: Results) -> list[str]:
    """What the table says, in words made from its numbers."""
    layers = {n: np.mean([permanence(r)[0] for r in runs], axis=0) for n, runs in results.items()}
    ends = {n: float(shares_L.mean()) for n, shares_L in layers.items()}
    without = {n: v for n, v in ends.items() if n != "Switch loss 0.01"}
    if not without:
        return []
    told = "; ".join(
        f"{n}: {100 * without[n]:.0f} %" for n in sorted(without, key=without.__getitem__)
    )
    early = [
        starved(run.counts, STARVED, WINDOW)[int(0.05 * (len(run.counts) // WINDOW))]
        for name in without
        for run in results[name]
    ]
    low, high = (100 * edge(early) for edge in (min, max))
    most = max(without, key=without.__getitem__)
    found = [
        f"""In OLMoE's figure, of its first MoE layer, all but one or two of eight experts die, 75 % or more.
        Here most starve to the end with {most}: {_listed(layers[most])} of the experts of its layers, first
        to last, {100 * ends[most]:.0f} % in all, {_reproduced(ends[most])}.""",
        f"""Without balancing, {low:.0f} % to {high:.0f} % of the cells are starved after 5 % of training.
        Starved to the end, from least to most: {told}.""",
    ]
    if len(without) > 1 and PLAIN in without:
        found.append(_conditions(without))
    if "Switch loss 0.01" in ends:
        found.append(f"With the Switch loss: {100 * ends['Switch loss 0.01']:.0f} %.")
    return [" ".join(found)]


def _listed(shares_L: NDArray[np.float64]) -> str:
    return ", ".join(f"{100 * share:.0f} %" for share in shares_L)


def _reproduced(share: float) -> str:
    """Whether so many starve as die in OLMoE's figure."""
    if abs(share - OLMOE) <= NEAR:
        return "about as many as in that figure"
    return "more than in that figure" if share > OLMOE else "fewer than in that figure"


def _conditions(ends: dict[str, float]) -> str:
    """Which conditions starve more cells to the end than none, which fewer, and which as many."""
    kinds: dict[str, list[str]] = {"more": [], "fewer": [], "about as many": []}
    for name, share in ends.items():
        if name != PLAIN:
            more = share - ends[PLAIN]
            kind = "about as many" if abs(more) <= NEAR else "more" if more > 0 else "fewer"
            kinds[kind].append(name)
    told = ". ".join(
        f"{kind.capitalize()}: {'; '.join(names)}" for kind, names in kinds.items() if names
    )
    return f"Against {PLAIN}, where up to {100 * NEAR:.0f} percentage points count as none. {told}."


def _row(name: str, run: Result) -> tuple[str, ...]:
    path = starved(run.counts, STARVED, WINDOW)
    at = [path[min(len(path) - 1, int(s * len(path)))] for s in (0.05, 0.2, 0.5, 1.0)]
    always_L, recovered = permanence(run)
    return (
        name if run.seed == 0 else f"{name}, seed {run.seed}",
        number(run.final.loss, 3),
        f"{number(run.final.max_vio)} ({number(run.final.max_vio_floor(run.config.model.top_k), 3)})",
        ", ".join(f"{100 * value:.0f} %" for value in at),
        f"{100 * always_L[0]:.0f} %, {100 * always_L.mean():.0f} %",
        "–" if recovered != recovered else f"{100 * recovered:.0f} %",
    )


def permanence(run: Result) -> tuple[NDArray[np.float64], float]:
    """Share of each layer's experts starved throughout the last quarter, [L]; share of the early starved
    that recover."""
    low_WLE = np.asarray(load.ratio(windows(run.counts, WINDOW))) < STARVED
    always_L: NDArray[np.float64] = low_WLE[-max(1, len(low_WLE) // 4) :].all(0).mean(1)
    early = low_WLE[: len(low_WLE) // 2].any(0)
    recovered = (~low_WLE[-1][early]).mean() if early.any() else np.nan
    return always_L, float(recovered)


def _draw_shares(runs: dict[str, Result], path: Path) -> None:
    figure, axes = figures.canvas(2, len(runs))
    for row, (name, run) in zip(axes, runs.items(), strict=True):
        shares_WLE = np.asarray(load.share(windows(run.counts, WINDOW)))
        tokens = run.tokens[WINDOW - 1 :: WINDOW][: len(shares_WLE)] / 1e6
        for axis, layer, where in ((row[0], 0, "first"), (row[1], -1, "last")):
            title = f"{name}: {where} MoE layer"
            figures.shares(axis, tokens, shares_WLE[:, layer], title=title)
    figures.save(figure, path)


def _draw_over_time(runs: dict[str, Result], path: Path) -> None:
    figure, axes = figures.canvas(2, height=4.4)
    cells, loads = {}, {}
    for name, run in runs.items():
        low = starved(run.counts, STARVED, WINDOW)
        cells[name] = (run.tokens[WINDOW - 1 :: WINDOW][: len(low)] / 1e6, 100 * low)
        loads[name] = (run.tokens / 1e6, smooth(run.max_vio_batch, WINDOW))
    x = "million tokens"
    figures.lines(axes[0, 0], cells, title="starved cells", x=x, y="% of layer-expert cells")
    figures.lines(axes[0, 1], loads, title="MaxVio of a step", x=x, y="MaxVio", log=True)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


EXPERIMENT = Experiment(
    "collapse",
    "Collapse without balancing",
    """Published (OLMoE, arXiv 2409.02060, figures 9 and 10, 8 experts of the first MoE layer, 10 B
    tokens, read from the plot): without a balancing loss one expert takes about all tokens from 0.1 B
    to 1 B tokens, a second then rises, and six of eight are dead at 10 B; with it (weight 0.01) all
    are near 12.5 % from 0.1 B on. Validation loss at 10 B is about 0.07 (C4) to 0.09 (Pile) nats
    lower with it.""",
    configs,
    write,
    (
        """that an expert without tokens here stays without them: these runs end before the first point of
        OLMoE's figure (0.1 B tokens);""",
        """that balancing raises or lowers the loss: one run of so few tokens a row cannot tell, and
        with few tokens, concentrating them on few experts trains those more;""",
        """the size or the order of the conditions' effects: one seed unless more are listed, which does
        not tell figures apart that are a few percent of the cells from one another; and a condition changes
        more than its name where it has to (more experts are more parameters, top-1 is less compute,
        the last row changes three things).""",
    ),
    timed=False,
)
