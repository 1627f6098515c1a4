"""Claims: no point is run twice at once, whatever sweeps are started, also on hosts that share the directory.

A claim is a file that is created only if it is not there. Within a host claims are looked at under a lock, so
that only one sweep takes over what a dead one has left. A dead sweep of another host cannot be told from a
living one; its claims are left, unless they are of an earlier start of this very job of SLURM.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.sweeps.processes import group_runs, is_running, started_at


@dataclass(frozen=True)
class Owner:
    """Who has claimed a point.

    started: of the process, in the kernel's ticks, because process numbers come again; None if unknown. job:
    of SLURM; "" outside of one. restart: how often the job was queued again before this. child: the process
    group of the run, 0 before it is started; its ranks may outlive the sweep.
    """

    host: str
    pid: int
    started: int | None
    job: str
    restart: str = ""
    child: int = 0
    child_started: int | None = None

    @property
    def where(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    def is_dead(self) -> bool:
        """Whether nothing of it can still run, as far as this host can tell."""
        if self.job and self.job == own_job() and self.restart != _own_restart():
            return True
        return self.host == socket.gethostname() and not self._runs_here()

    def _runs_here(self) -> bool:
        if is_running(self.pid, self.started):
            return True
        # The first process of a group may have ended before the others, or its number been given away.
        first = started_at(self.child) if self.child else None
        return bool(self.child) and first in (None, self.child_started) and group_runs(self.child)


#: Of a claim that is just being written.
_UNKNOWN = Owner("an unknown host", 0, None, "")


def own_job() -> str:
    """This job of SLURM, with its place in an array; "" outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _own_restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "")


def this_process() -> Owner:
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, started_at(pid), own_job(), _own_restart())


class Claim:
    """A claim that this process holds."""

    def __init__(self, path: Path, owner: Owner):
        self._path, self._owner = path, owner

    def name_child(self, pid: int) -> None:
        """Says which process group runs the point; 0 once it has ended."""
        started = started_at(pid) if pid else None
        self._owner = Owner(**{**asdict(self._owner), "child": pid, "child_started": started})
        write_text(self._path, _text(self._owner))

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


def take(path: Path) -> Claim | Owner:
    """The claim of a point; or its owner, if another sweep has it."""
    owner = this_process()
    with _lock_of_this_host(path.parent):
        found = owner_of(path)
        if found is not None and found.is_dead():
            path.unlink(missing_ok=True)
        try:
            file = open(path, "x", encoding="utf-8")
        except FileExistsError:
            return owner_of(path) or _UNKNOWN
        with file:
            file.write(_text(owner))
            file.flush()
            os.fsync(file.fileno())
    return Claim(path, owner)


def owner_of(path: Path) -> Owner | None:
    """Who holds the claim; None if nobody does."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        return _UNKNOWN


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner)) + "\n"


@contextlib.contextmanager
def _lock_of_this_host(folder: Path) -> Iterator[None]:
    with open(folder / f".lock-{socket.gethostname()}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
