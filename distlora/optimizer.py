"""The optimizer and the learning-rate schedule: ours, and handed to whatever engine runs the model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer before it has parameters.

    lr: rate of the first step. betas, eps: AdamW's. momentum: SGD's. weight_decay: decoupled for AdamW, L2 for SGD.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if self.name == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def moments(self) -> tuple[str, ...]:
        """Keys of the elementwise state that the built optimizer keeps, under torch's names."""
        if self.name == "sgd":
            return ("momentum_buffer",) if self.momentum else ()
        return ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then constant, linear or cosine decay to zero.

    peak: the rate after warm-up. steps: length of the run. warmup_ratio: share of the steps that warm up, rounded up.
    """

    kind: Literal["constant", "linear", "cosine"]
    peak: float
    steps: int
    warmup_ratio: float = 0.0

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.steps)

    def rate(self, step: int) -> float:
        """Rate of the optimizer step `step`, 0 … steps−1. No step of a warm-up has rate zero: the first has peak / w."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * (1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The step count that the optimizer's state holds; 0 before the first step (and always 0 for SGD, which keeps none)."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=0)


def restore_state(optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Iterable[str], steps: int) -> dict:
    """State of one of the optimizer's (flat) parameters as after `steps` steps, to be filled in place.

    Moments that are there stay, new ones are zero, and without any moments the optimizer forgets the parameter.
    """
    moments = tuple(moments)
    if not moments:
        optimizer.state.pop(parameter, None)
        return {}
    state = optimizer.state[parameter]
    for key in moments:
        if key not in state:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if "exp_avg" in state:
        # torch's optimizers keep the count as a tensor, DeepSpeed's CPU Adam as an integer.
        of_torch = type(optimizer).__module__.startswith("torch.")
        state["step"] = torch.tensor(float(steps)) if of_torch else steps
    return state
