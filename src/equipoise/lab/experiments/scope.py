"""Experiment 3: over which tokens load is balanced (Qiu et al., arXiv 2501.11873)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equipoise.lab import figures
from equipoise.lab.config import Config
from equipoise.lab.experiments.base import (
    Experiment,
    Page,
    Results,
    average,
    first_seed,
    number,
    seeded,
    signed,
)
from equipoise.lab.recipes import gpu, small
from equipoise.lab.results import (
    Result,
    largest_domain_share,
    specialisation,
)

SIZES = (2, 4, 8, 16, 32, 64)
"""Rows of a micro-batch, over which scope "micro" balances."""
LONGER = (128, 256, 512)
"""Rows of past steps, decayed, that the micro-batch is balanced with."""

PROCESSES = (2, 4, 8)
"""That add up their counts, each of micro-batches of a block."""
SUBSET = "random subset, 8 processes"
"""The published shuffle control: as many random tokens as one process has."""
PUBLISHED = (
    (
        "synchronised over 32 sequences, against 4",
        8.062,
        8.167,
        "synchronised, 4 processes",
        "micro 8",
    ),
    ("synchronised over 512, against 4", 8.038, 8.167, "exact", "micro 8"),
    ("a random subset of the global batch, against 4", 8.041, 8.167, SUBSET, "micro 8"),
    ("buffer, against synchronised (128)", 7.199, 7.214, "global", "synchronised, 8 processes"),
    (
        "from the middle over 512, against 2",
        7.322,
        7.383,
        "micro, from the middle global",
        "micro 8",
    ),
    (
        "from the middle over 2, against 512",
        7.373,
        7.199,
        "global, from the middle micro",
        "global",
    ),
    ("an eighth of the weight (4)", 8.159, 8.167, "micro 8, weight 0.01", "micro 8"),
    ("1 % of a micro loss beside the buffer", 5.795, 5.779, "global, and 1 % micro", "global"),
    ("a bias by 512, against 4", 8.080, 8.521, "sign bias, global", "sign bias, micro"),
    ("a bias by 512, against a loss over 512", 8.080, 8.038, "sign bias, global", "exact"),
)
"""What is compared, its two perplexities in the paper, and the two runs here that are nearest to it."""


def configs(tier: str, seeds: int) -> list[Config]:
    """Balance batches by size, over processes and by buffer, with controls; micro-batches of one domain."""
    base = small() if tier == "cpu" else gpu()
    block = base.data.block
    base = base.change(
        {
            "evaluation_tokens": 100_000,
            "data.arrangement": "domain",
            "micro_rows": block,
        }
    )
    half = base.steps // 2
    early = f"constant_then_zero(rate=0.1, steps={half})"
    late = f"zero_then_constant(rate=0.1, steps={half})"
    runs: dict[str, dict[str, object]] = {
        "none": {},
        f"micro {block}": {"balance": _loss("micro")},
        "global": {"balance": _loss("global")},
        f"micro {block}, mixed domains": {
            "balance": _loss("micro"), "data.arrangement": "mixed"
        },
        "micro 64": {"balance": _loss("micro"), "micro_rows": 64},
        "micro 2": {"balance": _loss("micro"), "micro_rows": 2},
        f"micro {block}, weight 0.01": {"balance": _loss("micro", 0.01)},
        "global, weight 0.01": {"balance": _loss("global", 0.01)},
        "micro 4": {"balance": _loss("micro"), "micro_rows": 4},
        "micro 16": {"balance": _loss("micro"), "micro_rows": 16},
        "micro 32": {"balance": _loss("micro"), "micro_rows": 32},
        **{
            _synchronised(n): {"balance": _loss("group"), "processes": n} for n in PROCESSES
        },
        SUBSET: {"balance": _loss("subset"), "processes": PROCESSES[-1]},
        "exact": {"balance": _loss("exact")},
        "previous": {"balance": _loss("previous")},
        "running": {"balance": _loss("running")},
        **{_longer(n): {"balance": _past(n, base.batch_rows)} for n in LONGER},
        "global, micro-batches of 2": {"balance": _loss("global"), "micro_rows": 2},
        "micro, from the middle global": {
            "balance": f"switch(scope=micro, weight={early}) + switch(scope=global, weight={late})"
        },
        "global, from the middle micro": {
            "balance": f"switch(scope=global, weight={early}) + switch(scope=micro, weight={late})"
        },
        "global, and 1 % micro": {"balance": f"{_loss('global')} + {_loss('micro', 0.001)}"},
        "sign bias, global": {"balance": "sign(rate=0.01)", "model.router": "sigmoid"},
        "sign bias, micro": {
            "balance": "sign(rate=0.01, scope=micro)", "model.router": "sigmoid"
        },
    }  # fmt: skip
    if tier == "gpu":
        kept = (
            f"micro {block}",
            "global",
            "exact",
            f"micro {block}, mixed domains",
        )
        runs = {name: runs[name] for name in kept}
    return seeded([base.change({"name": n, **c}) for n, c in runs.items()], seeds)


def _loss(scope: str, weight: float = 0.1) -> str:
    return f"switch(scope={scope}, weight={weight:g})"


def _synchronised(processes: int) -> str:
    return f"synchronised, {processes} processes"


def _longer(rows: int) -> str:
    return f"running, {rows} rows"


def _past(rows: int, step_rows: int) -> str:
    """Balancing with past steps whose decayed rows add up to `rows`: step_rows (d + d^2 + ...)."""
    return _loss(f"running(decay={rows / (rows + step_rows):.4f})")


def write(page: Page, results: Results) -> None:
    """Tables and figures."""
    first_rows = (
        "none",
        *(f"micro {n}" for n in SIZES),
        *map(_synchronised, PROCESSES),
        SUBSET,
        "exact",
        "previous",
        *map(_longer, LONGER),
        "running",
    )
    order = [n for n in first_rows if n in results] + [n for n in results if n not in first_rows]
    results = {name: results[name] for name in order}
    timed = "none" if "none" in results else order[0]
    page.heading("Result")
    page.table(
        (
            "scope",
            "held-out loss",
            "MaxVio_global (chance)",
            "MaxVio_batch at the end",
            "specialisation (Jensen-Shannon, nats)",
            "largest share in a domain",
            "selected scores, sum",
            f"step time, of {'no balancing' if timed == 'none' else timed}",
        ),
        [_row(page, name, list(runs), results[timed]) for name, runs in results.items()],
    )
    page.text(READING)
    page.step_times(f"`{timed}` in micro-batches of {results[timed][0].config.micro_rows} rows")
    page.bullets(*findings(results))
    _beside_published(page, results)
    first = first_seed(results)
    page.heading("Perplexity of each domain")
    names = next(iter(results.values()))[0].final.domains
    page.table(
        ("scope", *names),
        [
            (name, *(number(float(np.exp(x))) for x in run.final.losses))
            for name, run in first.items()
        ],
    )
    if any(len(runs) > 1 for runs in results.values()):
        page.text("Of seed 0.")
    page.figure("size", _SIZE, lambda path: _draw_size(first, path))
    if any(name in first for name in _SHOWN):
        page.figure("frequency", _FREQUENCY, lambda path: _draw_frequency(first, path))


READING = """Scope `micro n`: the Switch loss (weight 0.1 unless said) over a micro-batch of n rows, which
come from one domain up to 8 rows, and from n / 8 domains, drawn anew each step, above. `synchronised`: so
many processes have a micro-batch of 8 rows each at a time and add up its counts, as published: the rows
and the arithmetic of `micro` 16, 32 and 64 in other passes. `random subset`: the published shuffle
control, of the 64 rows of 8 processes as many random tokens as one of them has. `global`: the rolling
buffer over the micro-batches of a step, as published: each is balanced with those before it, the first by
itself. `exact`: counted over the whole step before it, so that it is `micro 64` in smaller passes, and
what the two differ by is rounding, grown over the run: one draw of it, so that differences of that size,
or a few times it, mean nothing. `previous`: the counts of the step before, `running`: of past steps with
a decay of 0.9 a step, or so decayed that as many rows as the name says are left, each with the
micro-batch itself, both without a second pass. Mixed domains: micro-batches of 8 rows with one of every
domain, more even than random subsets. Specialisation: generalised Jensen-Shannon divergence of the
domains' expert shares. Selected scores: mean sum of a token's top-k, which compares rows of one router
only: the biases have a sigmoid's, the others a softmax's. Losses in nats per token, mean of the domains;
MaxVio_batch: mean of the last tenth of the steps. With several seeds means and 95 % intervals."""
_SIZE = """Specialisation and held-out loss against the rows over which load is balanced: those of a
micro-batch or of several processes, and those that are left of past steps; the dashed line is the buffer
of a step (seed 0)."""
_FREQUENCY = """Share of every expert by domain in the middle MoE layer; a fair share is one part
in as many as there are experts; dark is 0, bright 0.3 or more (seed 0)."""


def findings(results: Results) -> list[str]:
    """What the table says of specialisation, in words made from its numbers (seed 0)."""
    first = first_seed(results)
    special = {name: specialisation(run.final) for name, run in first.items()}
    sizes = [(n, special[f"micro {n}"]) for n in SIZES if f"micro {n}" in special]
    found = []
    if len(sizes) > 1:
        told = ", ".join(f"{value:.3f} over {n}" for n, value in sizes)
        found.append(f"Specialisation by the rows that are balanced over: {told}.")
    pairs = [(_synchronised(n), f"micro {8 * n}") for n in PROCESSES]
    beside = [
        f"{ours} {special[ours]:.3f} (loss {first[ours].final.loss:.3f}), {theirs} "
        f"{special[theirs]:.3f} ({first[theirs].final.loss:.3f})"
        for ours, theirs in pairs
        if {ours, theirs} <= special.keys()
    ]
    if beside:
        found.append(
            "Counts added up by processes, beside micro-batches of as many rows, which differ by rounding "
            f"alone: {'; '.join(beside)}."
        )
    if {"exact", "micro 64"} <= special.keys():
        found.append(
            f"Rounding alone: `exact` and `micro 64` differ by "
            f"{abs(special['exact'] - special['micro 64']):.3f} in specialisation and by "
            f"{abs(first['exact'].final.loss - first['micro 64'].final.loss):.3f} nats in loss."
        )
    found += _against(
        special, "micro 8", "global", "That a global loss lets experts specialise more (weight 0.1)"
    )
    found += _against(
        special,
        "micro 8, weight 0.01",
        "global, weight 0.01",
        "That it does at a weight of 0.01, too (published: 0.008)",
    )
    found += _against(
        special,
        "global",
        "exact",
        "That the buffer, whose first micro-batches stand alone, lets them specialise less than counts "
        "of the whole step",
    )
    control = "micro 8, mixed domains"
    found += _against(
        special,
        "micro 8",
        control,
        "That the diversity of the tokens counts (specialisation; a row of every domain)",
    )
    found += _against(special, "micro 8", SUBSET, "That it does as published, too (random subset)")
    found += _against(
        {n: run.final.max_vio for n, run in first.items()}, "sign bias, global", "sign bias, micro",
        "That a bias balances worse by micro-batches (MaxVio_global; the signs of unlike micro-batches "
        "cancel, so that it also moves less in a step)",
    )  # fmt: skip
    return found or ["A comparison takes more than one scope."]


def _against(values: dict[str, float], low: str, high: str, claim: str) -> list[str]:
    """Whether a claim's direction shows: `high` above `low` by more than a tenth."""
    if low not in values or high not in values:
        return []
    said = "shows" if values[high] > 1.1 * values[low] else "does not show"
    return [
        f"{claim} {said} here by more than a tenth, in one seed: {low} {values[low]:.3f}, "
        f"{high} {values[high]:.3f}."
    ]


def _beside_published(page: Page, results: Results) -> None:
    """What perplexity changed by in the paper, and between the runs nearest to it."""
    loss = {name: np.mean([r.final.loss for r in runs]) for name, runs in results.items()}
    rows = [
        (what, f"{theirs:.3f} → {to:.3f}", _percent(to / theirs), f"{low} → {high}",
         _percent(float(np.exp(loss[high] - loss[low]))))
        for what, to, theirs, high, low in PUBLISHED
        if {high, low} <= loss.keys()
    ]  # fmt: skip
    if not rows:
        return
    page.heading("Beside the published perplexities")
    head = ("published", "perplexity", "change", "here", "change of perplexity")
    page.table(head, rows)
    page.text(
        """Numbers in brackets and after "over" are sequences of 4,096 tokens, in models of 0.6 B active
        parameters (the 1 %: 6.6 B) after 120 B or 400 B tokens; here rows have 128, and runs a few million.
        An eighth of the weight is 0.001 for 0.008 there, and a tenth here, 0.01 for 0.1. Perplexity
        here is that of the mean of the domains' losses."""
    )
    if {"exact", "micro 64"} <= loss.keys():
        noise = _percent(float(np.exp(abs(loss["exact"] - loss["micro 64"]))))
        page.text(f"What rounding alone made between two runs of one seed: {noise}.")


def _percent(ratio: float) -> str:
    return f"{signed(100 * (ratio - 1), 1)} %"


def _row(page: Page, name: str, runs: list[Result], timed: Sequence[Result]) -> tuple[str, ...]:
    run = runs[0]
    floor = run.final.max_vio_floor(run.config.model.top_k)
    return (
        name,
        average([r.final.loss for r in runs], 3),
        f"{average([r.final.max_vio for r in runs])} ({number(floor, 3)})",
        average([r.max_vio_end for r in runs]),
        average([specialisation(r.final) for r in runs], 3),
        average([largest_domain_share(r.final) for r in runs], 3),
        average([float(r.final.weight_sums.mean()) for r in runs], 3),
        page.step_time(run, timed),
    )


def _draw_size(runs: dict[str, Result], path: Path) -> None:
    figure, axes = figures.canvas(2, height=3.2)
    sizes = [n for n in SIZES if f"micro {n}" in runs]
    for axis, title, value in (
        (axes[0, 0], "specialisation, nats", lambda r: specialisation(r.final)),
        (axes[0, 1], "held-out loss, nats per token", lambda r: r.final.loss),
    ):
        axis.plot(sizes, [value(runs[f"micro {n}"]) for n in sizes], "o-", label="micro")
        longer = [n for n in LONGER if _longer(n) in runs]
        axis.plot(longer, [value(runs[_longer(n)]) for n in longer], "s-", label="running")
        added = [n for n in PROCESSES if _synchronised(n) in runs]
        values = [value(runs[_synchronised(n)]) for n in added]
        axis.plot([8 * n for n in added], values, "x", color="black", label="synchronised")
        if "global" in runs:
            axis.axhline(value(runs["global"]), linestyle="--", color="#888888", label="global")
        axis.set(title=title, xlabel="rows balanced over", xscale="log")
        axis.set_xticks(sizes + longer, [str(n) for n in sizes + longer])
        axis.minorticks_off()
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


_SHOWN = ("none", "micro 8", "global", "exact", "sign bias, global")


def _draw_frequency(runs: dict[str, Result], path: Path) -> None:
    chosen = [n for n in _SHOWN if n in runs]
    figure, axes = figures.canvas(len(chosen), width=9.0, height=2.6)
    for axis, name in zip(axes[0], chosen, strict=True):
        found = runs[name].final
        counts_DE = found.counts[:, found.counts.shape[1] // 2]
        shares_DE = counts_DE / counts_DE.sum(1, keepdims=True)
        axis.imshow(shares_DE, aspect="auto", cmap="viridis", vmin=0, vmax=0.3)
        axis.set_yticks(range(len(found.domains)), found.domains if axis is axes[0, 0] else [])
        axis.set(title=name, xlabel="expert")
        axis.grid(False)
    figures.save(figure, path)


EXPERIMENT = Experiment(
    "scope",
    "The scope of balance",
    """Published (arXiv 2501.11873, 3.4B-A0.6B, 64 experts, top-4, 120 B tokens, weight 0.008): balancing
    over 4, 32 and 512 sequences gives a perplexity of 8.167, 8.062 and 8.038; over a random subset of
    the global batch 8.041, so that it is diversity and not number that counts; a bias moved by
    micro-batch counts 8.521, by global counts 8.080. At 43B-A6.6B the buffer costs 5.8 % of step time,
    with 1 % of a micro loss 2.6 %. Experts specialise under the global loss (many with more
    than 0.2 of the selections of instruction mathematics) and not under the micro loss (none above 0.15
    in code and mathematics).""",
    configs,
    write,
    (
        """which scope has the lower perplexity: the published difference is 1.6 % after 120 B tokens,
        and single runs of a few million tokens order losses otherwise;""",
        """that micro-batches of one domain are what trainers have: they are the extreme case, chosen so
        that the effect shows;""",
        "step times of a data-parallel run: those of several processes are not taken;",
        """anything of steps of more than 64 rows (the paper: to 512): the longer buffers hold what earlier
        weights selected; nor of buffers over a part of a step, whose sizes in between are not run;""",
        """how many experts specialise by the published thresholds (0.15 and 0.2 of a domain's
        selections), which are for 64 experts.""",
    ),
)
