"""Bad steps: those whose loss or gradient is not finite, or whose loss is far above its running median.

What a run does with one is `train.on_bad_step`. `stop` ends it. `skip` trains nothing with the batch and
takes the next one. `rollback` also goes back to the last good checkpoint. Either way the batch is left out of
the data order for good: the steps after it are those of a run that has never had it. Which batches are left
out is in checkpoints and, because a run may go back behind the newest one, in `bad_steps/left_out.json` of
the run directory.
"""

import json
from bisect import insort
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from distlora.errors import TrainingError, UserError
from distlora.files.atomic import flush_directory, write_text
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


@dataclass
class BadSteps:
    """What a run remembers of bad steps; the same on all ranks.

    left_out: numbers of global batches in the data order, ascending. in_row: bad steps without a good one
    that came further. latest: the number of the last bad step, counted from 1. losses: of the last good
    steps.
    """

    left_out: list[int] = field(default_factory=list)
    in_row: int = 0
    latest: int = 0
    losses: list[float] = field(default_factory=list)

    def position(self, step: int) -> int:
        """The number in the data order of the global batch that a step trains on, counted from 0."""
        for left_out in self.left_out:
            step += left_out <= step
        return step

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
            self.in_row = 0

    def leave_out(self, step: int) -> None:
        """The batch of a bad step, which is counted from 0."""
        insort(self.left_out, self.position(step))
        self.in_row, self.latest = self.in_row + 1, max(self.latest, step + 1)

    # ------------------------------------------------------------------ to files and back

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return {
            "left_out": self.left_out, "in_row": self.in_row, "latest": self.latest, "losses": self.losses,
        }  # fmt: skip

    def go_on_from(self, step: int, state: dict[str, Any] | None) -> None:
        """Continues from a checkpoint after this many steps. state: as it was given; None in one of before it
        was written down, and without a checkpoint. What is remembered of batches stays."""
        state = state or {}
        found = state.get("left_out", [])
        if len(found) > len(self.left_out):
            self.in_row, self.latest = state["in_row"], state["latest"]
        self.left_out = sorted({*self.left_out, *found})
        self.losses = list(state.get("losses", []))
        if step >= self.latest:
            self.in_row = 0

    def write(self, run_dir: Path) -> None:
        """On rank 0. Raises OSError."""
        folder = run_dir / BAD_STEPS
        folder.mkdir(exist_ok=True)
        content = {"left_out": self.left_out, "in_row": self.in_row, "latest": self.latest}
        write_text(folder / LEFT_OUT, json.dumps(content) + "\n")
        flush_directory(folder)
        flush_directory(run_dir)


def read_left_out(run_dir: Path) -> dict[str, Any] | None:
    """What `BadSteps.write` has written, as JSON; None without it. Raises UserError for a damaged file."""
    path = run_dir / BAD_STEPS / LEFT_OUT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        numbers = [*found["left_out"], found["in_row"], found["latest"]]
        whole = len(found) == 3 and all(type(number) is int and 0 <= number < 2**53 for number in numbers)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"{path} does not say which batches are left out; bring it back, or remove it, and the run meets "
            "them again"
        )
    return found | {"left_out": sorted(set(found["left_out"]))}
