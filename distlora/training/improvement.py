"""Whether evaluations still improve: `train.early_stopping` and `train.keep_best`."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.checkpoints.best import BEST, Best, write_best
from distlora.checkpoints.directory import problem_with
from distlora.engine.coordination import on_main
from distlora.errors import UserError
from distlora.recipe.sections import TrainSection
from distlora.training.writing import Writing

#: Scores that improve when they fall; all others improve when they rise.
FALLING = ("loss", "perplexity")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """Of early stopping. best: the value that the next evaluations are compared with; None before the first.
    waited: evaluations since then.
    """

    metric: str
    best: float | None = None
    waited: int = 0


@dataclass(frozen=True)
class Improved:
    """What a checkpoint holds of all this."""

    waiting: Waiting | None = None
    best: Best | None = None


class Improvement:
    """Follows the evaluations of a run. All ranks call it alike, with scores that are the same on all.

    best: of the evaluations so far, as far as its checkpoint is kept; None without `train.keep_best`.
    """

    def __init__(self, settings: TrainSection, writing: Writing, run_dir: Path):
        self._stopping, self._keeping = settings.early_stopping, settings.keep_best
        self._writing, self._run_dir = writing, run_dir
        self.best: Best | None = None
        self._waiting = self._stopping and Waiting(self._stopping.metric)

    @property
    def metrics(self) -> set[str]:
        """The scores that are followed."""
        return {followed.metric for followed in (self._stopping, self._keeping) if followed}

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough."""
        return self._waiting is not None and self._waiting.waited >= self._stopping.patience

    def look(self, scores: Mapping[str, float], step: int) -> bool:
        """After an evaluation of the weights after this many steps; whether they are the best so far, so that
        their checkpoint must be written, and then `keep` be called."""
        if self._waiting is not None:
            self._waiting = self._waited(scores[self._stopping.metric], step)
        if self._keeping is None:
            return False
        value, before = scores[self._keeping.metric], self.best
        if before is not None and not is_better(value, before.value, _mode(self._keeping)):
            return False
        if not math.isfinite(value):
            return False
        self.best = Best(self._keeping.metric, value, step)
        return True

    def _waited(self, value: float, step: int) -> Waiting:
        known, settings = self._waiting, self._stopping
        first = known.best is None and math.isfinite(value)
        if first or (
            known.best is not None and is_better(value, known.best, _mode(settings), settings.min_delta)
        ):
            return Waiting(known.metric, value)
        waited = Waiting(known.metric, known.best, known.waited + 1)
        if waited.waited >= settings.patience:
            log.info(
                "early stopping: %s has not improved in %d evaluations; the run ends after step %d",
                settings.metric, waited.waited, step,
            )  # fmt: skip
        return waited

    def keep(self) -> None:
        """The checkpoint of the best weights is written: it stays from here on. Collective."""
        self._writing.on_main(self._run_dir / BEST, lambda: write_best(self._run_dir, self.best))

    # ------------------------------------------------------------------ to checkpoints and back

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return asdict(Improved(self._waiting, self.best))

    def go_on_from(self, state: Mapping[str, Any] | None) -> None:
        """Continues from a checkpoint. state: as it was given; None without a checkpoint, and in one without
        such a state. Another metric than before begins anew. Collective."""
        found = state or {}
        waiting, best = found.get("waiting"), found.get("best")
        if self._stopping is not None:
            same = waiting is not None and waiting["metric"] == self._stopping.metric
            self._waiting = Waiting(**waiting) if same else Waiting(self._stopping.metric)
        if self._keeping is None:
            return
        self.best = Best(**best) if best is not None and best["metric"] == self._keeping.metric else None
        self._forget_if_lost()
        self.keep()

    def _forget_if_lost(self) -> None:
        """A run that goes back behind a best checkpoint may find the one before it removed."""
        if self.best is None:
            return
        path, comm = self._run_dir / f"checkpoint-{self.best.step}", self._writing.comm
        if comm.share(on_main(comm, path, lambda: problem_with(path, checksums=False))):
            log.warning("%s, the best so far, is not there any more: the next evaluation is the best", path)
            self.best = None


def is_better(value: float, than: float, mode: Literal["max", "min"], by_more_than: float = 0.0) -> bool:
    """Whether a score is better than another one. NaN is never better."""
    return value > than + by_more_than if mode == "max" else value < than - by_more_than


def _mode(followed) -> Literal["max", "min"]:
    """followed: a section with a metric and, perhaps, a mode."""
    return followed.mode or ("min" if followed.metric.rpartition("/")[2] in FALLING else "max")


def check_metrics(settings: TrainSection, there: Sequence[str]) -> None:
    """Raises UserError for a metric that no evaluation of the run has. there: those that it has."""
    for key in ("early_stopping", "keep_best"):
        followed = getattr(settings, key)
        if followed is not None and followed.metric not in there:
            generated = followed.metric.rpartition("/")[2] == "exact_match"
            hint = ", or set train.exact_match_samples" if generated else ""
            raise UserError(
                f"train.{key}.metric={followed.metric}: an evaluation of this run has {', '.join(there)}; "
                f"name one of these{hint}"
            )
