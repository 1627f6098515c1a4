"""Processes of this host, as Linux shows them. One that has ended but was not waited for does not run."""

import os
import socket
from pathlib import Path


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
    fields = stat_fields(Path("/proc", str(pid)))
    return int(fields[19]) if fields else None


def is_running(pid: int, started: int | None) -> bool:
    """Whether this very process runs: numbers come again."""
    return started is not None and started_at(pid) == started


def is_hidden(pid: int) -> bool:
    """Whether there is such a process that this user must not see: /proc may be mounted so, with hidepid."""
    try:
        Path("/proc", str(pid), "stat").read_bytes()
        return False
    except OSError:  # not there, or not to be read
        pass
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def stat_fields(folder: Path) -> list[str]:
    """State, parent, group and so on, which follow a name that may hold anything; [] if it does not run."""
    try:
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
