"""`equipoise info`: what a trace is, and whether it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli.common import Json, TracePath, console, open_selected, print_json, say, size_of

if TYPE_CHECKING:
    from equipoise.trace import Trace


def info(
    path: TracePath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Count the stored rows again, against the counts.")
    ] = False,
    json: Json = False,
) -> None:
    """Show a trace's model, task, shape, provenance and status; with --verify, check it.

    Exit code 1 when --verify finds stored rows that do not give the stored counts.
    """
    trace = open_selected(path)
    facts = describe(trace)
    facts["size"] = size_of(path)
    if verify:
        facts["verified"] = verification(trace)
    if json:
        print_json(facts)
    else:
        from equipoise.report.facts import facts as listed
        from equipoise.report.terminal import info_table

        rows = [*listed(trace), ("size", size_of(path))]
        if verify:
            rows.append(("verified", _said(facts["verified"])))
        console().print(info_table(rows))
    if verify and facts["verified"]["differences"]:
        say("The stored rows do not give the stored counts: the trace was damaged or changed.")
        raise typer.Exit(1)


def _said(found: dict[str, Any]) -> str:
    if not found["checked"]:
        return f"not possible: {found['reason']}"
    return (
        f"{found['selections']:,} selections counted again, {found['differences']:,} cells differ"
    )


def describe(trace: Trace) -> dict[str, Any]:
    """What a trace is, in plain values."""
    layers = trace.layers
    return {
        **trace.meta,
        "tokens": trace.tokens,
        "sequences": trace.sequences.num_rows,
        "rows": trace.has_rows,
        "rows_complete": trace.rows_complete,
        "layers": [
            {
                "layer": layer.layer,
                "path": layer.path,
                "experts": layer.experts,
                "top_k": layer.top_k,
                "score_function": layer.score_function,
                "selection_bias": layer.selection_bias,
                "shared_experts": layer.shared_experts,
            }
            for layer in layers
        ],
        "subjects": len(trace.values("subject")),
        "domains": len(trace.values("domain")),
        "roles": trace.values("role"),
        "phases": trace.values("phase"),
    }


def verification(trace: Trace) -> dict[str, Any]:
    """Hold the stored rows against the stored counts, cell by cell."""
    if not trace.rows_complete:
        reason = (
            f"rows of one sequence in {trace.meta['every']} are stored"
            if trace.has_rows
            else "no rows are stored"
        )
        return {"checked": False, "reason": reason, "selections": 0, "differences": 0}
    again_LE, counts_LE = trace.recount(), trace.counts_LE
    return {
        "checked": True,
        "reason": None,
        "selections": int(again_LE.sum()),
        "differences": int((again_LE != counts_LE).sum()),
    }
