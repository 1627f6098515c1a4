"""The adapted model, and what belongs around every optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.api.watch import GradientWatch
from distlora.engine import boundary
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.exports.starting import Start
from distlora.methods import Method
from distlora.recompose.recomposer import Recomposer
from distlora.recompose.report import RecompositionReport


class Adapted:
    """A model with adapter layers: what `attach` returns, and every other call is given.

    model: the bare one. method: as it is put on these layers. layers: by name in the model. trained: names of
    all trained parameters. steps: optimizer steps taken since the start of the run.
    """

    def __init__(self, model: nn.Module, attached: Attached, start: Start | None = None):
        self.model, self.attached, self.steps = model, attached, 0
        #: The adapter in PEFT's files that `initialise` starts from.
        self.start = start
        #: L2 norm of the last step's averaged gradient before a method transformed it; None where none does.
        self.norm_before_transform: float | None = None
        self._engine: Engine | None = None
        self._recomposer: Recomposer | None = None
        #: Looks for tensors that do not train in the first steps here; None where nobody asks.
        self._watch: GradientWatch | None = None
        #: A start that broke off may have changed weights.
        self._broken = False
        #: Between `before_step` and `after_step`: whether the step is one of the optimizer.
        self._at_boundary: bool | None = None
        self._losses: list[float] = []

    @property
    def method(self) -> Method:
        return self.attached.method

    @property
    def layers(self) -> dict[str, AdapterLinear]:
        return self.attached.layers

    @property
    def trained(self) -> list[str]:
        return self.attached.trained

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, to make an optimizer of."""
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.attached.trained]

    @property
    def engine(self) -> Engine:
        """Our view of what trains the model. Errors: UserError before `initialise` or `load`."""
        if self._engine is None:
            raise UserError("the adapter has no factors yet: call distlora.initialise or distlora.load first")
        return self._engine

    @property
    def recomposer(self) -> Recomposer:
        """Errors: UserError before `initialise` or `load`, and after a `load` that is not for training."""
        if self.engine is not None and self._recomposer is None:
            raise UserError("the adapter was loaded for evaluation; load it with training=True to train it")
        return self._recomposer

    def begin(
        self, engine: Engine, recomposer: Recomposer | None, check_gradients: bool, steps: int | None
    ) -> None:
        """The layers have their factors now. For `initialise` and `load`. steps: of the whole run, if that is
        known.
        """
        self._engine, self._recomposer = engine, recomposer
        if check_gradients:
            self._watch = GradientWatch(self.method, self.layers, steps)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around what changes weights before `begin`. What breaks off in it cannot be tried again."""
        self._broken = True
        yield
        self._broken = False

    def refuse_second_start(self) -> None:
        """UserError where the adapter has its factors, or an earlier start broke off."""
        again = "attach to a newly loaded model"
        if self._broken:
            raise UserError(f"an earlier start broke off after weights were changed: {again}")
        if self._engine is not None:
            raise UserError(f"the adapter has its factors already; {again} to start or load another")

    @property
    def begun(self) -> bool:
        """Whether `initialise` or `load` has given the layers their factors."""
        return self._engine is not None

    @property
    def amid_step(self) -> bool:
        """Whether `before_step` was called and `after_step` was not yet."""
        return self._at_boundary is not None

    # ------------------------------------------------------------------ around every step

    def before_step(self) -> None:
        """After the backward pass, before the optimizer's step; does nothing where gradients still add up.

        Scores see the averaged gradients, and a method that transforms gradients does so. The first steps
        look for tensors that do not train, see `distlora.api.watch`. Clip plain PyTorch's gradients before
        this call, or after it where the start was told so (`clips_after`); a DeepSpeed engine clips by
        itself, after it. Errors: TrainingError that names a tensor which does not train.
        """
        recomposer, engine = self.recomposer, self.engine
        if self._at_boundary is not None:
            raise UserError("before_step was called twice: call after_step once the engine has made its step")
        due = engine.at_boundary()
        if due:
            if self._watch is not None and not self._watch.done:
                self._watch.look(engine, self.steps + 1)
            recomposer.on_gradient()
            self.norm_before_transform = boundary.before_step(engine)
        self._at_boundary = due

    def after_step(self, loss: float | torch.Tensor | None = None) -> RecompositionReport | None:
        """After the optimizer's step; does nothing where gradients still add up.

        Recomposes where the method's schedule says so, and returns what was decided, if anything was. loss:
        of this rank's batch; only an adaptive schedule asks for it.
        """
        recomposer = self.recomposer
        if self._at_boundary is None:
            raise UserError(
                "after_step was called without before_step, which belongs before the engine's step"
            )
        due, self._at_boundary = self._at_boundary, None
        if recomposer.follows_loss:
            if loss is None:
                raise UserError("an adaptive schedule decides by the loss: call after_step(loss)")
            self._losses.append(float(loss))
        if not due:
            return None
        self.steps += 1
        boundary.after_step(self.engine)
        return recomposer.after_step(self.steps, self._mean_loss())

    def _mean_loss(self) -> float:
        """Of the micro-batches since the last step, over all ranks; 0 where nobody asks for it."""
        losses, self._losses = self._losses, []
        if not losses:
            return 0.0
        comm = self.engine.comm
        return comm.sum(sum(losses) / len(losses))[0] / comm.world_size
