"""What became of a run: `RUN/status.json`, written by the run itself, because a launcher may swallow its exit
code.

Reading needs neither torch nor DeepSpeed: launch scripts ask once a run has ended, see `distlora status`.
"""

import datetime
import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distlora.errors import UserError

STATUS = "status.json"

#: Exit code of a run that should be started again: EX_TEMPFAIL of sysexits.h.
START_AGAIN = 75

State = Literal["running", "preempted", "failed", "done"]


@dataclass(frozen=True)
class Status:
    """state: "running" stays if the run is killed without a word. step, saved, steps: finished optimizer
    steps, those of the newest checkpoint (0 without one), and of the whole run (None before that is known).
    requeue: another start would go on where this one ended. message: why it ended, in a sentence. start:
    tells one start of a run from the others. time: UTC, ISO 8601."""

    state: State
    step: int
    steps: int | None
    requeue: bool
    message: str
    start: str
    time: str
    saved: int = 0

    @property
    def code(self) -> int:
        """The exit code that a launch script should go by: 0, 75 to start again, or 1."""
        return 0 if self.state == "done" else START_AGAIN if self.requeue else 1

    @property
    def line(self) -> str:
        state = "running, or ended without a word" if self.state == "running" else self.state
        whole = f" of {self.steps}" if self.steps else ""
        return f"{state} at step {self.step}{whole}" + (f": {self.message}" if self.message else "")

    @property
    def seconds(self) -> float:
        """When it was written, since the epoch."""
        return datetime.datetime.fromisoformat(self.time).timestamp()


class StatusFile:
    """One start's status. Rank 0 writes it; where that is gone, others do.

    step, saved, steps: as in `Status`; the run keeps them true.
    """

    def __init__(self, run_dir: Path, step: int, start: str):
        """step: where this start begins, that is, of the newest checkpoint. start: the same on all ranks, see
        `new_start`.
        """
        self._path, self._start = run_dir / STATUS, start
        self.step, self.saved, self.steps = step, step, None
        self._before = self._found()
        #: Whether the file is there, and so must say the truth.
        self.begun = self._before is not None

    def write(self, state: State, message: str = "", requeue: bool = False) -> None:
        """Replaces the file. Errors: OSError."""
        from distlora.files.tensors import (
            write_text,
        )  # imported late: it brings torch, which readers do without

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        if state == "failed" and requeue and self._failed_here_before():
            requeue = False
            message += "; not again, because the start before failed too, and nothing has been saved since"
        status = Status(state, self.step, self.steps, requeue, message, self._start, now, self.saved)
        write_text(
            self._path,
            json.dumps(asdict(status), indent=1) + "\n",
            writer=f"{socket.gethostname()}-{os.getpid()}",
        )
        self.begun = True

    def _failed_here_before(self) -> bool:
        """A third start would begin where this one and the last did, and fail there too."""
        before = self._before
        return (
            before is not None and before.state == "failed" and before.requeue and before.saved == self.saved
        )

    def is_open(self) -> bool:
        """Whether nobody has written how this start ended, and no other start has begun."""
        found = self._found()
        return found == self._before or (
            found is not None and (found.start, found.state) == (self._start, "running")
        )

    def _found(self) -> Status | None:
        try:
            return read_status(self._path.parent)
        except UserError:  # damaged: nothing that a run depends upon
            return None


def new_start() -> str:
    return uuid.uuid4().hex


def read_status(run_dir: Path) -> Status | None:
    """None without one. Raises UserError for a file that is none."""
    path = run_dir / STATUS
    try:
        return Status(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a run's status ({error}); look at the logs of the run") from None
