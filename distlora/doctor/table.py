"""The findings as a table for a terminal."""

import textwrap
from collections.abc import Sequence

from distlora.doctor.findings import Finding
from distlora.sentences import counted

WIDTH = 132


def table(findings: Sequence[Finding], nodes: Sequence[str]) -> str:
    """One row for each finding with its remedy below it, then the number of each level.

    nodes: the names of all nodes.
    """
    rows = [(finding.check, _node_names(finding.nodes, nodes), finding.level) for finding in findings]
    heads = ("check", "node", "result")
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(3)]
    indent = sum(widths) + 6
    lines = ["  ".join([*(head.ljust(width) for head, width in zip(heads, widths)), "found"])]
    for row, finding in zip(rows, findings):
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        lines += _folded(f"{start}  ", finding.found, indent)
        if finding.remedy:
            lines += _folded(" " * indent + "-> ", finding.remedy, indent + 3)
    return "\n".join([*lines, "", summary(findings)])


def _folded(start: str, text: str, indent: int) -> list[str]:
    width = max(WIDTH - indent, 40)
    parts = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    return [start + parts[0], *(" " * indent + part for part in parts[1:])]


def _node_names(some: Sequence[str], nodes: Sequence[str]) -> str:
    if len(some) == len(nodes) > 1:
        return "all"
    return ", ".join(some) if len(some) <= 3 else f"{some[0]}, {some[1]} and {len(some) - 2} more"


def summary(findings: Sequence[Finding]) -> str:
    counts = {
        level: sum(finding.level == level for finding in findings) for level in ("failure", "warning", "ok")
    }
    return (
        f"{counted(counts['failure'], 'failure')}, {counted(counts['warning'], 'warning')}, {counts['ok']} ok"
    )
