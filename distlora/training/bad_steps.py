"""Bad steps: those whose loss or gradient is not finite, or whose loss is far above its running median.

What a run does with one is `train.on_bad_step`. `stop` ends it. `skip` trains nothing with the batch and
takes the next one. `rollback` also goes back to the last good checkpoint. Either way the batch is left out of
the data order for good: the steps after it are those of a run that has never had it.

Only `train.bad_steps_limit` bad steps in a row, which end the run, are more likely the fault of the weights
than of so many batches: the next start with this limit meets them again, and one with a higher limit goes on
behind them.

Which batches are left out is in `bad_steps/left_out.json` of the run directory, because a run may go back
behind its newest checkpoint; and in every checkpoint, because those before its step are not to be changed any
more.
"""

import json
from bisect import insort
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from distlora.errors import TrainingError, UserError
from distlora.files.atomic import flush_directory, write_text
from distlora.files.json_files import LARGEST_NUMBER, checked, read_json
from distlora.training.run_directory import BAD_STEPS

#: In a checkpoint's extra state: what `BadSteps.state` gives.
MEMORY = "bad_steps"
LEFT_OUT = "left_out.json"

#: Losses that the running median is of, and how many there must be before a loss is held against it.
WINDOW, FEWEST = 64, 8


class BadStep(TrainingError):
    """A step that must not train anything. taken: the optimizer has made it all the same."""

    def __init__(self, sentence: str, taken: bool = False):
        super().__init__(sentence)
        self.taken = taken


class GoBack(Exception):
    """Ends the loop's work on this state of the weights: the run is to go on from its last good
    checkpoint."""


Count = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]


@dataclass(frozen=True)
class Stored:
    """What checkpoints and `left_out.json` hold: see `BadSteps`. losses: in checkpoints. in_row: the length
    of the row, where an earlier version has not written its batches.
    """

    left_out: list[Count]
    latest: Count
    row: list[Count] | None = None
    in_row: Count = 0
    losses: list[float] = field(default_factory=list)


@dataclass
class BadSteps:
    """What a run remembers of bad steps; the same on all ranks.

    left_out: numbers of global batches in the data order, ascending. row: those of them that were left out
    since a good step came further. latest: the number of the last bad step, counted from 1. losses: of the
    last good steps.
    """

    left_out: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    latest: int = 0
    losses: list[float] = field(default_factory=list)

    def position(self, step: int) -> int:
        """The number in the data order of the global batch that a step trains on, counted from 0."""
        return _position(self.left_out, step)

    def before(self, step: int) -> int:
        """How many batches were left out up to a step."""
        return self.position(step) - step

    def problem_with(self, loss: float, factor: float | None) -> str | None:
        """Why a finite loss is bad; None if it is not. factor: of the running median; None for no limit."""
        if factor is None or len(self.losses) < FEWEST:
            return None
        usual = median(self.losses)
        if not usual or loss <= factor * abs(usual):  # of zero there are no multiples
            return None
        return f"the training loss is {loss:.6g}, above {factor:g} times its running median {usual:.6g}"

    def remember_good(self, step: int, loss: float) -> None:
        """step: counted from 1."""
        self.losses = [*self.losses, loss][-WINDOW:]
        if step >= self.latest:
            self.row = []

    def leave_out(self, step: int) -> None:
        """The batch of a bad step, which is counted from 0."""
        batch = self.position(step)
        insort(self.left_out, batch)
        self.row, self.latest = [*self.row, batch], max(self.latest, step + 1)

    def meet_again(self, step: int) -> None:
        """Takes the batches of the row back into the data order, but for those that the weights after this
        many steps have passed already."""
        passed = _passed(self.left_out, step)
        self.left_out = [batch for batch in self.left_out if batch < passed or batch not in self.row]
        self.row = []

    # ------------------------------------------------------------------ to files and back

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return asdict(self)

    def recall(self, content: dict[str, Any] | None) -> None:
        """At the beginning of a start. content: of `read_left_out`."""
        if content is not None:
            stored = Stored(**content)
            self.left_out, self.latest = sorted(set(stored.left_out)), stored.latest
            row = self.left_out[len(self.left_out) - stored.in_row :] if stored.row is None else stored.row
            self.row = [batch for batch in row if batch in self.left_out]

    def go_on_from(self, step: int, state: dict[str, Any] | None) -> None:
        """Continues from a checkpoint after this many steps. state: as it was given; None in one of before it
        was written down, and without a checkpoint. Raises ValueError for a state that is none."""
        stored = checked(Stored, state) if state else Stored([], 0)
        known = sorted(set(stored.left_out))
        passed = _passed(known, step)
        # What the weights have passed is as the checkpoint says, what comes is as it was decided last.
        before = [batch for batch in known if batch < passed]
        self.left_out = before + [batch for batch in self.left_out if batch >= passed]
        self.row = [] if step >= self.latest else [batch for batch in self.row if batch in self.left_out]
        self.losses = list(stored.losses)

    def write(self, run_dir: Path) -> None:
        """On rank 0. Raises OSError."""
        folder = run_dir / BAD_STEPS
        folder.mkdir(exist_ok=True)
        content = {"left_out": self.left_out, "row": self.row, "latest": self.latest}
        write_text(folder / LEFT_OUT, json.dumps(content) + "\n")
        flush_directory(folder)
        flush_directory(run_dir)


def _position(left_out: list[int], step: int) -> int:
    """See `BadSteps.position`. left_out: ascending."""
    for batch in left_out:
        step += batch <= step
    return step


def _passed(left_out: list[int], steps: int) -> int:
    """The number of the first batch that is after all those of the first so many steps."""
    return _position(left_out, steps - 1) + 1 if steps else 0


def read_left_out(run_dir: Path) -> dict[str, Any] | None:
    """What `BadSteps.write` has written, as JSON; None without it. Raises UserError for a damaged file."""
    path = run_dir / BAD_STEPS / LEFT_OUT
    try:
        return asdict(checked(Stored, read_json(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(
            f"{path} does not say which batches are left out; bring it back, or remove it, and the run meets "
            "them again"
        ) from None
