"""One run, stage by stage: from loading to the exported adapter."""

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distlora import api
from distlora.adapter.attach import lora_parameters
from distlora.checkpoints.directory import Checkpoint
from distlora.cluster.status import StatusFile
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.optimizers import Schedule
from distlora.initialisation.factors import InitReport
from distlora.methods import NeedsProbe, ProbeSettings, Recomposes, TrainsWeight
from distlora.recipe.combination import check_length
from distlora.recipe.load import run_identity
from distlora.recipe.sections import Recipe
from distlora.training.build import Built, build
from distlora.training.continued import check_extra
from distlora.training.export_run import base_name
from distlora.training.loop import UNWRITTEN, Loop
from distlora.training.monitor import Monitor
from distlora.training.objective import objective_of
from distlora.training.rate_search import RateSearch, find_rate, search_rate
from distlora.training.samples import RunSamples, fetch
from distlora.training.seen_data import seen_by
from distlora.training.summary import record_summary
from distlora.training.targets import choose_targets
from distlora.training.writing import Writing

#: In a checkpoint's extra state: the learning rate that was found for `train.lr: search`.
FOUND_RATE = "found_rate"

log = logging.getLogger(__name__)


@dataclass
class Summary:
    """What a run came to. before, after, on the evaluation set: "loss", a classifier's metrics, and
    "exact_match" (0 … 1) where it was asked for. found_rate: the learning rate, where it was searched.
    """

    run_dir: Path
    adapter: Path | None
    trained: int
    lora_trained: int
    rank: int
    steps: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    init_seconds: float = 0.0
    step_seconds: float = 0.0
    found_rate: float | None = None
    tensorboard: str | None = None


class Run:
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
        fetch(comm, recipe)
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
        on_every_rank(comm, lambda: self.objective.prepare(self.data.preprocessor))
        settings = recipe.train
        self.steps = settings.steps or max(1, round(settings.epochs * self.data.order.steps_per_epoch))
        if status is not None:
            status.steps = self.steps
        self.schedule = None if settings.searches_lr else self._schedule(settings.lr)
        on_every_rank(comm, lambda: check_length(fitted, self.steps))
        self.built = build(comm, recipe, self.objective, chosen)
        comm.sum_or_stop()

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed config as it was resolved."""
        return self.built.deepspeed

    def _schedule(self, rate: float) -> Schedule:
        settings = self.recipe.train
        return Schedule(settings.schedule, rate, self.steps, settings.warmup_ratio)

    # ------------------------------------------------------------------ the stages

    def finish(self) -> Summary:
        """Everything from the first step, or the checkpoint's, to the exported adapter."""
        first = self.checkpoint.step if self.checkpoint else 0
        monitor = Monitor(self.built.engine, self.run_dir, first, self.writing)
        extra = self._initialise(monitor) if self.checkpoint is None else self._restore()
        monitor.make_up(extra.pop(UNWRITTEN, {}))
        if self.schedule is None:
            self.schedule = self._schedule(extra[FOUND_RATE])
        self._tell_reserve()
        summary = _summary(self.run_dir, self.built, self.recipe.method.rank, self.steps)
        summary.before, summary.init_seconds = extra["before"], extra["init_seconds"]
        summary.found_rate = extra.get(FOUND_RATE)
        if first == 0:
            monitor.write(0, {f"eval/{key}": value for key, value in summary.before.items()})
        loop = Loop(
            self.built.engine, self.built.adapted, self.recipe, self.data, self.objective.loss, self.schedule,
            self.steps, self.status, monitor, self.writing, self._scores if self.data.held_out else None,
        )  # fmt: skip
        summary.step_seconds = loop.run(extra, self.checkpoint and self.checkpoint.path) or 0.0
        if self.data.held_out:
            summary.after = self._evaluate()
            monitor.write(self.steps, {f"eval/{key}": value for key, value in summary.after.items()})
        self.writing.agree()
        summary.adapter = self._export()
        on_main(self.comm, self.run_dir, self.writing.check)
        record_summary(self.comm, asdict(summary), first, self.data.order.steps_per_epoch)
        return summary

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

    def _initialise(self, monitor: Monitor) -> dict[str, Any]:
        """Of a run that begins; returns what is remembered of its beginning."""
        before = self._evaluate_pretrained() if self.data.held_out else {}
        began = time.perf_counter()
        report = api.initialise(self.built.adapted, self.built.engine, **self._plan())
        seconds = time.perf_counter() - began
        self._tell_init(report, seconds, monitor)
        extra = {"before": before, "init_seconds": seconds}
        return extra | ({FOUND_RATE: self._find_rate(monitor)} if self.schedule is None else {})

    def _find_rate(self, monitor: Monitor) -> float:
        """The learning rate of a run that begins and asks for one."""
        engine, settings = self.built.engine, self.recipe.train.lr_search

        def search() -> RateSearch:
            steps, held_back = self.data.trial(settings.steps, settings.samples)
            return search_rate(engine, settings, steps, held_back, self.objective.loss)

        found = find_rate(self.writing, self.run_dir, run_identity(self.recipe), search)
        monitor.tell_rates(found.scalars(), found.tried)
        return found.rate

    def _restore(self) -> dict[str, Any]:
        """Of a run that goes on; returns what is remembered of its beginning."""
        plan = self._plan()
        state = api.load(self.built.adapted, self.built.engine, self.checkpoint, random_states=True, **plan)
        log.info("continuing from %s", self.checkpoint.path)
        return state["extra"]

    def _export(self) -> Path | None:
        if isinstance(self.built.adapted.method, TrainsWeight):
            return None
        base = base_name(self.recipe.model.path)
        on_main(self.comm, self.run_dir, self.writing.check)
        return api.export(self.built.adapted, self.run_dir / "adapter", base_model=base)

    # ------------------------------------------------------------------ what is told

    def _tell_init(self, report: InitReport, seconds: float, monitor: Monitor) -> None:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in report.scalars.items())
        layers, colon = len(self.built.adapted.layers), ": " if report.scalars else ""
        log.info("initialised %d layers in %.1f s%s%s", layers, seconds, colon, numbers)
        scalars = {f"init/{key}": value for key, value in report.scalars.items()}
        monitor.write(0, scalars | {"init/seconds": seconds})

    def _tell_reserve(self) -> None:
        held = self.built.adapted.recomposer.reserve_bytes()
        if held:
            log.info(
                "the reserve of new components takes %.1f MiB of host memory, on the rank with the most",
                held / 2**20,
            )

    # ------------------------------------------------------------------ evaluation

    def _scores(self) -> dict[str, float]:
        samples = self.data.held_out[: self.recipe.train.eval_samples]
        return self.objective.evaluate(self.built.engine, self.data.preprocessor, samples)

    def _evaluate(self) -> dict[str, float]:
        """The scores, and what takes longer."""
        scores = self._scores()
        result = scores | self.objective.generate(
            self.built.engine, self.data.preprocessor, self.data.held_out
        )
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
