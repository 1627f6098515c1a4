"""Claims: no point is run twice at once, whatever sweeps are started, also on hosts that share the directory.

A claim is a file as in `distlora.files.ownership`. Of a sweep on this host one sees whether it, or its run,
still goes on. One of another host is taken for dead once it has not renewed its claim for STALE seconds,
or if it is an earlier start of this very job of SLURM.
"""

import socket
import time
from pathlib import Path

from distlora.errors import UserError
from distlora.files import ownership
from distlora.files.ownership import Owner, new_owner, owner_of
from distlora.sweeps.processes import marked

#: Seconds between two renewals of a claim, and those after which it is worth nothing. Network file systems
#: may show a file's times up to a minute late.
BEAT, STALE = 15.0, 120.0


class Lost(Exception):
    """Another sweep has taken this claim over, or its file is gone."""


class Claim:
    """A claim that this process holds."""

    def __init__(self, path: Path, token: str):
        self._path, self.token = path, token

    def renew(self) -> None:
        """Says that the owner goes on. Raises Lost."""
        if not self._is_held():
            raise Lost
        ownership.renew(self._path)

    def release(self) -> None:
        """Gives the point free, unless a process of its run is left, which nothing could end."""
        if self._is_held() and not marked(self.token):
            self._path.unlink(missing_ok=True)

    def _is_held(self) -> bool:
        owner = ownership.settled_owner(self._path)
        return owner is not None and owner.token == self.token


def take(path: Path) -> Claim | Owner:
    """The claim of a point; or its owner, if another sweep has it."""
    mine = new_owner()
    try:
        other = ownership.take(path, mine, _is_dead, _lock_path(path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return Claim(path, mine.token) if other is None else other


def holder_of(path: Path) -> Owner | None:
    """Who runs the point; None if nobody does, as far as can be told here."""
    owner = owner_of(path)
    dead = owner is None or _is_dead(owner, ownership.age_of(path, _now(path.parent)))
    return None if dead else owner


def _is_dead(owner: Owner, age: float) -> bool:
    """Whether nothing of it can still run, as far as can be told here. age: of its claim, in seconds."""
    if owner.is_earlier_start_of_this_job:
        return True
    if not owner.is_here:
        return age > STALE
    return not (owner.runs_here or marked(owner.token))


def _now(folder: Path) -> float:
    clock = _lock_path(folder)
    try:
        clock.touch()
        return clock.stat().st_mtime
    except OSError:
        return time.time()


def _lock_path(folder: Path) -> Path:
    return folder / f".lock-{socket.gethostname()}"
