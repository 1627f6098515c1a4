"""One run, stage by stage: from loading to the exported adapter."""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distlora import api
from distlora.adapter.attach import lora_parameters
from distlora.checkpoints.directory import Checkpoint
from distlora.cluster.status import StatusFile
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.random_state import random_states
from distlora.engine.schedules import Schedule
from distlora.errors import TrainingError
from distlora.exports.peft import problem_with_peft, stacks_of
from distlora.initialisation.factors import InitReport
from distlora.progress import phase
from distlora.recipe.combination import check_length
from distlora.recipe.load import run_identity
from distlora.recipe.sections import Recipe
from distlora.training import pictures
from distlora.training.about import about_run
from distlora.training.bad_steps import BadSteps, GoBack, read_left_out
from distlora.training.board import begin_table, end_table
from distlora.training.build import Built, build
from distlora.training.continued import check_extra
from distlora.training.evaluation_sets import generated_scores, scores_of_sets, worst_loss
from distlora.training.export_run import base_name
from distlora.training.improvement import Improvement
from distlora.training.layer_looks import LayerLooks
from distlora.training.loop import Loop
from distlora.training.objective import objective_of
from distlora.training.proofs import Proofs, refuse_bad_end
from distlora.training.rate_search import RateSearch, bad_rows, find_rate, search_rate, told_of_rows
from distlora.training.restoring import Restoring
from distlora.training.run_directory import BAD_STEPS
from distlora.training.samples import RunSamples, fetch
from distlora.training.seen_data import seen_by
from distlora.training.setbacks import Setbacks
from distlora.training.speed import speed_of
from distlora.training.summary import Summary, record_summary
from distlora.training.targets import choose_targets
from distlora.training.writing import Writing

#: In a checkpoint's extra state: the learning rate that was found for `train.lr: search`.
FOUND_RATE = "found_rate"

log = logging.getLogger(__name__)


class Run(Restoring):
    """The state of one run, in the order in which it comes about."""

    def __init__(
        self,
        comm: Comm,
        recipe: Recipe,
        checkpoint: Checkpoint | None,
        status: StatusFile | None = None,
        writing: Writing | None = None,
        allow_changed_data: bool = False,
    ):
        """checkpoint: to continue from. allow_changed_data: with whatever samples there are. Nothing is
        written to the run directory before `finish`. Raises Preempted between what takes long.
        """
        self.comm, self.recipe, self.checkpoint, self.status = comm, recipe, checkpoint, status
        self.run_dir, self.writing = Path(recipe.output_dir), writing or Writing(comm)
        self.objective = objective_of(recipe)
        comm.course.enter("fetching the model and the data", patient=True)
        fetch(comm, recipe)
        comm.course.enter("reading the data")
        comm.sum_or_stop()
        on_every_rank(comm, self.objective.check_length)
        chosen = on_every_rank(comm, lambda: choose_targets(recipe, self.objective))
        for line in chosen.lines:
            log.info("%s", line)
        fitted = recipe.model_copy(update={"method": chosen.method})
        self.data = RunSamples(comm, recipe, self.objective)
        self.seen = seen_by(comm, recipe, self.data)
        if checkpoint is not None:
            on_main(comm, self.run_dir, lambda: check_extra(checkpoint, recipe))
            on_main(comm, self.run_dir, lambda: self.seen.compare(self.run_dir, allow_changed_data))
        on_every_rank(comm, self._prepare_evaluation)
        settings = recipe.train
        self.steps = settings.steps or max(1, round(settings.epochs * self.data.order.steps_per_epoch))
        if status is not None:
            status.steps = self.steps
        self.schedule = None if settings.searches_lr else self._schedule(settings.lr)
        on_every_rank(comm, lambda: check_length(fitted, self.steps))
        self._chosen, self.bad_steps = chosen, BadSteps()
        self.proofs = Proofs(self.writing, settings.keep_checkpoints)
        self.improvement = Improvement(settings, self.writing, self.run_dir)
        comm.course.enter("loading the model")
        self.built = build(comm, recipe, self.objective, chosen)
        comm.sum_or_stop()

    def _prepare_evaluation(self) -> None:
        for each in self.data.evaluated:
            each.objective.prepare(self.data.preprocessor)

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed config as it was resolved."""
        return self.built.deepspeed

    def _schedule(self, rate: float) -> Schedule:
        settings = self.recipe.train
        return settings.schedule.of_run(rate, self.steps, settings.warmup_ratio)

    # ------------------------------------------------------------------ the stages

    def finish(self) -> Summary:
        """Everything from the first step, or the checkpoint's, to the exported adapter. Errors: TrainingError
        where training breaks, or the weights that it ends with are no good.
        """
        extra, first = self._begin()
        self._tell_reserve()
        summary = _summary(self.run_dir, self.built, self.recipe.method.rank, self.steps)
        summary.before, summary.init_seconds = extra["before"], extra["init_seconds"]
        summary.found_rate = extra.get(FOUND_RATE)
        summary.step_seconds = self._train(extra) or 0.0
        summary.steps = self.built.adapted.steps
        summary.stopped_early = summary.steps < self.steps
        self.comm.course.enter("the evaluation")
        if self.data.evaluated:
            summary.after = self._evaluate()
            self.monitor.write(summary.steps, _as_evaluation(summary.after))
        refuse_bad_end(self.proofs, summary.after, self.run_dir, summary.steps, self._has_finite_loss)
        if self.data.evaluated and self.improvement.look(summary.after, summary.steps):
            self.improvement.keep()
        summary.best = self.improvement.best
        end_table(self.built.engine, self.recipe)
        self.writing.agree()
        self.comm.course.enter("the export of the adapter")
        summary.adapter = self._export(summary)
        on_main(self.comm, self.run_dir, self.writing.check)
        record_summary(self.comm, asdict(summary), first, self.data.order.steps_per_epoch)
        return summary

    def _begin(self) -> tuple[dict[str, Any], int]:
        """What is remembered of the run's beginning, and the step from which this start goes on."""
        self.bad_steps.recall(
            self.comm.share(on_main(self.comm, self.run_dir, lambda: read_left_out(self.run_dir)))
        )
        if self.checkpoint is None:
            self._open_monitor()
            extra = self._initialise()
            self._first_random = random_states(self.comm.device)
        else:
            extra = self._resume()
            self._open_monitor(extra)
        step = self.checkpoint.step if self.checkpoint else 0
        if len(self.bad_steps.row) >= self.recipe.train.bad_steps_limit:
            self.bad_steps.meet_again(step)
            self.writing.on_main(self.run_dir / BAD_STEPS, lambda: self.bad_steps.write(self.run_dir))
        if self.schedule is None:
            self.schedule = self._schedule(extra[FOUND_RATE])
        self._before = extra["before"]
        begin_table(self.built.engine, self.recipe, self._before)
        return extra, step

    def _train(self, extra: dict[str, Any]) -> float | None:
        """All steps, as often as it takes; returns the mean seconds of one."""
        while True:
            self.comm.course.enter("training")
            try:
                return self._loop().run(extra, self.checkpoint and self.checkpoint.path)
            except GoBack:
                pass  # outside of this block, where nothing holds the engine any more
            extra = self._go_back()

    def _loop(self) -> Loop:
        built, settings = self.built, self.recipe.train
        setbacks = Setbacks(
            built.engine,
            self.data,
            self.objective.training_loss,
            settings,
            self.writing,
            self.run_dir,
            self.bad_steps,
        )
        return Loop(
            built.engine, built.adapted, self.recipe, setbacks, self.improvement, self.proofs, self.schedule,
            self.steps, self.data.order.steps_per_epoch, self.status, self.monitor, self.writing,
            self.objective.unit, speed_of(built.engine, self.recipe, self.objective, self.data.training),
            self._looks(), self._scores_on_the_way if self.data.evaluated else None,
        )  # fmt: skip

    def _looks(self) -> LayerLooks:
        adapted = self.built.adapted
        return LayerLooks(self.built.engine, adapted.method, adapted.layers, self.monitor, self.steps)

    def _initialise(self, before: dict[str, float] | None = None) -> dict[str, Any]:
        """Of a run that begins; returns what is remembered of its beginning. before: the scores of the
        pretrained model, or of the adapter that is started from, where they are known."""
        course, start = self.comm.course, self.built.adapted.start
        if before is None and start is None:
            course.enter("the evaluation of the pretrained model")
            before = self._evaluate_pretrained() if self.data.evaluated else {}
        course.enter("the initialisation")
        began = time.perf_counter()
        report = api.initialise(self.built.adapted, self.built.engine, **self._plan())
        seconds = time.perf_counter() - began
        self._tell_init(report, seconds)
        if start is not None:
            log.info("started from %s", start.files.directory)
        if before is None:
            before = self._evaluate() if self.data.evaluated else {}
        extra = {"before": before, "init_seconds": seconds}
        extra |= {FOUND_RATE: self._find_rate()} if self.recipe.train.searches_lr else {}
        self.monitor.write(0, _as_evaluation(before))
        return extra

    def _find_rate(self) -> float:
        """The learning rate of a run that begins and asks for one."""
        engine, settings = self.built.engine, self.recipe.train.lr_search
        self.comm.course.enter("the search for the learning rate")

        def search() -> RateSearch:
            loss = self.objective.loss
            steps, held_back = self.data.trial(settings.steps, settings.samples)
            try:
                return search_rate(engine, settings, steps, held_back, self.objective.training_loss)
            except TrainingError as error:
                rows = self.data.rows_of_trial(settings.steps, settings.samples)
                told = told_of_rows(*bad_rows(engine, rows, loss), self.recipe.data.split)
                raise TrainingError(f"{error}; {told}") from error

        found = find_rate(self.writing, self.run_dir, run_identity(self.recipe), search)
        self.monitor.tell_rates(found.scalars(), found.tried)
        return found.rate

    def _export(self, summary: Summary) -> Path | None:
        attached = self.built.adapted.attached
        if problem_with_peft(attached.method, stacks_of(attached)):
            return None
        base = base_name(self.recipe.model.path)
        on_main(self.comm, self.run_dir, self.writing.check)
        about = about_run(self.recipe, {"before": summary.before, "after": summary.after}, summary.steps)
        with phase("exporting the adapter"):
            return api.export(self.built.adapted, self.run_dir / "adapter", base_model=base, about=about)

    # ------------------------------------------------------------------ what is told

    def _tell_init(self, report: InitReport, seconds: float) -> None:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in report.scalars.items())
        layers, colon = len(self.built.adapted.layers), ": " if report.scalars else ""
        log.info("initialised %d layers in %.1f s%s%s", layers, seconds, colon, numbers)
        scalars = {f"init/{key}": value for key, value in report.scalars.items()}
        self.monitor.write(0, scalars | {"init/seconds": seconds})
        captured = report.layers.get("captured_energy")
        if captured:
            self.built.engine.on_board(lambda writer: pictures.add_captured_energy(writer, captured))
        self._looks().look(0)

    def _tell_reserve(self) -> None:
        held = self.built.adapted.recomposer.reserve_bytes()
        if held:
            log.info(
                "the reserve of new components takes %.1f MiB of host memory, on the rank with the most",
                held / 2**20,
            )

    # ------------------------------------------------------------------ evaluation

    def _scores(self) -> dict[str, float]:
        data, limit = self.data, self.recipe.train.eval_samples
        return scores_of_sets(data.evaluated, self.built.engine, data.preprocessor, limit)

    def _generated(self) -> dict[str, float]:
        return generated_scores(self.data.evaluated, self.built.engine, self.data.preprocessor)

    def _scores_on_the_way(self) -> dict[str, float]:
        """The scores, and what takes longer only where something follows it."""
        scores = self._scores()
        lacking = self.improvement.metrics - scores.keys()
        if lacking and not math.isfinite(worst_loss(scores)):
            return scores | dict.fromkeys(lacking, math.nan)
        return scores | self._generated() if lacking else scores

    def _evaluate(self) -> dict[str, float]:
        """The scores, and, where the loss is finite, what takes longer."""
        result = self._scores()
        if math.isfinite(worst_loss(result)):
            result |= self._generated()
        log.info("evaluation: %s", ", ".join(f"{key} {value:.4f}" for key, value in result.items()))
        return result

    def _evaluate_pretrained(self) -> dict[str, float]:
        """Before there are factors: zeros in their places are no change under most methods, but not under
        all.
        """
        with ExitStack() as stack:
            for layer in self.built.adapted.layers.values():
                stack.enter_context(layer.bare())
            return self._evaluate()


def _as_evaluation(scores: dict[str, float]) -> dict[str, float]:
    """For the metrics."""
    return {f"eval/{key}": value for key, value in scores.items()}


def _summary(run_dir: Path, built: Built, rank: int, steps: int) -> Summary:
    shapes = built.engine.trained_shapes()
    layers = {name: layer.whole_shape for name, layer in built.adapted.layers.items()}
    return Summary(
        run_dir,
        None,
        trained=sum(torch.Size(shape).numel() for shape in shapes.values()),
        lora_trained=lora_parameters(layers, rank),
        rank=rank,
        steps=steps,
        tensorboard=built.tensorboard,
    )
