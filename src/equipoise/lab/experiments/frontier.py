"""Experiment 4: held-out loss against balance, every method over its strength, in paired seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from equipoise.lab import figures
from equipoise.lab.config import Config
from equipoise.lab.experiments.base import Experiment, Page, Results, average, number, seeded
from equipoise.lab.experiments.paired import (
    LINE,
    MARGIN,
    REFERENCE,
    SEEDS,
    STRONG,
    Groups,
    at_equal_load,
    difference,
    grouped,
    paired,
    told_at_equal_load,
    verdict,
)
from equipoise.lab.recipes import gpu, small
from equipoise.lab.results import Result, mean_interval

SHAPES = {16: (2, 64), 64: (4, 32), 256: (8, 16)}
"""Experts: experts per token, and an expert's inner width, so that a token uses as many of
their weights in all."""
METHODS = {
    "none": "none",
    REFERENCE: "switch(scope=global, weight=0.01)",
    STRONG: "switch(scope=global, weight=0.1)",
    LINE[2]: "switch(scope=global, weight=1)",
    "sign 0.01": "sign(rate=0.01)",
    "quantile": "quantile",
    "proportional 0.01": "proportional(rate=0.01)",
    "RMS-normalised 0.01": "rms_normalised(rate=0.01)",
    "quantile by histogram": "quantile_histogram",
    "switch 0.001": "switch(scope=global, weight=0.001)",
    LINE[3]: "switch(scope=global, weight=10)",
    "sign 0.001": "sign(rate=0.001)",
}
"""At every number of experts."""
SQUARED = "squared 0.01"
OTHERS = {
    "switch by micro-batch 0.01": "switch(scope=micro, weight=0.01)",
    "switch by micro-batch 0.1": "switch(scope=micro, weight=0.1)",
    "switch by sequence 0.01": "switch(scope=sequence, weight=0.01)",
    "switch by sequence 0.1": "switch(scope=sequence, weight=0.1)",
    SQUARED: "squared(scope=global, weight=0.01)",
    "squared 0.1": "squared(scope=global, weight=0.1)",
    "importance 0.01": "importance(scope=global, weight=0.01)",
    "importance 0.1": "importance(scope=global, weight=0.1)",
    "proportional 0.001": "proportional(rate=0.001)",
    "multiplicative 0.001": "multiplicative(rate=0.001)",
    "multiplicative 0.01": "multiplicative(rate=0.01)",
    "RMS-normalised 0.001": "rms_normalised(rate=0.001)",
    "momentum and tanh 0.001": "momentum_tanh(rate=0.001)",
    "momentum and tanh 0.01": "momentum_tanh(rate=0.01)",
    "PID": "pid",
    "quantile, ema 0.9": "quantile(ema=0.9)",
    "groups of 4 experts 0.01": "group(groups=4, weight=0.01)",
    "communication of 4 groups 0.01": "communication(groups=4, weight=0.01)",
    "z 0.001": "z(weight=0.001)",
    "entropy 0.01": "entropy(weight=0.01)",
    "score variance 0.01": "score_variance(weight=0.01)",
    "orthogonal outputs 0.01": "output_orthogonality(weight=0.01)",
    "orthogonal router, ERNIE 0.01": "router_orthogonality(kind=ernie, weight=0.01)",
    "orthogonal router, SimBal 0.01": "router_orthogonality(kind=simbal, weight=0.01)",
}
"""At 16 experts only: the rest of the catalogue, but for `load_cv`, whose gradient is that of `squared`."""
CHOSEN = ("proportional 0.01", "RMS-normalised 0.01", "quantile by histogram")
"""Leaders for what one seed of 16 experts showed."""
LEADERS = (*LINE[:3], "sign 0.01", "quantile", *CHOSEN)
"""Methods in paired seeds: a loss from less even to as even, two biases at their evenest, and three that
were as good in one seed of 16 experts."""
PLAIN_BIAS = "quantile"
"""The leader without a rate."""
WHOLE_STEP = {"switch by whole step 0.1": "switch(scope=exact, weight=0.1)"}
"""With 16 experts in paired seeds, too: the loss on the counts that a bias has."""
TOKENS, LONGER, LONGER_EXPERTS = 2_000_000, 5_000_000, 64
"""Of a run; and tokens and experts of longer runs in paired seeds: whether what is found lasts."""
SHORT, LONG = (f"{tokens // 1_000_000} M" for tokens in (TOKENS, LONGER))
LENGTH = f", {LONG} tokens"
"""At the end of their group's name."""
LONGER_METHODS = (REFERENCE, STRONG, "quantile by histogram")
"""The published loss, the stronger one, and the bias that `recommended` gives."""
ROUTER = "sigmoid"


def base(experts: int, tier: str = "cpu", router: str = ROUTER) -> Config:
    """The run that every method of `experts` experts changes."""
    top_k, width = SHAPES[experts]
    whole = small() if tier == "cpu" else gpu()
    sizes = {"model.top_k": top_k, "model.expert_size": width} if tier == "cpu" else {}
    return whole.change(
        {
            **sizes,
            "model.experts": experts,
            "model.router": router,
            "tokens": TOKENS if tier == "cpu" else 100_000_000,
            "evaluation_tokens": 50_000,
            "trace": False,
        }
    )


def named(plain: Config, methods: Mapping[str, str], router: str = "") -> list[Config]:
    """The runs of some methods in the group of one config; `router` names one that is not ROUTER."""
    group = f"{plain.model.experts} experts{router and f', {router}'}"
    if plain.tokens == LONGER:
        group += LENGTH
    return [
        plain.change({"name": f"{group}: {name}", "balance": balance})
        for name, balance in methods.items()
    ]


def configs(tier: str, seeds: int) -> list[Config]:
    """The leaders in their seeds, then all strengths, then the rest of the catalogue."""
    leaders = {name: METHODS[name] for name in LEADERS}
    others = {name: balance for name, balance in METHODS.items() if name not in leaders}
    shapes = SHAPES if tier == "cpu" else {64: SHAPES[64]}
    found: list[Config] = []
    for experts in shapes:
        several = leaders | (WHOLE_STEP if experts == 16 else {})
        found += seeded(named(base(experts, tier), several), max(SEEDS, seeds))
    for experts in shapes:
        found += seeded(named(base(experts, tier), others), seeds)
    if tier == "cpu":
        found += seeded(named(base(16), OTHERS), seeds)
        longer = {name: METHODS[name] for name in LONGER_METHODS}
        found += seeded(
            named(base(LONGER_EXPERTS).change({"tokens": LONGER}), longer), max(SEEDS, seeds)
        )
    return found


def write(page: Page, results: Results) -> None:
    """A table for each number of experts, and the frontiers."""
    groups = grouped(results)
    page.text(
        f"""Every method with the sigmoid router of DeepSeek-V3, so that biases and losses act on the same
        scores. Shapes: {_shapes(groups)}. Losses in nats per token, mean of the domains, on 50,000
        held-out tokens of each."""
    )
    for group, methods in groups.items():
        page.heading(group)
        page.table(HEAD, [row(page, name, runs, methods) for name, runs in methods.items()])
        _beside(page, methods)
    page.text(READING, *_bend(groups))
    page.step_times(f"`{REFERENCE}`")
    drawn = {group: methods for group, methods in groups.items() if not group.endswith(LENGTH)}
    if drawn:
        page.figure("frontier", CAPTION, lambda path: draw(drawn, path))
    page.heading("Findings")
    page.bullets(*findings(groups), *lasting(groups))
    page.text(COMPARISONS)


READING = f"""Differences are to `{REFERENCE}` of the same seed, whose runs see the same rows and begin
with the same weights; with several seeds, means and 95 % intervals by Student's t. At equal MaxVio: the
difference to the Switch losses of the same seed (of {", ".join(LINE)}, those that all its seeds have, and
that are more even than every weaker one), on the lines between them in ln MaxVio_global. Where some seeds are
more even than all Switch losses, or less ("more even than all", "less even than all"), these have no such
difference: the mean is of the others, which their outcome picked, and no verdict (n of m seeds; an interval
from three on). Equivalent: two one-sided t-tests both reject, at 5 %, that the difference is as large as
{MARGIN} nats. The published differences are smaller than that margin, 0.006 nats between a bias and a loss
(arXiv 2408.15664) and 0.016 between scopes (2501.11873): to tell those takes longer runs and more seeds,
and larger ones here are of the beginning of training, not a repetition of theirs. MaxVio_batch of each
training step's tokens, mean over the last tenth
of the steps. Chance: what uniform routing of as many tokens gives."""
COMPARISONS = """Every interval and every test is at its own level: of twenty comparisons of methods that do
not differ, about one shows a difference all the same, and of methods that differ by the margin, one in
twenty is called equivalent."""
CAPTION = f"""Held-out loss less that of `{REFERENCE}` with the same seed, against MaxVio_global. Lines
join the strengths of a method in their order; bars are 95 % intervals over the seeds, where there are
several; the band is the margin of {MARGIN} nats."""
HEAD = (
    "method",
    "seeds",
    "held-out loss",
    "difference",
    "at equal MaxVio",
    "MaxVio_global (chance)",
    "MaxVio_batch at the end (chance)",
    f"step time, of {REFERENCE}",
)


def _shapes(groups: Groups) -> str:
    told = []
    for group, methods in groups.items():
        run = next(iter(methods.values()))[0]
        model, size = run.config.model, run.summary["parameters"]
        told.append(
            f"{group}, top-{model.top_k}, inner width {model.expert_size}, "
            f"{size['total'] / 1e6:.1f} M parameters, {size['active'] / 1e6:.2f} M of them active"
        )
    return "; ".join(told)


def _beside(page: Page, methods: Mapping[str, Sequence[Result]]) -> None:
    """A table of the leaders beside those that are more even than the reference."""
    several = {name: runs for name, runs in methods.items() if len(runs) >= SEEDS}
    others = [name for name in (STRONG, LINE[2], PLAIN_BIAS) if name in several]
    rows = [
        [name, *(_less(runs, several[other], name == other) for other in others)]
        for name, runs in several.items()
        if name != REFERENCE
    ]
    if len(rows) > 1:
        page.text("Beside other leaders, loss and MaxVio_global less theirs:")
        page.table(("method", *others), rows)


def _less(mine: Sequence[Result], theirs: Sequence[Result], same: bool) -> str:
    if same:
        return "0"
    load = difference(paired(mine, theirs, "max_vio"), 2)
    return f"{verdict(paired(mine, theirs))}; MaxVio {load}"


def _bend(groups: Groups) -> list[str]:
    """What a Switch loss of another weight shows of the line between them."""
    found = []
    for group, methods in groups.items():
        apart = at_equal_load(methods.get(SQUARED, ()), methods)
        if apart:
            found.append(
                f"""The router's gradient of `squared` is that of a Switch loss of twice the weight (that of
                `load_cv`, which is not run, too). That `{SQUARED}` is {apart[0]:+.3f} nats off the line
                between the Switch losses with {group} shows what one seed and straight lines are worth."""
            )
    return found


def row(
    page: Page, name: str, runs: Sequence[Result], methods: Mapping[str, Sequence[Result]]
) -> list[str]:
    """A method's row of the table."""
    run = runs[0]
    floor = run.final.max_vio_floor(run.config.model.top_k)
    return [
        name,
        str(len(runs)),
        average([r.final.loss for r in runs], 3),
        "0" if name == REFERENCE else verdict(paired(runs, methods.get(REFERENCE, ()))),
        "–" if name in LINE else told_at_equal_load(runs, methods),
        f"{average([r.final.max_vio for r in runs])} ({number(floor, 3)})",
        f"{average([r.max_vio_end for r in runs])} ({number(run.step_floor)})",
        page.step_time(run, methods.get(REFERENCE)),
    ]


def findings(groups: Groups) -> list[str]:
    """What the paired seeds show, in words made from the numbers."""
    found = []
    for group, methods in groups.items():
        reference = methods.get(REFERENCE, ())
        told = []
        for name, runs in methods.items():
            differences = paired(runs, reference)
            if name == REFERENCE or len(differences) < SEEDS:
                continue
            load = float(np.mean([r.final.max_vio for r in runs]))
            told.append(f"{name} (MaxVio {load:.2f}): {verdict(differences)}")
            if name not in LINE:
                told[-1] += f"; at equal MaxVio: {told_at_equal_load(runs, methods)}"
        if told:
            load = float(np.mean([r.final.max_vio for r in reference]))
            found.append(
                f"{group}, loss against {REFERENCE} (MaxVio {load:.2f}): {'. '.join(told)}."
            )
    return found or [
        f"No method has the {SEEDS} paired seeds yet that a statement about losses takes."
    ]


def lasting(groups: Groups) -> list[str]:
    """Differences to the stronger Switch loss in runs of both lengths."""
    longer = next((group for group in groups if group.endswith(LENGTH)), "")
    short = groups.get(longer.removesuffix(LENGTH), {})
    told = []
    for name, runs in groups.get(longer, {}).items():
        ends = [
            paired(of, methods.get(STRONG, ()))
            for of, methods in ((short.get(name, ()), short), (runs, groups[longer]))
        ]
        if name != STRONG and all(len(differences) >= SEEDS for differences in ends):
            told.append(f"{name} {verdict(ends[0])}, then {verdict(ends[1])}")
    return [
        f"""Whether it lasts, loss against {STRONG} with {LONGER_EXPERTS} experts after {SHORT} tokens and at
        the end of runs of {LONG}, over which the learning rate falls:
        {"; ".join(told)}."""
    ] * bool(told)


def draw(groups: Groups, path: Path) -> None:
    """Loss difference against MaxVio, a panel for each group."""
    figure, axes = figures.panels(len(groups), width=9.0, height=4.2)
    families = families_of(name for methods in groups.values() for name in methods)
    styles = {
        family: {"color": figures.COLOURS[n % 10], "marker": "os^"[n // 10 % 3]}
        for n, family in enumerate(dict.fromkeys(families.values()))
    }
    for axis, (group, methods) in zip(axes, groups.items(), strict=True):
        axis.axhspan(-MARGIN, MARGIN, color="#f0f0f0", zorder=0)
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for name, runs in methods.items():
            differences = paired(runs, methods.get(REFERENCE, ()))
            if differences:
                mean, half = mean_interval(differences)
                load = float(np.mean([r.final.max_vio for r in runs]))
                lines.setdefault(families[name], []).append((_strength(name), load, mean, half))
        for family, points in lines.items():
            _, xs, ys, halves = np.array(sorted(points)).T
            axis.errorbar(
                xs, ys, np.nan_to_num(halves), markersize=4, linewidth=1, label=family, capsize=2,
                **styles[family],
            )  # fmt: skip
        axis.set(title=group, xlabel="MaxVio_global", xscale="log")
        figures.few_ticks(axis.xaxis)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(f"loss less {REFERENCE}, nats")
    figures.legend(figure, axes)
    figures.save(figure, path)


def families_of(names: Iterable[str]) -> dict[str, str]:
    """Names without their strength, where there are several strengths of one method."""
    names = list(dict.fromkeys(names))
    heads = {name: _without_strength(name) for name in names}
    counts = Counter(heads.values())
    return {name: head if counts[head] > 1 else name for name, head in heads.items()}


def _without_strength(name: str) -> str:
    return name.rpartition(" ")[0] if _strength(name) else name


def _strength(name: str) -> float:
    """The number that a name ends in; 0 where it ends in none."""
    head, _, last = name.rpartition(" ")
    return float(last) if head and last.replace(".", "").replace("e-", "").isdigit() else 0.0


EXPERIMENT = Experiment(
    "frontier",
    "Loss at equal balance",
    f"""Which method has the lower loss where loads are equally even? Papers vary strengths, in single
    runs, and compare losses where loads differ: a perplexity of 9.50 against 9.56 for a bias against
    a loss that is 16 times less even (arXiv 2408.15664), 8.04 against 8.17 for the scope
    (2501.11873). Here the catalogue is run, the Switch loss and the sign rule over their strengths, the
    others at one or two, and set against MaxVio, the leaders in
    {SEEDS} paired seeds, and a difference is called none only where an equivalence test with a margin
    of {MARGIN} nats, fixed before the runs, says so.""",
    configs,
    write,
    (
        """that a method is better in training at scale: these runs see few tokens a parameter, where
        loss and balance still fight for the same gradient steps;""",
        f"""that the leaders are the best: {" and ".join(f"`{name}`" for name in CHOSEN)} were made leaders
        after one seed of 16 experts, which is among the five;""",
        """loss at equal load where a method is "more even than all": no Switch loss that was run is as even
        there, as with most biases at 64 and 256 experts, and of the biases only the sign rule is run at more
        strengths than two;""",
        """anything from single seeds: rows with one seed place a method on the picture, they do not order
        it;""",
        """that the weights suit other depths: losses are means over the layers, of which there are four
        here;""",
        f"""that balance lowers the loss, or raises it, in runs of more than {LONG} tokens,
        or of more than {SHORT} with methods and numbers of experts that were not run so long;""",
        """effects of the softmax router, of capacity, or of expert parallelism.""",
    ),
)
