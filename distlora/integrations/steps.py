"""The moments of a step that belong to the adapter, as accelerate and the Trainer offer them."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from transformers import TrainerCallback


class PausingEngine(DeepSpeedEngineWrapper):
    """How accelerate drives a DeepSpeed engine, with a call between the last backward pass and the step.

    before_step: what is called there, on every rank.
    """

    def __init__(self, engine: Any, before_step: Callable[[], None]):
        super().__init__(engine)
        self._before_step = before_step

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **settings: Any) -> None:
        """As accelerate's own. sync_gradients: whether this is the last micro-batch of the step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **settings)
        if sync_gradients:
            self._before_step()
            self.engine.step()


class AfterStep(TrainerCallback):
    """Calls `begin` before the first step, and `after_step` after every step of the optimizer."""

    def __init__(self, begin: Callable[[], None], after_step: Callable[[], None]):
        self._begin, self._after_step = begin, after_step

    def on_train_begin(self, *state: Any, **around: Any) -> None:
        self._begin()

    def on_optimizer_step(self, *state: Any, **around: Any) -> None:
        self._after_step()
