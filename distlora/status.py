"""What became of a run: `RUN/status.json`, written by the run itself, because a launcher may swallow its exit code.

Reading needs neither torch nor DeepSpeed: launch scripts ask once a run has ended, see `distlora status`.
"""

import datetime
import json
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
    """state: "running" stays if the run is killed without a word. step, steps: finished optimizer steps, and of the whole run.
    requeue: another start would go on where this one ended. message: why it ended, in a sentence. start: tells one start of a run
    from the others. time: UTC, ISO 8601."""

    state: State
    step: int
    steps: int
    requeue: bool
    message: str
    start: str
    time: str

    @property
    def code(self) -> int:
        """The exit code that a launch script should go by: 0, 75 to start again, or 1."""
        return 0 if self.state == "done" else START_AGAIN if self.requeue else 1

    @property
    def line(self) -> str:
        state = "running, or ended without a word" if self.state == "running" else self.state
        return f"{state} at step {self.step} of {self.steps}" + (f": {self.message}" if self.message else "")

    @property
    def seconds(self) -> float:
        """When it was written, since the epoch."""
        return datetime.datetime.fromisoformat(self.time).timestamp()


class StatusFile:
    """One start's status, kept up to date by one of its processes at a time."""

    def __init__(self, run_dir: Path, steps: int, step: int, start: str):
        """step: where this start begins. start: the same on all ranks, see `new_start`."""
        self._path, self._steps, self._start = run_dir / STATUS, steps, start
        self.step = step

    def write(self, state: State, message: str = "", requeue: bool = False) -> None:
        """Replaces the file. Errors: OSError."""
        from distlora.tensorfile import write_text  # imported late: it brings torch, which readers do without

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        status = Status(state, self.step, self._steps, requeue, message, self._start, now)
        write_text(self._path, json.dumps(asdict(status), indent=1) + "\n")

    def is_own(self) -> bool:
        """Whether the run has not been started again meanwhile."""
        found = read_status(self._path.parent)
        return found is not None and found.start == self._start


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
