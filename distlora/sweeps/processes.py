"""The processes of a sweep's run on this host.

They are known by a variable of their environment, which every process inherits: launchers put ranks into
process groups and sessions of their own.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from distlora.files.processes import stat_fields

#: The variable; its value is the token of the claim.
MARK = "DISTLORA_POINT"


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
        if variable in b"\0" + variables and stat_fields(folder):
            yield int(folder.name)
