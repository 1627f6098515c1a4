"""Whether everything that is to be trained has a gradient, watched over the first steps.

A gradient may be zero for some steps and come later: A while B is still zero, and everything within a block
that begins as no change at all (the new blocks of LLaMA-Pro, whose last projections are zero). It never comes
where a layer is not part of the computation. So a tensor may be silent for a while, unless its layer is not
called at all.
"""

import logging

import torch

from distlora.adapter.layer import AdapterLinear
from distlora.adapter.reach import pattern_of
from distlora.adapter.targets import in_short
from distlora.engine.protocol import Engine
from distlora.errors import TrainingError
from distlora.methods import Method

#: Steps within which a first gradient must come. A block that begins as no change has all of them in the
#: third one, and a step with a learning rate of 0, as the first of a warm-up, comes on top.
PATIENCE = 5
#: Steps that are looked at in any case: a gradient that is not finite may come with the second one.
LEAST = 2

log = logging.getLogger(__name__)


class GradientWatch:
    """Of one start of a run. method: of all layers. steps: of the whole run, if that is known."""

    def __init__(self, method: Method, layers: dict[str, AdapterLinear], steps: int | None = None):
        self._method, self._layers, self._steps = method, layers, steps
        self._seen = 0
        #: Trained tensors without a gradient in any step so far; None before the first.
        self._silent: set[str] | None = None

    @property
    def done(self) -> bool:
        return self._seen >= PATIENCE or (self._seen >= LEAST and not self._silent)

    def look(self, engine: Engine, step: int) -> None:
        """Before the optimizer's step; collective. step: its number, from 1 on. Errors: TrainingError for a
        gradient that is not finite, a layer that was not called, and a tensor that had no gradient in any of
        the first steps.
        """
        verdicts = engine.silent_tensors()
        for name, verdict in verdicts.items():
            if verdict != "zero":
                raise TrainingError(
                    f"the gradient of {name} is {verdict} at step {step}, so it would not be trained"
                )
        silent = set(verdicts)
        self._silent = silent if self._silent is None else self._silent & silent
        self._seen += 1
        if self._silent:
            self._judge(engine, [name for name in verdicts if name in self._silent], step)

    def _judge(self, engine: Engine, silent: list[str], step: int) -> None:
        called = self._called(engine)
        for name in silent:
            if called.get(_layer(name)) is False and not self._has_called_sibling(_layer(name), called):
                raise TrainingError(
                    f"the gradient of {name} is zero at step {step}, so it would not be trained: the model "
                    f"has not called the layer {_layer(name)}; leave it out of targets"
                )
        if self._seen < PATIENCE:
            if step == self._steps:
                log.warning("without a gradient in this short run: %s", in_short(silent))
            return
        for name in silent:
            if called.get(_layer(name)) is not False and not self._is_excused(engine, name):
                raise TrainingError(
                    f"the gradient of {name} was zero in {PATIENCE} steps up to step {step}, so it would not "
                    f"be trained; leave {_layer(name)} out of targets"
                )
        idle = dict.fromkeys(_layer(name) for name in silent if called.get(_layer(name)) is False)
        if idle:
            log.warning("not called in the first %d steps: %s", PATIENCE, in_short(idle))

    def _called(self, engine: Engine) -> dict[str, bool]:
        """By layer, whether any rank has called it. Collective."""
        flags = [float(layer.called) for layer in self._layers.values()]
        total = (
            engine.comm.all_reduce(torch.tensor(flags, device=engine.comm.device)).tolist() if flags else []
        )
        return {name: bool(flag) for name, flag in zip(self._layers, total)}

    @staticmethod
    def _has_called_sibling(layer: str, called: dict[str, bool]) -> bool:
        """Whether a layer of the same name in another place was called, as another expert of a mixture."""
        pattern = pattern_of(layer)
        return any(flag for other, flag in called.items() if pattern_of(other) == pattern)

    def _is_excused(self, engine: Engine, name: str) -> bool:
        """Whether a gradient is zero because another factor of the layer still is, as while the learning rate
        is 0. Collective.
        """
        layer, _, factor = name.rpartition(".")
        if factor not in self._method.zero_gradient_at_start or layer not in self._layers:
            return False
        others = engine.read(self._layers[layer])
        return any(not others[other].any() for other in self._method.trains if other != factor)


def _layer(name: str) -> str:
    """The layer of a trained tensor."""
    return name.rpartition(".")[0]
