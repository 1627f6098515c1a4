"""Processes of this host, as Linux shows them. One that has ended but was not waited for does not run."""

from collections.abc import Iterator
from pathlib import Path


def started_at(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None if it does not run."""
    fields = _fields(Path("/proc", str(pid)))
    return int(fields[19]) if fields else None


def is_running(pid: int, started: int | None) -> bool:
    """Whether this very process runs: numbers come again."""
    return started is not None and started_at(pid) == started


def group_runs(group: int) -> bool:
    """Whether a process of the group runs. Meanwhile no new process is given the group's number."""
    return any(int(fields[2]) == group for fields in _running())


def _running() -> Iterator[list[str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _fields(folder):
            yield fields


def _fields(folder: Path) -> list[str]:
    """State, parent, group and so on, which follow a name that may hold anything; [] if it does not run."""
    try:
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
