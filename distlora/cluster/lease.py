"""The lease of a run directory: one start owns it, and no other writes there meanwhile. `RUN/lease.json`.

It is a file as in `distlora.files.ownership`, held by rank 0. The lease of a process of this host ends
with the process. One of another host ends once it has been silent for STALE seconds. An owner that was
stopped for so long, or cut off, finds on waking up that its lease is gone, and writes nothing more. This
needs no torch.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from distlora.errors import UserError
from distlora.files import ownership
from distlora.files.ownership import Owner, new_owner, owner_of
from distlora.files.problems import dangling_link

LEASE = "lease.json"

#: Seconds between two renewals of a lease, and those of silence after which it ends.
BEAT, STALE = 10.0, 60.0

log = logging.getLogger(__name__)


class Lease:
    """What this start holds, from `take_lease` to `release`. Renewed by a thread."""

    def __init__(self, run_dir: Path, token: str, made: list[Path], clock: Callable[[], float]):
        """made: the directories that had to be made for it, outermost first."""
        self._run_dir, self._path, self._token = run_dir, run_dir / LEASE, token
        self._made, self._clock, self._seen = made, clock, clock()
        self._over, self._problem = threading.Event(), None
        self._thread = threading.Thread(target=self._renew, args=(BEAT,), daemon=True)

    def start(self) -> "Lease":
        self._thread.start()
        return self

    def problem(self, at_once: bool = False) -> UserError | None:
        """Why this start must write nothing more; None while it owns the directory. at_once: look, however
        short ago it was that one did."""
        now = self._clock()
        if self._problem is None and (at_once or now - self._seen > BEAT):
            self._look(now)
        return self._problem

    def release(self) -> None:
        """Gives the directory free. A start that has left nothing there takes away what it made for it."""
        self._over.set()
        with contextlib.suppress(OSError, UserError):
            if _holds(self._path, self._token):
                self._path.unlink()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # there is something in it
                return

    def _renew(self, beat: float) -> None:
        while not self._over.wait(beat) and self.problem(at_once=True) is None:
            ownership.renew(self._path)

    def _look(self, now: float) -> None:
        try:
            owner = ownership.settled_owner(self._path)
        except UserError:  # a file system that does not answer may do so in time
            return
        self._seen = now
        if owner is None or owner.token != self._token:
            who = "its lease is gone" if owner is None else f"{owner.where} has taken it over{_since(owner)}"
            self._problem = UserError(f"{self._run_dir}: {who}, and this start writes nothing more there")


def take_lease(
    run_dir: Path,
    token: str,
    take_over: bool = False,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Lease:
    """Makes this process the owner of a run directory, which is made if it is not there.

    token: the same for all ranks of this start, and for no other start. take_over: without waiting for the
    silence of another host. A start of the same job of SLURM, queued again, waits for it. Raises UserError
    with the owner if there is one that may still write, and for a directory that cannot be made.
    """
    made, mine = make_run_dir(run_dir), new_owner(token)
    lease = Lease(run_dir, token, made, clock)
    try:
        _wait_and_take(run_dir / LEASE, mine, take_over, pause)
    except BaseException:
        lease.release()
        raise
    return lease.start()


def _wait_and_take(path: Path, mine: Owner, take_over: bool, pause: Callable[[float], None]) -> None:
    before, renewals, silent = None, 0, 0.0
    while True:

        def is_dead(owner: Owner, age: float) -> bool:
            nonlocal silent
            silent = age
            if owner.is_here:
                return not owner.runs_here
            return take_over or age > STALE

        owner = ownership.take(path, mine, is_dead, path.parent)
        if owner is None:
            return
        renewals += before is not None and silent < before
        # A network file system may show the last sign of life of an owner that is dead only now, but not two.
        if not owner.is_earlier_start_of_this_job or owner.is_here or renewals > 1:
            raise UserError(_refusal(path.parent, owner, silent))
        if before is None:
            log.info("%s: waiting until %s has been silent for %.0f s", path.parent, owner.where, STALE)
        before = silent
        pause(1.0)


def _refusal(run_dir: Path, owner: Owner, silent: float) -> str:
    known = f"output_dir: {run_dir} is being written by {owner.where}{_since(owner)}"
    if owner.is_here:
        return f"{known}; wait for its end, or name another directory"
    return (
        f"{known}, last heard of {max(0.0, silent):.0f} s ago; wait for its end (a start that is "
        f"silent for {STALE:.0f} s counts as ended), or give --take-over if it is known to have ended"
    )


def make_run_dir(run_dir: Path) -> list[Path]:
    """Makes the directory; returns those that had to be made, outermost first. Raises UserError."""
    missing = [place for place in (run_dir, *run_dir.parents) if not place.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = dangling_link(run_dir) or error.strerror
        raise UserError(f"output_dir: {run_dir} cannot be made ({why}); name another directory") from None
    if not os.access(run_dir, os.W_OK):
        raise UserError(f"output_dir: {run_dir} cannot be written; name another directory")
    return missing[::-1]


def clear_drafts(run_dir: Path) -> None:
    """Removes what starts that were killed while they took the lease have left there. For the owner, as its
    own lease tells the time; what is not old may be of a start that is being refused."""
    for draft in run_dir.glob(f".{LEASE}.*"):
        with contextlib.suppress(OSError):
            if (run_dir / LEASE).stat().st_mtime - draft.stat().st_mtime > STALE:
                draft.unlink()


def _since(owner: Owner) -> str:
    return f", since {owner.since}" if owner.since else ""


def _holds(path: Path, token: str) -> bool:
    owner = owner_of(path)
    return owner is not None and owner.token == token


def living_owner(run_dir: Path) -> Owner | None:
    """Who owns the directory now, as far as can be told here; None if nobody does. Raises UserError."""
    owner = owner_of(run_dir / LEASE)
    if owner is None or (owner.is_here and not owner.runs_here):
        return None
    return owner if owner.is_here or ownership.age_of(run_dir / LEASE) <= STALE else None


def is_others(run_dir: Path, token: str) -> bool:
    """Whether another start owns the directory."""
    try:
        owner = owner_of(run_dir / LEASE)
    except UserError:
        return False
    return owner is not None and owner.token != token
