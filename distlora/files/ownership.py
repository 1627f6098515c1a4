"""Who owns what can have one owner only: a file that names it, on a file system that several hosts may share.

The file is created whole, and only if it is not there. Its owner renews the time of its last change. Of a
process of this host one sees whether it still runs; one of another host, or that is hidden from this user, is
judged by how long it was silent.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.errors import UserError
from distlora.files.json_files import checked, read_json
from distlora.files.processes import is_hidden, is_running, started_at, this_place


@dataclass(frozen=True)
class Owner:
    """Who owns something.

    token: another one for every owner. place: see `this_place`. started: of the process, in the kernel's
    ticks, because process numbers come again; None if unknown. job: of SLURM; "" outside of one. restart: how
    often the job was queued again before this. since: UTC, ISO 8601; "" if unknown.
    """

    token: str
    host: str
    place: str
    pid: int
    started: int | None
    job: str = ""
    restart: str = ""
    since: str = ""

    @property
    def where(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    @property
    def is_here(self) -> bool:
        """Whether one sees here whether its process runs."""
        return self.place == this_place() and not is_hidden(self.pid)

    @property
    def runs_here(self) -> bool:
        return self.is_here and is_running(self.pid, self.started)

    @property
    def is_earlier_start_of_this_job(self) -> bool:
        return bool(self.job) and self.job == own_job() and self.restart != _own_restart()


#: Seconds within which a host that has renamed a file of another owner by mistake has put it back.
SETTLING = 0.5
#: Bytes of the file at most.
LARGEST = 1 << 16
#: What file systems say that have no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
#: Of a file that names nobody.
UNKNOWN = Owner("", "an unknown host", "", 0, None)


def own_job() -> str:
    """This job of SLURM, with its place in an array; "" outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _own_restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "")


def new_owner(token: str | None = None) -> Owner:
    """This process. token: by default a new one."""
    pid, now = os.getpid(), datetime.datetime.now(datetime.UTC)
    return Owner(
        token or uuid.uuid4().hex, socket.gethostname(), this_place(), pid, started_at(pid), own_job(),
        _own_restart(), now.isoformat(timespec="seconds"),
    )  # fmt: skip


def take(path: Path, mine: Owner, is_dead: Callable[[Owner, float], bool], lock: Path) -> Owner | None:
    """Makes `mine` the owner and returns None; or returns the owner that there is and that is not dead.

    is_dead(owner, age): whether it owns no more; age: seconds since it was renewed, by the clock of the file
    system, which hosts share. lock: a file, which is made, or a directory, for processes of this host. Where
    another host may be taking it at the same time this lasts SETTLING seconds. Raises OSError.
    """
    draft = path.with_name(f".{path.name}.{mine.token}")
    with _lock_of_this_host(lock):
        try:
            _write(draft, mine)
            removed = _remove_dead(
                path, mine.token, lambda owner: is_dead(owner, age_of(path, draft.stat().st_mtime))
            )
            _create(path, draft)
            return _settled(path, mine, draft) if removed or _has_rivals(path, draft) else None
        except FileExistsError:
            return settled_owner(path) or UNKNOWN
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def owner_of(path: Path) -> Owner | None:
    """Whom the file names, dead or not; None without a file."""
    try:
        return checked(Owner, read_json(path, LARGEST))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        return UNKNOWN


def settled_owner(path: Path) -> Owner | None:
    """The same, but that the file is gone is believed only on a second look: see `SETTLING`."""
    owner = owner_of(path)
    if owner is None:
        time.sleep(SETTLING)
        owner = owner_of(path)
    return owner


def age_of(path: Path, now: float | None = None) -> float:
    """Seconds since the owner was renewed; 0 without a file. now: by the same clock as the file's times; None
    for this host's clock."""
    try:
        return (time.time() if now is None else now) - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def renew(path: Path) -> None:
    """Says that the owner goes on."""
    with contextlib.suppress(OSError):  # a file system that does not answer may do so in time
        os.utime(path)


def _write(path: Path, owner: Owner) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(owner)) + "\n")
        file.flush()
        os.fsync(file.fileno())


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


def _has_rivals(path: Path, draft: Path) -> bool:
    """Whether others are in the middle of `take`, or were killed there."""
    return any(other != draft for other in path.parent.glob(f".{path.name}.*"))


def _settled(path: Path, mine: Owner, draft: Path) -> Owner | None:
    """Who the owner is once others have seen that the dead one is gone; None if it is `mine`.

    One that has read the dead owner's name before may rename this owner's file after it, and a third may
    take the place before it is put back. Raises FileExistsError.
    """
    time.sleep(SETTLING)
    owner = settled_owner(path)
    if owner is None:
        _create(path, draft)
    return None if owner is None or owner.token == mine.token else owner


def _remove_dead(path: Path, token: str, is_dead: Callable[[Owner], bool]) -> bool:
    """Removes the file of a dead owner; returns whether it has tried. Another host may be doing the same at
    this moment, and be the owner already; then its file is put back.
    """
    dead = owner_of(path)
    if dead is None or not is_dead(dead):
        return False
    aside = path.with_name(f".{path.name}.{token}.dead")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    if owner_of(aside) != dead:
        with contextlib.suppress(FileExistsError):
            _create(path, aside)
    aside.unlink()
    return True


@contextlib.contextmanager
def _lock_of_this_host(lock: Path) -> Iterator[None]:
    flags = os.O_RDONLY if lock.is_dir() else os.O_WRONLY | os.O_CREAT
    handle = os.open(lock, flags, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: files are still created only once
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
