"""What became of a run: `RUN/status.json`. The run writes it, because a launcher may swallow its exit code.

Launch scripts read it once a run has ended, see `distlora status`. This needs neither torch nor DeepSpeed.
"""

import contextlib
import datetime
import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from distlora.cluster.lease import is_others
from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.files.confidential import hidden
from distlora.files.json_files import checked, read_json
from distlora.files.problems import FULL

STATUS = "status.json"
#: Room on the disk for the last words of a run that has filled it: the file and its replacement.
RESERVE, RESERVED_BYTES = ".status.reserve", 8192

#: Exit code of a run that should be started again: EX_TEMPFAIL of sysexits.h.
START_AGAIN = 75

#: A moment in ISO 8601, with its distance from UTC.
Time = Annotated[str, AfterValidator(lambda text: _moment(text) and text)]
State = Literal["running", "preempted", "failed", "done"]


@dataclass(frozen=True)
class Status:
    """The state of a run as its newest start has written it.

    state: it stays "running" if the run is killed without warning. step: finished optimizer steps. steps:
    those of the whole run; None before they are known. saved: the step of the newest checkpoint; 0 without
    one. requeue: whether the run should be started again and would continue where it ended. message: why it
    ended, in a sentence. start: a text that is different for every start of a run. time: UTC, ISO 8601.
    """

    state: State
    step: int
    steps: int | None
    requeue: bool
    message: str
    start: str
    time: Time
    saved: int = 0

    @property
    def code(self) -> int:
        """The exit code for a launch script: 0 if done, 75 to start the run again, else 1."""
        return 0 if self.state == "done" else START_AGAIN if self.requeue else 1

    def line(self, owner: str | None = None) -> str:
        """owner: where the start runs that owns the run directory; None without one."""
        state = self.state
        if state == "running":
            state = f"running ({owner})" if owner else "ended without saying why"
        whole = f" of {self.steps}" if self.steps else ""
        return f"{state} at step {self.step}{whole}" + (f": {self.message}" if self.message else "")

    @property
    def seconds(self) -> float:
        """When it was written, in seconds since the epoch."""
        return _moment(self.time).timestamp()


def _moment(text: str) -> datetime.datetime:
    """Raises ValueError."""
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None or not 1970 <= moment.year < 9999:
        raise ValueError(f"no moment in UTC: {text[:40]}")
    return moment


class StatusFile:
    """The status of one start. Rank 0 writes it; another rank does if rank 0 is gone.

    step, saved, steps: as in `Status`; the run updates them.
    """

    def __init__(self, run_dir: Path, step: int, start: str):
        """step: the step of the newest checkpoint, from which this start continues; 0 for a new run.

        start: what `new_start` has returned on rank 0; the same on all ranks.
        """
        self._path, self._start = run_dir / STATUS, start
        self.step, self.saved, self.steps = step, step, None
        self._before = self._found()
        #: Whether the directory is this start's.
        self.claimed = False
        #: Whether the file exists. From then on it must be kept correct.
        self.begun = self._before is not None

    def claim(self) -> None:
        """The directory is this start's from here on. Keeps some room on the disk for how it ends; raises
        OSError where there is none."""
        self._reserve()
        self.claimed = True

    @property
    def outlasts_refusal(self) -> bool:
        """Whether this start, if it is refused, is to leave what it has found: a run that is done stays done.

        Not so "preempted", by which a script would start the refused run again for ever.
        """
        return not self.claimed and self._before is not None and self._before.state == "done"

    def put_back(self) -> None:
        """Writes what this start has found, as if it had not been. Raises as `write` does."""
        self._refuse_if_superseded()
        self._replace(self._before)
        self.release()

    def _reserve(self) -> None:
        path = self._path.with_name(RESERVE)
        try:
            with path.open("wb") as file:
                file.write(os.urandom(RESERVED_BYTES))  # zeros may take no room
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Gives that room back, unless it is a newer start's."""
        if is_others(self._path.parent, self._start):
            return
        with contextlib.suppress(OSError):
            self._path.with_name(RESERVE).unlink(missing_ok=True)

    def write(self, state: State, message: str = "", requeue: bool = False) -> None:
        """Replaces the file; with what was reserved, if it is the end. The arguments are as in `Status`.

        Raises OSError, and UserError where another start has begun, whose status this is.
        """
        self._refuse_if_superseded()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        if state == "failed" and requeue and self._failed_here_before():
            requeue = False
            message += "; not again, because the start before failed too, and nothing has been saved since"
        status = Status(state, self.step, self.steps, requeue, hidden(message), self._start, now, self.saved)
        try:
            self._replace(status)
        except OSError as error:
            if state == "running" or error.errno not in FULL:
                raise
            self.release()
            self._replace(status)
        self.begun = True
        if state != "running":
            self.release()

    def _replace(self, status: Status) -> None:
        text = json.dumps(asdict(status), indent=1) + "\n"
        write_text(self._path, text, writer=f"{socket.gethostname()}-{os.getpid()}")

    def _refuse_if_superseded(self) -> None:
        found = self._found()
        newer = found is not None and found != self._before and found.start != self._start
        if newer or is_others(self._path.parent, self._start):
            raise UserError(
                f"{self._path.parent}: another start has begun there, and this one writes nothing more"
            )

    def _failed_here_before(self) -> bool:
        """Whether the start before failed at the same checkpoint. Then a third start would fail there too."""
        before = self._before
        return (
            before is not None and before.state == "failed" and before.requeue and before.saved == self.saved
        )

    def is_open(self) -> bool:
        """Whether no rank has written how this start ended, and no other start has begun."""
        found = self._found()
        return found == self._before or (
            found is not None and (found.start, found.state) == (self._start, "running")
        )

    def _found(self) -> Status | None:
        try:
            return read_status(self._path.parent)
        except UserError:  # damaged; a run does not depend on it
            return None


def new_start() -> str:
    """A text that is different for every start of a run."""
    return uuid.uuid4().hex


def read_status(run_dir: Path) -> Status | None:
    """The status in a run directory; None if there is no file. Raises UserError for a damaged file."""
    path = run_dir / STATUS
    try:
        return checked(Status, read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a run's status ({error}); look at the logs of the run") from None
