"""The training loop: steps, evaluations and checkpoints, from one step of a run to its last."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlora import api
from distlora.checkpoints.directory import last_good
from distlora.cluster.status import StatusFile
from distlora.engine.coordination import on_main
from distlora.engine.protocol import Engine
from distlora.engine.random_state import random_states, restore_random_states
from distlora.engine.schedules import Schedule
from distlora.errors import Preempted, TrainingError, UserError
from distlora.models.router_loss import take_router_loss, wants_router_loss
from distlora.progress import phase
from distlora.recipe.every import is_due
from distlora.recipe.load import run_identity
from distlora.recipe.sections import Recipe
from distlora.training.bad_steps import MEMORY, BadStep
from distlora.training.evaluation_sets import worst_loss
from distlora.training.improvement import Improvement
from distlora.training.layer_looks import LayerLooks
from distlora.training.monitor import Monitor, Progress
from distlora.training.proofs import Proofs
from distlora.training.setbacks import Setbacks
from distlora.training.speed import Speed
from distlora.training.step_clock import StepClock
from distlora.training.writing import Writing

#: In a checkpoint's extra state: the evaluation after its step was cut short.
EVALUATION_DUE = "evaluation_due"
#: There too: what is known of the evaluations so far.
IMPROVEMENT = "improvement"
#: There too: ends of files for which there was no room.
UNWRITTEN = "unwritten"


@dataclass
class State:
    """What a checkpoint holds beside tensors. step: finished optimizer steps. random: the generators' states
    after them.
    """

    step: int
    extra: dict[str, Any]
    random: dict[str, torch.Tensor]


@dataclass
class Loop:
    """steps: of the whole run. unit: what its speed counts, "tokens" or "images". speed, looks: what monitors
    are told of each step, and of each layer. score: scores of the live model on the evaluation samples; None
    without such samples.
    """

    engine: Engine
    adapted: api.Adapted
    recipe: Recipe
    setbacks: Setbacks
    improvement: Improvement
    proofs: Proofs
    schedule: Schedule
    steps: int
    steps_per_epoch: int
    status: StatusFile
    monitor: Monitor
    writing: Writing
    unit: str
    speed: Speed
    looks: LayerLooks
    score: Callable[[], dict[str, float]] | None

    def run(self, extra: dict[str, Any], saved: Path | None) -> float | None:
        """From the adapter's step to the last one, or until evaluations no longer improve; returns the mean
        seconds of a step.

        extra: of the state that is gone on from. saved: its checkpoint. Errors: Preempted once what was
        reached is saved; TrainingError with the last good checkpoint in its sentence; GoBack; UserError where
        metrics and logs cannot be written any more, once what was reached is saved if it can be.
        """
        first = self.adapted.steps
        progress = Progress(self.steps, first)
        self.engine.train_mode(True)
        seconds, state = 0.0, self._state(extra)
        self.writing.agree()
        try:
            if extra.pop(EVALUATION_DUE, False) and self._look(state):
                self.improvement.keep()
            while self.adapted.steps < self.steps and not self.improvement.is_over:
                began = time.perf_counter()
                made = self._step_or_skip(state, progress)
                seconds += time.perf_counter() - began
                self.status.step = self.engine.comm.course.step = self.adapted.steps
                if made:
                    state = self._state(extra)
                self._stop_if_unwritable(state, saved)
                if not made:
                    continue
                self.looks.after_step(state.step)
                is_last, is_best = state.step == self.steps, False
                if not is_last and self._is_due(self.recipe.train.eval_every, state.step):
                    is_best = self._look(state)
                    is_last = self.improvement.is_over
                if is_last or is_best or self._is_due(self.recipe.train.save_every, state.step):
                    saved = self._save_or_tell(state, saved)
                if is_best:
                    self.improvement.keep()
        except Preempted:
            raise Preempted(self._leave(state, saved)) from None
        except TrainingError as error:
            there = last_good(self.recipe.output_dir) or "none"
            raise TrainingError(f"{error}; the last good checkpoint: {there}") from error
        finally:
            progress.close()
        made = self.adapted.steps - first
        return seconds / made if made else None

    def _state(self, extra: dict[str, Any]) -> State:
        return State(self.adapted.steps, extra, random_states(self.engine.comm.device))

    def _is_due(self, every: int | str | None, step: int) -> bool:
        return is_due(every, step, self.steps_per_epoch)

    def _step_or_skip(self, state: State, progress: Progress) -> bool:
        """One step after the state; False if it was a bad one, whose batch is left out now."""
        try:
            self._step(state.step, progress)
        except BadStep as bad:
            try:
                self.setbacks.meet(bad, state.step)
            except BadStep:
                at = f" at step {state.step + 1}"
                raise TrainingError(str(bad) if bad.taken else f"{bad}{at}") from bad
            restore_random_states(state.random, self.engine.comm.device)  # from which dropout has drawn
            return False
        return True

    def _step(self, step: int, progress: Progress) -> None:
        clock = StepClock(self.engine.comm.device)
        clock.start()
        batches = self.setbacks.batches(step)
        clock.mark("data")
        rate = self.schedule.rate(step)
        self.engine.set_rate(rate)
        take_router_loss(self.engine.module)  # of passes that were no steps
        loss = self.setbacks.gradients(batches, step, clock.mark)
        self.proofs.finite(step)
        self.adapted.before_step()
        clock.mark("method")
        info = self.engine.step()
        clock.mark("step")
        norm = self.adapted.norm_before_transform
        norm = info.grad_norm if norm is None else norm
        amount, padding = self.setbacks.load(step)
        speed = progress.advance(loss, rate, amount, self.unit, padding)
        scalars = {"loss": loss, "learning_rate": rate, "grad_norm": norm, f"{self.unit}_per_second": speed}
        scalars |= {} if padding is None else {"padding": padding}
        scalars |= self._router_loss()
        if self.setbacks.memory.left_out:
            scalars["bad_steps"] = self.setbacks.memory.before(step)
        told = {f"train/{key}": value for key, value in scalars.items()}
        self.monitor.write(step + 1, told | self.speed.scalars(clock.seconds(), amount, self.unit))
        if info.skipped or not math.isfinite(norm):
            raise BadStep(f"the optimizer refused step {step + 1}: its gradient is not finite", taken=True)
        self.setbacks.memory.remember_good(step + 1, loss)
        decided = self.adapted.after_step(loss)
        if decided is not None:
            self.monitor.tell_recomposition(decided)

    def _router_loss(self) -> dict[str, float]:
        """The router's part of the loss, before its coefficient, where the model has one. Collective."""
        if not wants_router_loss(self.engine.module):
            return {}
        total, targets = self.engine.comm.sum(*take_router_loss(self.engine.module))
        return {"aux_loss": total / targets} if targets else {}

    def _look(self, state: State) -> bool:
        """An evaluation on the way; whether it is the best so far, and its checkpoint to be kept. One that is
        cut short is owed by whoever goes on from here."""
        if self.score is None:
            return False
        state.extra = state.extra | {EVALUATION_DUE: True}
        with self.engine.comm.course.during("an evaluation"):
            scores = self.score()
        self.monitor.write(state.step, {f"eval/{key}": value for key, value in scores.items()})
        if math.isfinite(worst_loss(scores)):
            self.proofs.finite(state.step)
        del state.extra[EVALUATION_DUE]
        return self.improvement.look(scores, state.step)

    def _stop_if_unwritable(self, state: State, saved: Path | None) -> None:
        """Ends the run, with its last step saved where that can be, if a rank cannot write. Collective."""
        try:
            self.writing.agree()
        except UserError as error:
            if not self.writing.is_ours():
                raise
            there = self._try_to_save(state)
            kept = f"stopped after step {state.step}, which " + ("is saved" if there else "cannot be saved")
            raise UserError(f"{error}; {kept}; {goes_on(there or saved)}", agreed=error.agreed) from error

    def _try_to_save(self, state: State) -> Path | None:
        try:
            return self._save(state)
        except UserError:
            return None

    def _save_or_tell(self, state: State, saved: Path | None) -> Path:
        run_dir = Path(self.recipe.output_dir)
        try:
            saved = self._save(state)
            on_main(self.engine.comm, run_dir, lambda: self.status.write("running"))
        except UserError as error:
            if not self.writing.is_ours():
                raise
            raise UserError(f"{error}; {goes_on(saved)}", agreed=error.agreed) from error
        return saved

    def _save(self, state: State) -> Path:
        """Metrics that could not be written go with it."""
        settings, run_dir = self.recipe.train, Path(self.recipe.output_dir)
        unwritten = self.monitor.unwritten()
        extra = state.extra | {MEMORY: self.setbacks.memory.state(), IMPROVEMENT: self.improvement.state()}
        extra |= {UNWRITTEN: unwritten} if unwritten else {}
        with self.engine.comm.course.during("the saving of a checkpoint"), phase("saving a checkpoint"):
            saved = api.save(
                self.adapted, run_dir, step=state.step, identity=run_identity(self.recipe), extra=extra,
                keep=settings.keep_checkpoints, claimed=True, check=self.writing.check,
            )  # fmt: skip
        self.status.saved = state.step
        self.proofs.saved(saved, state.step)
        return saved

    def _leave(self, state: State, saved: Path | None) -> str:
        """Keeps the last completed step, whatever was begun of the next one; returns what to tell the
        user.
        """
        if state.step == 0:
            return (
                f"asked to stop before the first of {self.steps} steps was complete; "
                "the same command begins anew"
            )
        # Dropout has drawn for micro-batches that do not count.
        restore_random_states(state.random, self.engine.comm.device)
        there = Path(self.recipe.output_dir) / f"checkpoint-{state.step}"
        if saved != there:
            self._save(state)
        return (
            f"asked to stop: stopped after step {state.step} of {self.steps}; "
            f"the same command goes on from {there}"
        )


def goes_on(saved: Path | None) -> str:
    """What the same command will do."""
    return f"the same command goes on from {saved}" if saved else "the same command begins anew"
