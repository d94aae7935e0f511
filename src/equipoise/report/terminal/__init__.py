"""Tables for the terminal: plain rows in, rich renderables out; nothing is computed here.

Plain ASCII and at most 80 columns, so that a pipe, a log and a narrow window show every number
whole; colour is rich's to add where there is a terminal.
"""

from equipoise.report.terminal.load import by_table, experts_table, layers_table
from equipoise.report.terminal.runs import accuracy_line, accuracy_table, diff_table, info_table
from equipoise.report.terminal.verdicts import dead_table, findings_lines, verdict_counts

__all__ = [
    "accuracy_line",
    "accuracy_table",
    "by_table",
    "dead_table",
    "diff_table",
    "experts_table",
    "findings_lines",
    "info_table",
    "layers_table",
    "verdict_counts",
]
