"""The nodes of an examination with their facts, and its findings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One row of the table. nodes: those that it is about. remedy: what to do; empty if nothing is wrong."""

    check: str
    level: Level
    nodes: tuple[str, ...]
    found: str
    remedy: str = ""


@dataclass(frozen=True, eq=False)
class Node:
    """A node and what it has told.

    facts: by topic, see `facts.collect`. slots: ranks on it, if known. place: its line in the hostfile, or
    empty. problem: why there are no facts. skew: seconds that its clock is ahead. doubt: the possible error
    of skew, in seconds. marks: the marks in the run directory that this node sees; None if it was not asked.
    """

    name: str
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    slots: int | None = None
    place: str = ""
    problem: str | None = None
    skew: float | None = None
    doubt: float = 0.0
    marks: tuple[str, ...] | None = None

    def fact(self, topic: str) -> Mapping[str, Any] | None:
        """The facts of a topic; None if they could not be collected."""
        found = self.facts.get(topic)
        return None if found is None or "error" in found else found


def known(nodes: Sequence[Node], topic: str) -> Iterator[tuple[Node, Mapping[str, Any]]]:
    """The nodes that have facts of a topic, with these facts."""
    for node in nodes:
        found = node.fact(topic)
        if found:
            yield node, found


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Joins findings that say the same of several nodes into one, which stands in the place of the first."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        rows.setdefault((finding.check, finding.level, finding.found, finding.remedy), []).extend(
            finding.nodes
        )
    return [
        Finding(check, level, tuple(nodes), found, remedy)
        for (check, level, found, remedy), nodes in rows.items()
    ]


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
