"""Which weights of a run have had a finite loss, and what its checkpoints are marked with for it."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from distlora.checkpoints.directory import last_good, prune
from distlora.checkpoints.soundness import mark
from distlora.engine.protocol import Engine
from distlora.errors import TrainingError
from distlora.training.bad_steps import BadSteps
from distlora.training.evaluation_sets import worst_loss
from distlora.training.samples import RunSamples
from distlora.training.step import LossSum, evaluation_loss
from distlora.training.writing import Writing

#: Batches of which one must have a finite loss. Of the first alone one could not tell whether it is the batch
#: or the weights that are bad.
ATTEMPTS = 3

log = logging.getLogger(__name__)


class Proofs:
    """keep: checkpoints that stay in the run directory. Nothing here is collective: all ranks call it alike,
    and rank 0 writes. What cannot be written is kept for `Writing.agree`.
    """

    def __init__(self, writing: Writing, keep: int):
        self._writing, self._keep = writing, keep
        self._seen = -1
        #: The newest checkpoint, as long as nothing is known of its weights; and its step.
        self._waiting: tuple[Path, int] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the newest checkpoint has its mark."""
        return self._waiting is None

    def saved(self, checkpoint: Path, step: int) -> None:
        """A checkpoint was written."""
        self._waiting = checkpoint, step
        self._settle()

    def begin_again(self) -> None:
        """The run has gone back: what was seen and saved since counts no more."""
        self._seen, self._waiting = -1, None

    def finite(self, step: int) -> None:
        """The weights after this many steps have had a finite loss."""
        self._seen = step
        self._settle()

    def _settle(self) -> None:
        if self._waiting is not None and self._waiting[1] == self._seen:
            (path, step), self._waiting = self._waiting, None
            self.mark_good(path, f"the loss of its weights, those after step {step}, is finite")

    def mark_good(self, path: Path, why: str) -> None:
        """Then an older one that was the last good one may go."""
        if self._writing.comm.is_main:
            with self._writing.errors.kept(path):
                self._writing.check(at_once=False)
                mark(path, "good", why)
                prune(path, self._keep)

    def mark_bad(self, path: Path, why: str) -> None:
        """And says so in the log."""
        log.warning("%s is marked bad: %s", path, why)
        if self._writing.comm.is_main:
            with self._writing.errors.kept(path):
                self._writing.check()
                mark(path, "bad", why)


def has_finite_loss(engine: Engine, data: RunSamples, bad_steps: BadSteps, step: int, loss: LossSum) -> bool:
    """Whether the weights after this many steps are good: one forward pass over the next batch that trains.
    Collective.

    Where its loss is not finite, the two batches after it are tried: a batch can be bad, too. Raises
    Preempted.
    """
    for ahead in range(step, step + ATTEMPTS):
        batches = data.of_step(bad_steps.position(ahead))
        if math.isfinite(evaluation_loss(engine, batches, loss)):
            return True
    return False


def refuse_bad_end(
    proofs: Proofs,
    scores: Mapping[str, float],
    run_dir: Path,
    step: int,
    has_finite_loss: Callable[[int], bool],
) -> None:
    """Raises TrainingError where the weights after the last step are no good; the last checkpoint is marked.

    scores: of these weights; empty where there is nothing to evaluate on. has_finite_loss: asked where the
    scores do not tell; collective.
    """
    loss = worst_loss(scores)
    ends_well = math.isfinite(loss) if scores else proofs.is_settled
    are_good = ends_well or has_finite_loss(step)
    if are_good:
        proofs.finite(step)
    else:
        last = run_dir / f"checkpoint-{step}"
        proofs.mark_bad(last, "the loss of its weights, those after the last step, is not finite")
    if ends_well or (are_good and not scores):
        return
    what = f"the loss of the last evaluation is {loss}" if scores else "the training loss is not finite"
    there = last_good(run_dir) or "none"
    raise TrainingError(
        f"{what} after step {step}, so nothing is exported; the last good checkpoint: {there}"
    )
