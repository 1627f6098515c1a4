"""Bad steps are found, told and answered as `train.on_bad_step` says: see `distlora.training.bad_steps`."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from distlora.engine.protocol import Engine
from distlora.errors import TrainingError
from distlora.models.embedding_noise import EmbeddingNoise
from distlora.models.targets import Batch
from distlora.recipe.sections import TrainSection
from distlora.training.bad_batches import keep_batch
from distlora.training.bad_steps import BadStep, BadSteps, GoBack
from distlora.training.run_directory import BAD_STEPS
from distlora.training.samples import RunSamples
from distlora.training.step import LossSum, accumulate
from distlora.training.writing import Writing

log = logging.getLogger(__name__)


class Setbacks:
    """settings: of the run. memory: changed as the run goes on. All calls are collective, and all ranks come
    to the same decision.
    """

    def __init__(
        self, engine: Engine, data: RunSamples, loss: LossSum, settings: TrainSection, writing: Writing,
        run_dir: Path, memory: BadSteps,
    ):  # fmt: skip
        self._engine, self._data, self._loss = engine, data, loss
        self._settings, self._writing, self._run_dir, self.memory = settings, writing, run_dir, memory
        alpha = settings.neftune_alpha
        self._noise = alpha and EmbeddingNoise(alpha, settings.seed)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, counted from 0."""
        return self._data.of_step(self.memory.position(step))

    def load(self, step: int) -> tuple[int, float | None]:
        """Of all ranks' micro-batches of the step: see `RunSamples.load_of_step`."""
        return self._data.load_of_step(self.memory.position(step))

    def _loss_of_step(self, step: int) -> LossSum:
        if not self._noise:
            return self._loss
        comm = self._engine.comm
        return self._noise.of_step(
            self._loss, step, comm.rank, comm.world_size, self._settings.micro_batch_size
        )

    def gradients(self, batches: Sequence[Batch], step: int, mark: Callable[[str], None]) -> float:
        """Forward and backward over the batches of a step, counted from 0; returns the loss. Raises BadStep
        before the optimizer has changed anything: because of the loss, and where the run is to go on, because
        of the gradient as well. (Where it ends, the norm that the optimizer's own step tells is early enough,
        and saves a pass.) mark: as for `accumulate`.
        """
        settings = self._settings
        try:
            loss = accumulate(self._engine, batches, self._loss_of_step(step), mark)
        except TrainingError as error:
            raise BadStep(str(error)) from error
        problem = self.memory.problem_with(loss, settings.bad_loss_factor)
        if problem is None and settings.on_bad_step != "stop":
            norm = self._engine.gradient_norm()
            if not norm <= torch.finfo(torch.float32).max:  # nor NaN
                problem = f"the norm of the gradient is {norm:g}"
        (found,) = self._engine.comm.sum(float(problem is not None))
        if found:
            raise BadStep(problem or "another rank found its loss or gradient bad")
        return loss

    def meet(self, bad: BadStep, step: int) -> None:
        """Answers a bad step, counted from 0. Returns where the next batch takes its place. Raises GoBack;
        TrainingError where the run ends.
        """
        settings, batch = self._settings, self.memory.position(step)
        about = {"step": step + 1, "batch": batch, "why": str(bad)}
        goes_back = settings.on_bad_step == "rollback"
        skips = settings.on_bad_step == "skip" and not bad.taken
        if skips:
            self._engine.drop_step()
        keep_batch(self._engine, self._data, self._loss, self._writing, self._run_dir, about, not bad.taken)
        if not (goes_back or skips):
            log.warning(
                "its batch is kept in %s; with train.on_bad_step=rollback the same command leaves it out",
                self._run_dir / BAD_STEPS,
            )
            raise bad
        self.memory.leave_out(step)
        self._writing.on_main(self._run_dir / BAD_STEPS, lambda: self.memory.write(self._run_dir))
        if len(self.memory.row) >= settings.bad_steps_limit:
            raise TrainingError(
                f"{bad} at step {step + 1}, and that was bad step {len(self.memory.row)} in a row "
                f"(train.bad_steps_limit={settings.bad_steps_limit}): the same command meets these batches "
                "again, and goes on behind them with a higher limit"
            )
        log.warning("%s at step %d: batch %d is left out from here on", bad, step + 1, batch)
        if goes_back:
            raise GoBack
