"""Processes of this host, as Linux shows them. One that has ended but was not waited for does not run.

The processes of a run are known by a variable of their environment, which every process inherits: launchers
put ranks into process groups and sessions of their own.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

#: The variable; its value is the token of the claim.
MARK = "DISTLORA_POINT"


def this_place() -> str:
    """Where process numbers mean the same: this start of the kernel, and this namespace of processes.

    Hosts and containers may share a name, and containers of one host number their processes anew.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def started_at(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None if it does not run."""
    fields = _fields(Path("/proc", str(pid)))
    return int(fields[19]) if fields else None


def is_running(pid: int, started: int | None) -> bool:
    """Whether this very process runs: numbers come again."""
    return started is not None and started_at(pid) == started


def marked(token: str) -> list[int]:
    """The processes of this user that run and have this mark."""
    return list(_marked(f"\0{MARK}={token}\0".encode()))


def kill_marked(token: str) -> None:
    """Kills them."""
    for pid in marked(token):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _marked(variable: bytes) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes()
        except OSError:  # another user's, or it has just ended
            continue
        if variable in b"\0" + variables and _fields(folder):
            yield int(folder.name)


def _fields(folder: Path) -> list[str]:
    """State, parent, group and so on, which follow a name that may hold anything; [] if it does not run."""
    try:
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
