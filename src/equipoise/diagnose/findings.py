"""`findings`: what is worth saying first about a trace, in plain words, worst first, few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.diagnose.dead import dead
from equipoise.diagnose.stats import stats
from equipoise.trace import Trace

Row = Mapping[str, Any]

SEVERITIES = ("error", "warning", "note", "good")
"""Worst first: the figures cannot be used as they are; look at this; worth knowing; in order."""

UNEVEN = 1.0
"""MaxVio whose lower bound makes a warning: the busiest expert has twice its fair share."""

FEW_PER_EXPERT = 100
"""Effective selections per expert below which a share is known to no better than a fifth ..."""

VERY_FEW_PER_EXPERT = 10
"""... and below which it is mostly chance."""


@dataclass(frozen=True)
class Finding:
    """A statement about experts with its evidence."""

    code: str
    """Stable name, for scripts: "dead", "cold", "uneven", ..."""
    severity: str
    message: str
    """One sentence, complete in itself."""
    layer: int | None = None
    """True layer number; None where it is about the whole trace."""
    experts: tuple[tuple[int, int], ...] = ()
    """The experts it is about, as (layer, expert)."""
    value: float | None = None
    threshold: float | None = None
    interval: tuple[float, float] | None = None
    advice: str = ""


def findings(
    trace: Trace, *, measured: Row | None = None, verdicts: Row | None = None
) -> list[Finding]:
    """What a reader should know first, worst first; at least one.

    `measured` and `verdicts` are the answers of `stats` and `dead`, where they are at hand.
    """
    if not trace.layers:
        return [_dense(trace)]
    measured = stats(trace) if measured is None else measured
    verdicts = dead(trace) if verdicts is None else verdicts
    layers = [row for row in measured["layers"] if row["max_vio"] is not None]
    if not layers:
        return [Finding("empty", "error", "No token was routed in this view of the trace.")]
    found = [
        *_of_recording(trace),
        *_of_amount(layers, verdicts),
        *_of_unrouted(layers),
        *_of_experts(verdicts, len(trace.layers)),
        *_of_balance(layers),
    ]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _dense(trace: Trace) -> Finding:
    accuracy = trace.accuracy()
    score = f" It answered {accuracy['overall']['accuracy']:.1%} correctly." if accuracy else ""
    return Finding("dense", "note", f"This model has no experts: it is a dense baseline.{score}")


def _of_recording(trace: Trace) -> Iterator[Finding]:
    missing = trace.meta.get("missing_ranks")
    if missing:
        ranks = ", ".join(map(str, missing))
        yield Finding(
            "missing_ranks",
            "error",
            f"The files of rank {ranks} of {trace.meta.get('world_size')} are missing: the figures"
            " are of the other ranks' tokens only.",
            advice="Copy every rank's files into the trace folder.",
        )
    elif trace.meta.get("status") == "partial":
        yield Finding(
            "partial",
            "warning",
            f"The recording stopped early: the figures are of the first {trace.tokens:,} tokens.",
            advice="Go on with --resume, or read them as a sample of what came first.",
        )


def _of_amount(layers: Sequence[Row], verdicts: Row) -> Iterator[Finding]:
    thinnest = min(layers, key=_per_expert)
    untold = _experts(verdicts, "undetermined")
    per_expert = _per_expert(thinnest)
    if per_expert < FEW_PER_EXPERT:
        worth = round(thinnest["effective_tokens"] or thinnest["tokens"])
        yield Finding(
            "few_tokens",
            "warning" if per_expert < VERY_FEW_PER_EXPERT else "note",
            f"Shares of single experts are rough: {thinnest['tokens']:,} tokens went through layer"
            f" {thinnest['layer']}, and as tokens of a document choose alike they say as much as"
            f" {worth:,} independent ones.",
            layer=thinnest["layer"],
            value=per_expert,
            threshold=FEW_PER_EXPERT,
            advice="Record more documents, and more varied ones.",
        )
    if untold:
        never = sum(row["count"] == 0 for row in verdicts["experts"] if _is_untold(row))
        yield Finding(
            "undetermined",
            "note",
            f"{_many(untold)} may be hardly used or not: too few tokens to tell"
            f"{f', although {never:,} of them never came up' if never else ''}.",
            experts=untold,
            value=len(untold),
            advice="Record more, and more varied, text before calling any of them dead.",
        )


def _of_unrouted(layers: Sequence[Row]) -> Iterator[Finding]:
    worst = max(layers, key=lambda row: row["unrouted_share"] or 0)
    share = worst["unrouted_share"] or 0
    if share > 0:
        yield Finding(
            "unrouted",
            "warning" if share >= 0.01 else "note",
            f"Up to {share:.2%} of the slots went to no expert (most in layer {worst['layer']}):"
            " dropped by capacity, skipped, or sent to an expert that computes nothing.",
            layer=worst["layer"],
            value=share,
            advice="Shares are of the slots that did reach an expert.",
        )


def _of_experts(verdicts: Row, layers: int) -> Iterator[Finding]:
    gone, cold = _experts(verdicts, "dead"), _experts(verdicts, "cold")
    special, idle = _experts(verdicts, "specialist"), _experts(verdicts, "idle")
    total = f"{len(verdicts['experts']):,}"
    if gone:
        yield Finding(
            "dead",
            "warning",
            f"{_many(gone)} of {total} in {_in_layers(gone)} of {layers} layers {_are(gone)} dead:"
            " never selected, and their true share is below"
            f" {verdicts['dead_threshold']:.0%} of a fair one.",
            experts=gone,
            value=len(gone),
            threshold=verdicts["dead_threshold"],
            advice="On text like this they can be left out; on other text look again.",
        )
    if cold:
        yield Finding(
            "cold",
            "warning",
            f"{_many(cold)} of {total} in {_in_layers(cold)} of {layers} layers {_are(cold)} cold:"
            f" below {verdicts['cold_threshold']:.0%} of a fair share.",
            experts=cold,
            value=len(cold),
            threshold=verdicts["cold_threshold"],
            advice="Rarely used is not useless: removing them costs about the traffic they carry.",
        )
    if special:
        yield Finding(
            "specialist",
            "note",
            f"{_many(special)} {_are(special)} cold overall, but not in some subject or domain.",
            experts=special,
            value=len(special),
            advice="equipoise dead --json names the subjects.",
        )
    if idle:
        yield Finding(
            "idle",
            "note",
            f"{_many(idle)} went {verdicts['idle_threshold']:,} tokens or more without a selection,"
            " though not cold over the whole run.",
            experts=idle,
            value=len(idle),
            threshold=verdicts["idle_threshold"],
        )


def _of_balance(layers: Sequence[Row]) -> Iterator[Finding]:
    worst = max(layers, key=lambda row: row["max_vio"])
    above = [row for row in layers if _lower(row) > row["max_vio_floor_95"]]
    busiest = max(range(len(worst["counts"])), key=worst["counts"].__getitem__)
    interval = worst["max_vio_interval"]
    if not above:
        yield Finding(
            "even",
            "good",
            f"No layer is less even than chance can make it: MaxVio is at most"
            f" {worst['max_vio']:.3g} (layer {worst['layer']}, {worst['max_vio_floor']:.2g} by"
            " chance alone).",
            layer=worst["layer"],
            value=worst["max_vio"],
            threshold=worst["max_vio_floor_95"],
            interval=tuple(interval) if interval else None,
        )
        return
    yield Finding(
        "uneven",
        "warning" if _lower(worst) >= UNEVEN else "note",
        f"The load is uneven beyond chance in {len(above)} of {len(layers)} layers, most in layer"
        f" {worst['layer']}: expert {busiest} has {worst['max_vio'] + 1:.2f} times a fair share"
        f" (MaxVio {worst['max_vio']:.3g}, {worst['max_vio_floor']:.2g} by chance alone).",
        layer=worst["layer"],
        experts=((worst["layer"], busiest),),
        value=worst["max_vio"],
        threshold=worst["max_vio_floor_95"],
        interval=tuple(interval) if interval else None,
        advice="equipoise stats shows every layer, equipoise report the whole map.",
    )


def _lower(row: Row) -> float:
    """Lower end of MaxVio; the value itself where there is no interval."""
    interval = row["max_vio_interval"]
    return float(interval[0] if interval else row["max_vio"])


def _per_expert(row: Row) -> float:
    """Effective selections per expert."""
    return float((row["effective_tokens"] or row["tokens"]) * row["top_k"] / row["experts"])


def _experts(verdicts: Row, verdict: str) -> tuple[tuple[int, int], ...]:
    rows = verdicts["experts"]
    return tuple((row["layer"], row["expert"]) for row in rows if row["verdict"] == verdict)


def _is_untold(row: Row) -> bool:
    return bool(row["verdict"] == "undetermined")


def _many(experts: Sequence[Any]) -> str:
    return f"{len(experts):,} expert{'' if len(experts) == 1 else 's'}"


def _are(experts: Sequence[Any]) -> str:
    return "is" if len(experts) == 1 else "are"


def _in_layers(experts: Sequence[tuple[int, int]]) -> int:
    return len({layer for layer, _ in experts})
