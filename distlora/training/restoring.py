"""The weights that a run goes on from: a checkpoint's that are good, or those of the beginning."""

import gc
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from distlora import api
from distlora.checkpoints.directory import Checkpoint, give_up_later, newest
from distlora.checkpoints.soundness import soundness
from distlora.cluster.environment import note_resumed
from distlora.cluster.status import StatusFile
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main
from distlora.engine.random_state import restore_random_states
from distlora.engine.schedules import Schedule
from distlora.errors import UserError
from distlora.methods import NeedsProbe, ProbeSettings, Recomposes
from distlora.recipe.sections import Recipe
from distlora.training.bad_steps import MEMORY, BadSteps
from distlora.training.board import begin_board
from distlora.training.build import Built, build
from distlora.training.continued import check_extra
from distlora.training.improvement import Improvement
from distlora.training.loop import IMPROVEMENT, UNWRITTEN, goes_on
from distlora.training.monitor import Monitor
from distlora.training.objective import Objective
from distlora.training.proofs import Proofs, has_finite_loss
from distlora.training.run_directory import refuse_without_checkpoint
from distlora.training.samples import RunSamples
from distlora.training.targets import Chosen
from distlora.training.writing import Writing

log = logging.getLogger(__name__)


class Restoring(ABC):
    """What of a run comes to its weights. All of it is collective."""

    comm: Comm
    recipe: Recipe
    checkpoint: Checkpoint | None
    status: StatusFile | None
    run_dir: Path
    writing: Writing
    objective: Objective
    data: RunSamples
    schedule: Schedule | None
    steps: int
    built: Built
    monitor: Monitor
    proofs: Proofs
    improvement: Improvement
    bad_steps: BadSteps
    _chosen: Chosen
    #: Scores of the pretrained model.
    _before: dict[str, float]
    #: States of the generators before the first step, of a start that has begun the run.
    _first_random: dict[str, Tensor] | None = None

    @abstractmethod
    def _initialise(self, before: dict[str, float] | None = None) -> dict[str, Any]:
        """Of a run that begins; returns what is remembered of its beginning. before: the scores of the
        pretrained model, where they are known."""

    def _plan(self) -> dict[str, Any]:
        """What an adapter has to know of the run."""
        method = self.recipe.method
        refill = method.refill_probe() if isinstance(method, Recomposes) else None
        first = method.probe_settings() if isinstance(method, NeedsProbe) else None
        return {
            "probe": self._probe(refill or first), "steps": self.steps,
            # Of a rate that is to be found nobody asks: see `problem_with_search`.
            "first_rate": self.schedule and self.schedule.rate,
            "seed": self.recipe.train.seed, "pretrained": self.built.pretrained,
        }  # fmt: skip

    def _probe(self, settings: ProbeSettings | None):
        """The samples of the j-th probe; None where the method needs none."""
        return settings and (lambda number: self.data.probe_data(settings, number))

    def _open_monitor(self, extra: dict[str, Any] | None = None) -> None:
        """For the steps after the checkpoint. extra: of that."""
        step = self.checkpoint.step if self.checkpoint else 0
        begin_board(self.built.engine, self.run_dir, step)
        self.monitor = Monitor(self.built.engine, self.run_dir, step, self.writing)
        self.monitor.make_up((extra or {}).pop(UNWRITTEN, {}))
        if self.status is not None:
            self.status.step = self.status.saved = step

    def _restore(self) -> dict[str, Any]:
        """Of a run that goes on; returns what is remembered of its beginning."""
        on_main(self.comm, self.run_dir, lambda: check_extra(self.checkpoint, self.recipe))
        plan = self._plan()
        self.comm.course.enter("reading the checkpoint")
        state = api.load(self.built.adapted, self.built.engine, self.checkpoint, random_states=True, **plan)
        self.bad_steps.go_on_from(self.checkpoint.step, state["extra"].get(MEMORY))
        self.improvement.go_on_from(state["extra"].pop(IMPROVEMENT, None))
        log.info("continuing from %s", self.checkpoint.path)
        return state["extra"]

    def _resume(self) -> dict[str, Any]:
        """From the newest checkpoint whose weights are good; see `_restore`. Collective. Raises UserError
        where none is left."""
        extra = self._restore()
        while not self._is_good(self.checkpoint):
            self.checkpoint = newest(self.run_dir, self.comm)
            if self.checkpoint is None:
                on_main(self.comm, self.run_dir, lambda: refuse_without_checkpoint(self.run_dir))
            self._make_again()
            extra = self._restore()
        self.writing.on_main(self.run_dir, lambda: note_resumed(self.run_dir, self.checkpoint.step))
        return extra

    def _is_good(self, checkpoint: Checkpoint) -> bool:
        """Whether the weights that were restored are good. They are proven here where nothing has done so."""
        path = checkpoint.path
        if self.comm.share(on_main(self.comm, path, lambda: soundness(path))) == "good":
            return True
        good = self._has_finite_loss(checkpoint.step)
        if good:
            self.proofs.mark_good(path, "the loss of its weights was finite when the run went on from it")
        else:
            self.proofs.mark_bad(path, "the loss of its weights is not finite")
        self.writing.agree()
        return good

    def _has_finite_loss(self, step: int) -> bool:
        return has_finite_loss(self.built.engine, self.data, self.bad_steps, step, self.objective.loss)

    def _go_back(self) -> dict[str, Any]:
        """To the last good checkpoint, or to the beginning where there is none; see `_restore`."""
        self.checkpoint = newest(self.run_dir, self.comm, only_good=True)
        step = self.checkpoint and self.checkpoint.step
        log.warning("going back to step %d", step or 0)
        why = f"after a bad step the run went back to step {step}"
        self.writing.on_main(self.run_dir, lambda: give_up_later(self.run_dir, step, why))
        self._make_again()
        self.proofs.begin_again()
        if self.checkpoint is not None:
            extra = self._restore()
            self._open_monitor(extra)
            return extra
        self._open_monitor()
        extra = self._initialise(self._before)
        self.improvement.go_on_from(None)
        self.bad_steps.go_on_from(0, None)
        if self._first_random is not None:
            restore_random_states(self._first_random, self.comm.device)
        return extra

    def _make_again(self) -> None:
        """The model with its pretrained weights, in a new engine: only from there the frozen weights of a
        checkpoint can be had to the bit, since updates of rounded weights cannot be undone."""
        zero = (self.built.deepspeed or {}).get("zero_optimization", {})
        if zero.get("zero_hpz_partition_size", 1) > 1:
            raise UserError(
                "with zero_hpz_partition_size DeepSpeed cannot load the weights again in the same process; "
                f"{goes_on(self.checkpoint and self.checkpoint.path)}",
                agreed=True,
            )
        self.built.engine.release()
        self.built = self.monitor = None
        gc.collect()  # engine and model hold each other
        self.comm.course.enter("loading the model")
        self.built = build(self.comm, self.recipe, self.objective, self._chosen)
