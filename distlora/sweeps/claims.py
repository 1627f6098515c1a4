"""Claims: no point is run twice at once, whatever sweeps are started, also on hosts that share the directory.

A claim is a file that is created whole, and only if it is not there. Its owner renews the time of its last
change while it runs the point. Of a sweep on this host one sees whether it, or its run, still goes on. One of
another host is taken for dead once it has not renewed its claim for STALE seconds, or if it is an earlier
start of this very job of SLURM.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.errors import UserError
from distlora.sweeps.processes import is_running, marked, started_at, this_place

#: Seconds between two renewals of a claim, and those after which it is worth nothing. Network file systems
#: may show a file's times up to a minute late.
BEAT, STALE = 15.0, 120.0


class Lost(Exception):
    """Another sweep has taken this claim over, or its file is gone."""


@dataclass(frozen=True)
class Owner:
    """Who has claimed a point.

    token: another one for every claim; the run's processes are marked with it. place: see `this_place`.
    started: of the process, in the kernel's ticks, because process numbers come again; None if unknown. job:
    of SLURM; "" outside of one. restart: how often the job was queued again before this.
    """

    token: str
    host: str
    place: str
    pid: int
    started: int | None
    job: str = ""
    restart: str = ""

    @property
    def where(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    def is_dead(self, age: float) -> bool:
        """Whether nothing of it can still run, as far as can be told here. age: of its claim, in seconds."""
        if self.job and self.job == own_job() and self.restart != _own_restart():
            return True
        if self.place != this_place():
            return age > STALE
        return not (is_running(self.pid, self.started) or marked(self.token))


#: What file systems say that have no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
#: Of a file that is no claim.
_UNKNOWN = Owner("", "an unknown host", "", 0, None)


def own_job() -> str:
    """This job of SLURM, with its place in an array; "" outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _own_restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "")


def new_owner() -> Owner:
    """This process, with a new token."""
    pid = os.getpid()
    return Owner(
        uuid.uuid4().hex, socket.gethostname(), this_place(), pid, started_at(pid), own_job(), _own_restart()
    )


class Claim:
    """A claim that this process holds."""

    def __init__(self, path: Path, token: str):
        self._path, self.token = path, token

    def renew(self) -> None:
        """Says that the owner goes on. Raises Lost."""
        if not self._is_held():
            raise Lost
        with contextlib.suppress(OSError):  # a file system that does not answer may do so in time
            os.utime(self._path)

    def release(self) -> None:
        """Gives the point free, unless a process of its run is left, which nothing could end."""
        if self._is_held() and not marked(self.token):
            self._path.unlink(missing_ok=True)

    def _is_held(self) -> bool:
        owner = _owner_of(self._path)
        return owner is not None and owner.token == self.token


def take(path: Path) -> Claim | Owner:
    """The claim of a point; or its owner, if another sweep has it."""
    mine = new_owner()
    draft = path.with_name(f".{path.name}.{mine.token}")
    with _lock_of_this_host(path.parent):
        try:
            _remove_dead(path, mine.token)
            _write(draft, mine)
            _create(path, draft)
        except FileExistsError:
            return _owner_of(path) or _UNKNOWN
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            draft.unlink(missing_ok=True)
    return Claim(path, mine.token)


def _create(path: Path, draft: Path) -> None:
    """Gives the draft this name as well. Raises FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A crash may leave it half-written; then it is taken over like that of a dead owner.
        with open(path, "x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))


def _remove_dead(path: Path, token: str) -> None:
    """Removes the claim of a dead owner. Another host may be doing the same at this moment, and have claimed
    the point already; then its claim is put back.
    """
    dead = _owner_of(path)
    if dead is None or not dead.is_dead(_age(path)):
        return
    aside = path.with_name(f".{path.name}.{token}.dead")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _owner_of(aside) != dead:
        with contextlib.suppress(FileExistsError):
            _create(path, aside)
    aside.unlink()


def holder_of(path: Path) -> Owner | None:
    """Who runs the point; None if nobody does, as far as can be told here."""
    owner = _owner_of(path)
    return None if owner is None or owner.is_dead(_age(path)) else owner


def _owner_of(path: Path) -> Owner | None:
    """Whose claim the file is, dead or not; None without a file."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        return _UNKNOWN


def _age(path: Path) -> float:
    """Seconds since the claim was renewed, by the clock of the file system, which hosts share."""
    try:
        return _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _now(folder: Path) -> float:
    clock = _lock_path(folder)
    try:
        clock.touch()
        return clock.stat().st_mtime
    except OSError:
        return time.time()


def _write(path: Path, owner: Owner) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(owner)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lock_path(folder: Path) -> Path:
    return folder / f".lock-{socket.gethostname()}"


@contextlib.contextmanager
def _lock_of_this_host(folder: Path) -> Iterator[None]:
    with open(_lock_path(folder), "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: claims are still created only once
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
