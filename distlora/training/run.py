"""The state of one run, and what happens to it from loading to the exported adapter."""

import copy
import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distlora.adapter.attach import Attached, attach, lora_parameters, pack_linears
from distlora.adapter.packed import packer, scale_bytes
from distlora.checkpoints import checkpoint as checkpoints
from distlora.cluster.status import StatusFile
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec, Schedule
from distlora.engine.owners import open_ledger
from distlora.engine.protocol import Engine
from distlora.engine.random_state import random_states, reseed, restore_random_states
from distlora.errors import Preempted, TrainingError
from distlora.exports.peft import export_peft_from_engine
from distlora.initialise.factors import InitReport, initialise, install_gradient_maps
from distlora.initialise.heads import draw_heads
from distlora.initialise.pretrained import PretrainedFiles
from distlora.models.hub import resolve_path
from distlora.recipe.combination import check_length
from distlora.recipe.deepspeed_config import resolve_deepspeed
from distlora.recipe.load import run_identity
from distlora.recipe.sections import Recipe
from distlora.recompose.recomposer import Recomposer
from distlora.training.export_run import base_name
from distlora.training.monitor import Monitor, Progress
from distlora.training.objective import Objective, objective_of
from distlora.training.samples import RunData, fetch
from distlora.training.step import accumulate

log = logging.getLogger(__name__)

#: In a checkpoint's extra state: the evaluation after its step was cut short.
EVALUATION_DUE = "evaluation_due"


@dataclass
class _State:
    """What a checkpoint holds beside tensors. step: finished optimizer steps. random: the generators' states
    after them.
    """

    step: int
    extra: dict[str, Any]
    random: dict[str, torch.Tensor]


@dataclass
class Summary:
    """What a run came to. before, after, on the evaluation set: "loss", a classifier's metrics, and
    "exact_match" (0 … 1) where it was asked for."""

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
    tensorboard: str | None = None


def check_targets(recipe: Recipe, objective: Objective) -> Recipe:
    """Attaches the method to the model without weights: what is wrong with targets or rank shows before
    anything is loaded. Returns the recipe with the method fitted to the model."""
    model = objective.bare_model()
    return recipe.model_copy(
        update={"method": attach(model, recipe.method, recipe.targets, objective.head(model)).method}
    )


class Run:
    """The state of one run, in the order in which it comes about."""

    def __init__(
        self,
        comm: Comm,
        recipe: Recipe,
        checkpoint: checkpoints.Checkpoint | None,
        status: StatusFile | None = None,
    ):
        """checkpoint: to continue from, or to evaluate. status: of a run that is to train. Nothing is written
        to the run directory before `finish`. Raises Preempted between what takes long."""
        self.comm, self.recipe, self.checkpoint, self.status = comm, recipe, checkpoint, status
        self.run_dir = Path(recipe.output_dir)
        self.objective = objective_of(recipe)
        fetch(comm, recipe)
        comm.sum_or_stop()
        fitted = on_every_rank(comm, lambda: check_targets(recipe, self.objective))
        self.data = RunData(comm, recipe, self.objective)
        settings = recipe.train
        self.steps = settings.steps or max(1, round(settings.epochs * self.data.order.steps_per_epoch))
        if status is not None:
            status.steps = self.steps
        self.schedule = Schedule(settings.schedule, settings.lr, self.steps, settings.warmup_ratio)
        on_every_rank(comm, lambda: check_length(fitted, self.steps))

        config = on_every_rank(comm, self.objective.load_config)
        self.engine, self.tensorboard, self.resolved = on_every_rank(
            comm, lambda: _make_engine(comm, recipe, config)
        )
        self.attached = self._load_and_attach()
        comm.sum_or_stop()
        self.summary = self._summary()

    # ------------------------------------------------------------------ model

    def _load_and_attach(self) -> Attached:
        recipe, settings = self.recipe, self.recipe.train
        with self.engine.loading(whole=recipe.model.quantization is not None):
            model, new = self.objective.load_model()
        heads = new | self.objective.head(model)
        self._pack(model, heads)
        with self.engine.attaching():
            attached = attach(model, recipe.method, recipe.targets, heads)
        self.pretrained = None
        if recipe.model.quantization is not None and recipe.method.takes_from_weight:
            self.pretrained = on_every_rank(self.comm, lambda: self._pretrained(attached))
        self.engine.start(
            model,
            OptimizerSpec(lr=settings.lr, weight_decay=settings.weight_decay, **dict(settings.optimizer)),
        )
        draw_heads(self.engine, new, settings.seed)
        # From here on ranks may draw different numbers (dropout); new heads were drawn alike.
        reseed(settings.seed + self.comm.rank, self.comm.device)
        return attached

    def _pack(self, model: nn.Module, heads: set[str]) -> None:
        """Puts the linear weights into the form that the recipe asks for."""
        asked, storage = self.recipe.model.quantization, getattr(torch, self.recipe.model.dtype)
        if asked is None:
            return
        compute = asked.compute_dtype and getattr(torch, asked.compute_dtype)
        made = pack_linears(
            model, packer(asked.kind, storage, compute, asked.double), self.comm.device, heads
        )
        log.info(
            "%s: the weights of %d linear layers take %.1f MiB, and their scales %.1f MiB on every rank",
            asked.kind, len(made), sum(p.nbytes for p in made) / 2**20, sum(map(scale_bytes, made)) / 2**20,
        )  # fmt: skip

    def _pretrained(self, attached: Attached) -> PretrainedFiles:
        shapes = {name: layer.shape for name, layer in attached.layers.items() if layer.packing is not None}
        return PretrainedFiles(
            resolve_path(self.recipe.model.path), shapes, getattr(torch, self.recipe.model.dtype)
        )

    def _start(self) -> dict[str, Any]:
        """Initialises, or restores the checkpoint. Returns the caller's part of the checkpoint's state."""
        if self.checkpoint is None:
            state = self._initialise()
        else:
            open_ledger(self.engine, self.attached, self.recipe.train.seed, self.pretrained)
            self.recomposer = self._recomposer()
            state = checkpoints.restore(self.engine, self.attached, self.checkpoint, self.recomposer)
            install_gradient_maps(self.engine, self.attached)
            log.info("continuing from %s", self.checkpoint.path)
        held = self.recomposer.reserve_bytes()
        if held:
            log.info(
                "the reserve of new components takes %.1f MiB of host memory, on the rank with the most",
                held / 2**20,
            )
        return state

    def _initialise(self) -> dict[str, Any]:
        """The state of a run that begins."""
        seed = self.recipe.train.seed
        open_ledger(self.engine, self.attached, seed, self.pretrained)
        before = self._evaluate_pretrained() if self.data.held_out else {}
        began = time.perf_counter()
        settings = self.recipe.method.probe_settings()
        data = self.data.probe_data(settings) if settings else None
        report = initialise(self.engine, self.attached, seed, self.schedule.rate(0), data)
        self.recomposer = self._recomposer(report)
        seconds = time.perf_counter() - began
        self._tell_init(report, seconds)
        return {"step": 0, "extra": {"before": before, "init_seconds": seconds}}

    def _recomposer(self, report: InitReport | None = None) -> Recomposer:
        method = self.recipe.method
        settings = method.refill_probe() or method.probe_settings()
        return Recomposer(
            self.engine, self.attached, self.recipe.train.seed, self.steps, report and report.reserves,
            lambda number: self.data.probe_data(settings, number), self.schedule.rate,
        )  # fmt: skip

    def _tell_init(self, report: InitReport, seconds: float) -> None:
        log.info(
            "initialised %d layers in %.1f s%s%s", len(self.attached.layers), seconds, ": " if report.scalars else "",
            ", ".join(f"{key} {value:.4g}" for key, value in report.scalars.items()),
        )  # fmt: skip
        self.monitor.write(
            0, {f"init/{key}": value for key, value in report.scalars.items()} | {"init/seconds": seconds}
        )

    # ------------------------------------------------------------------ the run

    def finish(self) -> Summary:
        """Everything from the first step, or the checkpoint's, to the exported adapter."""
        self.monitor = Monitor(self.engine, self.run_dir, self.checkpoint.step if self.checkpoint else 0)
        state = self._start()
        first, extra = state["step"], state["extra"]
        self.summary.before, self.summary.init_seconds = extra["before"], extra["init_seconds"]
        if first == 0:
            self.monitor.write(0, {f"eval/{key}": value for key, value in self.summary.before.items()})
        self._train(first, extra)
        if self.data.held_out:
            self.summary.after = self._evaluate()
            self.monitor.write(
                self.steps, {f"eval/{key}": value for key, value in self.summary.after.items()}
            )
        if not self.attached.method.trains_weight:
            self.summary.adapter = self.run_dir / "adapter"
            base = base_name(self.recipe.model.path)
            export_peft_from_engine(self.engine, self.attached, self.summary.adapter, base, self.steps)
        return self.summary

    def evaluate_checkpoint(self) -> dict[str, float]:
        open_ledger(self.engine, self.attached, self.recipe.train.seed, self.pretrained)
        checkpoints.restore(
            self.engine, self.attached, self.checkpoint
        )  # nothing of what only further training needs
        return self._evaluate()

    def _train(self, first: int, extra: dict[str, Any]) -> None:
        settings = self.recipe.train
        progress = Progress(self.steps, first, self.comm.is_main)
        saved = good = self.checkpoint.path if self.checkpoint else None
        self.engine.train_mode(True)
        seconds, state = 0.0, _State(first, extra, random_states(self.comm.device))
        try:
            if extra.pop(EVALUATION_DUE, False):
                self._look(state)
            for step in range(first, self.steps):
                began = time.perf_counter()
                self._step(step, progress, just_started=step == first)
                seconds += time.perf_counter() - began
                good = saved  # the loss of its weights, or of later ones, has just turned out finite
                self.status.step = step + 1
                state = _State(step + 1, extra, random_states(self.comm.device))
                if (
                    settings.eval_every
                    and state.step % settings.eval_every == 0
                    and state.step < self.steps
                    and self.data.held_out
                ):
                    self._look(state)
                if state.step == self.steps or (
                    settings.save_every and state.step % settings.save_every == 0
                ):
                    saved = self._save(state)
        except Preempted:
            raise Preempted(self._leave(state, saved)) from None
        except TrainingError as error:
            there = good if good and good.exists() else "none"
            raise TrainingError(f"{error}; the last good checkpoint: {there}") from error
        finally:
            progress.close()
        if first < self.steps:
            self.summary.step_seconds = seconds / (self.steps - first)

    def _look(self, state: "_State") -> None:
        """An evaluation on the way. One that is cut short is owed by whoever goes on from here."""
        state.extra = state.extra | {EVALUATION_DUE: True}
        self.monitor.write(state.step, {f"eval/{key}": value for key, value in self._scores().items()})
        del state.extra[EVALUATION_DUE]

    def _save(self, state: "_State") -> Path:
        saved = checkpoints.save(
            self.engine, self.attached, self.run_dir, state.step, run_identity(self.recipe), state.extra,
            self.recipe.train.keep_checkpoints, recomposer=self.recomposer,
        )  # fmt: skip
        self.status.saved = state.step
        on_main(self.comm, self.run_dir, lambda: self.status.write("running"))
        return saved

    def _leave(self, state: "_State", saved: Path | None) -> str:
        """Keeps the last completed step, whatever was begun of the next one; returns what to tell the user."""
        if state.step == 0:
            return f"asked to stop before the first of {self.steps} steps was complete; the same command begins anew"
        restore_random_states(
            state.random, self.comm.device
        )  # dropout has drawn for micro-batches that do not count
        there = self.run_dir / f"checkpoint-{state.step}"
        if saved != there:
            self._save(state)
        return f"asked to stop: stopped after step {state.step} of {self.steps}; the same command goes on from {there}"

    def _step(self, step: int, progress: Progress, just_started: bool) -> None:
        batches = self.data.of_step(step)
        rate = self.schedule.rate(step)
        self.engine.set_rate(rate)
        try:
            loss = accumulate(self.engine, batches, self.objective.loss)
        except TrainingError as error:
            raise TrainingError(f"{error} at step {step + 1}") from error
        if just_started or step == 1:
            self._check_gradients(step)
        self.recomposer.on_gradient()
        info = self.engine.step()
        # Of all ranks, whose shares are alike up to one sample: exact enough for a speed, and no collective.
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches) * self.comm.world_size
        speed = progress.advance(loss, rate, tokens)
        scalars = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": info.grad_norm,
            "tokens_per_second": speed,
        }
        self.monitor.write(step + 1, {f"train/{key}": value for key, value in scalars.items()})
        if info.skipped or not math.isfinite(info.grad_norm):
            raise TrainingError(f"the optimizer refused step {step + 1}: its gradient is not finite")
        decided = self.recomposer.after_step(step + 1, loss)
        if decided is not None:
            self.monitor.tell_swap(decided)

    def _check_gradients(self, step: int) -> None:
        """Every trained tensor must have a finite gradient that is not zero, or it silently does not train."""
        excused = self.attached.method.zero_gradient_at_start if step == 0 else ()
        for name, verdict in self.engine.silent_tensors().items():
            if verdict != "zero" or name.rpartition(".")[2] not in excused:
                raise TrainingError(
                    f"the gradient of {name} is {verdict} at step {step + 1}, so it would not be trained"
                )

    # ------------------------------------------------------------------ looking on

    def _scores(self) -> dict[str, float]:
        return self.objective.evaluate(
            self.engine, self.data.tokenizer, self.data.held_out[: self.recipe.train.eval_samples]
        )

    def _evaluate_pretrained(self) -> dict[str, float]:
        """Before there are factors: zeros in their places are no change under most methods, but not under
        all.
        """
        with ExitStack() as stack:
            for layer in self.attached.layers.values():
                stack.enter_context(layer.bare())
            return self._evaluate()

    def _evaluate(self) -> dict[str, float]:
        """The scores, and what takes longer."""
        result = self._scores() | self.objective.generate(
            self.engine, self.data.tokenizer, self.data.held_out
        )
        log.info("evaluation: %s", ", ".join(f"{key} {value:.4f}" for key, value in result.items()))
        return result

    def _summary(self) -> Summary:
        shapes = self.engine.trained_shapes()
        layers = {name: layer.shape for name, layer in self.attached.layers.items()}
        rank = self.recipe.method.rank
        return Summary(
            self.run_dir,
            None,
            trained=sum(torch.Size(shape).numel() for shape in shapes.values()),
            lora_trained=lora_parameters(layers, rank),
            rank=rank,
            steps=self.steps,
            tensorboard=self.tensorboard,
        )


def _make_engine(comm: Comm, recipe: Recipe, config) -> tuple[Engine, str | None, dict[str, Any] | None]:
    """The only place that chooses between the engines. Also returns where TensorBoard's log will lie, if
    there is to be one, and the DeepSpeed config as it was resolved."""
    if recipe.deepspeed is None:
        return LocalEngine(comm, getattr(torch, recipe.model.dtype), recipe.train.clip), None, None
    from distlora.engine.zero.engine import (
        ZeroEngine,  # imported late: DeepSpeed takes seconds, and the plain engine does without it
    )

    hidden = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    resolved, lines = resolve_deepspeed(recipe, comm.world_size, hidden)
    for line in lines:
        log.info("%s", line)
    board = resolved.get("tensorboard", {})
    place = Path(board.get("output_path", ""), board.get("job_name", "")) if board.get("enabled") else None
    return ZeroEngine(comm, copy.deepcopy(resolved)), place and str(place), resolved
