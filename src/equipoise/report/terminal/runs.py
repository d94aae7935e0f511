"""Tables of whole runs: provenance, accuracy, two runs side by side."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.report import words
from equipoise.report.rows import labels
from equipoise.report.terminal.grid import Row, add, grid, legend

DIFF_LEGEND = (
    "JS dist.: Jensen-Shannon distance of the loads, 0 alike, 1 disjoint; by chance: between two"
    " runs of one model on other documents. Least alike: part of the least-used tenth that both"
    " share. Most changed: expert and change of its share."
)


def diff_table(diff: Row) -> RenderableType:
    """Two runs side by side: the whole, then one row per layer."""
    whole = grid(["", "first", "second"], left=("",))
    add(whole, "tokens", *(words.grouped(x) for x in diff["tokens"]))
    add(whole, "accuracy", *(words.percent(x) for x in diff["accuracy"]))
    add(whole, "tokens/s", *(words.grouped(x and round(x)) for x in diff["tokens_per_second"]))
    if not diff["layers"]:
        return Group(whole, Text("\nOne of the runs is of a dense model: no experts to compare."))
    table = grid(
        [
            "layer",
            "JS\ndist.",
            "by\nchance",
            "MaxVio\nfirst",
            "MaxVio\nsecond",
            "floor\nfirst",
            "floor\nsecond",
            "least\nalike",
            "by\nchance",
            "most changed",
        ]
    )
    for name, row in zip(labels(diff["layers"]), diff["layers"], strict=True):
        add(
            table,
            words.line(name),
            Text(words.measure(row["js_distance"]), style="bold"),
            Text(words.measure(row["js_floor"]), style="dim"),
            *(words.measure(x) for x in row["max_vio"]),
            *(Text(words.measure(x), style="dim") for x in row["max_vio_floor"]),
            words.measure(row["least_overlap"]),
            Text(words.measure(row["least_overlap_floor"]), style="dim"),
            _most_changed(row),
        )
    return Group(whole, Text(), table, legend(DIFF_LEGEND))


def _most_changed(row: Row) -> str:
    expert = row["most_changed"]
    if expert is None:
        return words.NOTHING
    change = row["share_change"][expert]
    return f"{expert} {'-' if change < 0 else '+'}{words.share(abs(change))}"


def accuracy_table(accuracy: Row | None, by: str = "subject") -> RenderableType:
    """Right answers, questions and accuracy by subject or category, the whole at the end."""
    if not accuracy:
        return Text("No questions were answered in this trace.")
    table = grid([by, "correct", "questions", "accuracy", "interval"], left=(by,))
    groups = [*accuracy.get(by, {}).items(), ("all", accuracy["overall"])]
    for name, row in groups:
        if name == "all":
            table.add_section()
        add(
            table,
            words.line(name),
            words.grouped(row["correct"]),
            words.grouped(row["questions"]),
            words.percent(row["accuracy"]),
            words.interval(row.get("interval"), words.percent),
        )
    return table


def accuracy_line(accuracy: Row) -> Text:
    """Accuracy over all questions, in one line."""
    whole = accuracy["overall"]
    return Text(
        f"Accuracy: {words.percent(whole['accuracy'])} of {whole['questions']:,} questions."
    )


def info_table(facts: Iterable[tuple[str, str]]) -> RenderableType:
    """Label and value of each fact (`report.facts.facts`), long values folded."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, value in facts:
        add(table, words.line(label), words.line(value))
    return table
