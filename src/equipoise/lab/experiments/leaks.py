"""The part of `remedies` on routers that look at later tokens: what the look is worth to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from equipoise.lab import figures
from equipoise.lab.experiments.base import Page, average, number, signed
from equipoise.lab.leak import Leak
from equipoise.lab.results import Result, mean_interval
from equipoise.lab.terms import one

Runs = Mapping[str, Sequence[Result]]
Way = Literal["other_future", "causal"]


def looks_ahead(run: Result) -> bool:
    """Whether its layers look at later tokens, so that its loss as trained is no loss of generation."""
    return run.final.leak is not None


def _leak(run: Result) -> Leak:
    assert run.final.leak is not None
    return run.final.leak


def gap(runs: Sequence[Result], way: Way) -> tuple[float, float]:
    """How much more a way costs than as trained, and half its 95 % interval.

    The interval is over seeds where there are several, else over rows of text.
    """
    found = [_leak(run).gap(way) for run in runs]
    return mean_interval([value for value, _ in found]) if len(found) > 1 else found[0]


def chunk(run: Result) -> tuple[int, bool] | None:
    """Tokens that expert choice chooses among, and whether they are shuffled; None for others."""
    config = run.config
    call = one(config.model.router)
    options = dict(call.options)
    whole = config.micro_rows * config.data.row_length
    if call.name != "expert_choice":
        return None
    return int(options.get("chunk") or whole), bool(options.get("shuffle"))


def write(page: Page, runs: Runs, plain: Sequence[Result] | None = None) -> None:
    """Table, findings and figure; nothing where no such run is finished.

    plain: the runs that step times are compared with.
    """
    if not runs:
        return
    runs = dict(sorted(runs.items(), key=lambda item: _place(item[1][0])))
    page.heading("Routers that look at later tokens")
    page.table(_HEAD, [_row(page, name, found, plain) for name, found in runs.items()])
    page.text(_READING, *_findings(runs))
    if any(chunk(found[0]) for found in runs.values()):
        page.figure("leak", _FIGURE, lambda path: _draw(runs, path))


_HEAD = (
    "run",
    "loss as trained",
    "with another text to come: more by",
    "causal: more by",
    "loss of the evaluated text, causal",
    "MaxVio_global, causal (chance)",
    "MaxVio of a training step",
    "experts a token, causal",
    "tokens that no expert chose in training",
    "step time, of no balancing",
)
_READING = """These losses stand in no ranking with those above. As trained: some held-out rows in
passes of all domains, experts choosing or mixing as in training. With another text to come: the same,
but what follows the token that is predicted is replaced by the text of another row of its domain.
Chunks, numbers and the kind of the competing tokens are as in training, and only what they tell of
the text to come is gone, but for its domain: **what the loss rises by is the leak**, or the larger
part of it. Causal: what generation can do.
Expert choice gives each token by itself to the experts whose threshold it exceeds, a running average
of the score that K / E of the training tokens exceeded (in training all choose as many, so that no
expert starves; the tokens that none chose are of the last tenth of it, mean over layers); soft MoE
sees the tokens up to the one it predicts from. What the causal loss rises by holds the leak and what
it costs to route otherwise than in training. Intervals of 95 %, over rows, or over seeds where there
are several."""
_FIGURE = """The leak, and the losses as trained and causal, by the number of tokens among which an
expert chooses (95 % intervals as in the table)."""


def _place(run: Result) -> tuple[bool, bool, int]:
    found = chunk(run)
    return (True, False, 0) if found is None else (False, found[1], -found[0])


def _row(
    page: Page, name: str, runs: Sequence[Result], plain: Sequence[Result] | None
) -> tuple[str, ...]:
    run, final = runs[0], runs[0].final
    choosing = chunk(run) is not None
    floor = final.max_vio_floor(run.config.model.top_k)
    trained = float(np.mean([_leak(r).as_trained.mean() for r in runs]))
    return (
        name,
        number(trained, 3),
        _said(gap(runs, "other_future")),
        _said(gap(runs, "causal")),
        average([r.final.loss for r in runs], 3) if choosing else "–",
        f"{average([r.final.max_vio for r in runs])} ({number(floor, 3)})" if choosing else "–",
        average([r.max_vio_end for r in runs]) if choosing else "–",
        average([r.final.experts_per_token for r in runs]) if choosing else "–",
        unchosen(runs),
        page.step_time(run, plain),
    )


def unchosen(runs: Sequence[Result]) -> str:
    """Tokens without an expert, in percent; a dash where all have as many, or it was not counted."""
    share = float(np.mean([r.unchosen_share for r in runs]))
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def _said(found: tuple[float, float]) -> str:
    return f"{signed(found[0])} ± {found[1]:.3f}"


def _findings(runs: Runs) -> list[str]:
    """What the table says of the leak, in words made from its numbers."""
    leaks = {name: gap(found, "other_future") for name, found in runs.items()}
    sure = [n for n, (value, half) in leaks.items() if value - half > 0]
    below = [n for n, (value, half) in leaks.items() if value + half < 0]
    unsure = [n for n in leaks if n not in sure and n not in below]
    told = []
    if sure:
        told.append("A leak above 0 beyond its interval: " + _listed(sure, leaks) + ".")
    if unsure:
        told.append("None that its interval tells from 0: " + _listed(unsure, leaks) + ".")
    if below:
        told.append("A loss that falls, beyond its interval: " + _listed(below, leaks) + ".")
    sizes = {chunk(found[0]): name for name, found in runs.items()}
    for key, name in sizes.items():
        other = sizes.get((key[0], True)) if key is not None and not key[1] else None
        if key is not None and other is not None:
            (plain, a), (shuffled, b) = leaks[name], leaks[other]
            more, half = shuffled - plain, float(np.hypot(a, b))
            verdict = "beyond its interval" if abs(more) > half else "within its interval"
            told.append(
                f"Shuffled, chunks of {key[0]} leak {abs(more):.3f} ± {half:.3f} nats "
                f"{'more' if more > 0 else 'less'}, {verdict} (of two leaks taken as independent)."
            )
    return [" ".join(told)]


def _listed(names: Sequence[str], leaks: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} ({_said(leaks[name])})" for name in names)


def _draw(runs: Runs, path: Path) -> None:
    figure, axes = figures.canvas(2, width=9.0, height=3.4)
    marks: tuple[tuple[bool, str, str], ...] = (
        (False, "in order", "-"),
        (True, "shuffled", "--"),
    )
    sizes = set()
    for number_, (shuffled, label, dashes) in enumerate(marks):
        mine: dict[int, Sequence[Result]] = {}
        for found in runs.values():
            key = chunk(found[0])
            if key is not None and key[1] == shuffled:
                mine[key[0]] = found
        xs = sorted(mine)
        sizes |= set(xs)
        style: dict[str, Any] = {"color": figures.COLOURS[number_], "linestyle": dashes}
        gaps = [gap(mine[x], "other_future") for x in xs]
        values, halves = [v for v, _ in gaps], [h for _, h in gaps]
        axes[0, 0].errorbar(xs, values, halves, marker="o", capsize=3, label=label, **style)
        for way, mark in (("as_trained", "o"), ("causal", "^")):
            losses = [np.mean([getattr(_leak(r), way).mean() for r in mine[x]]) for x in xs]
            name = f"{way.replace('_', ' ')}, {label}"
            axes[0, 1].plot(xs, losses, marker=mark, label=name, **style)
    axes[0, 0].axhline(0, color="#888888", linewidth=0.9)
    axes[0, 0].set(title="leak", ylabel="nats per token")
    axes[0, 1].set(title="held-out loss", ylabel="nats per token")
    for axis in axes[0]:
        axis.set(xlabel="tokens that an expert chooses among", xscale="log")
        axis.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figures.save(figure, path)
