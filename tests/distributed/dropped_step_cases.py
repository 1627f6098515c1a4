"""A bad step that is dropped, on any engine: afterwards everything is as it was before."""

import math

import torch
from torch import Tensor

from distlora.engine.random_state import random_states
from distlora.errors import TrainingError
from distlora.models.losses import response_loss
from distlora.training.step import accumulate


def dropping(setting) -> dict[str, Tensor]:
    """A dropped step before the first one, two steps, another dropped step, of which the gradient alone is
    not finite, and two more steps. The answers are those of the four steps."""
    setting.start_from_random_factors()
    losses = []
    for first in (0, 2):
        before = _held(setting)
        _drop(setting, 90 + first, only_gradient=first == 2)
        after = _held(setting)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), f"{name} has changed"
        losses += setting.steps(first, first + 2)[0]
    return {"losses": torch.tensor(losses)} | setting.factors()


def _drop(setting, seed: int, only_gradient: bool) -> None:
    engine = setting.engine

    def poisoned(model, batch):
        loss, count = response_loss(model, batch)
        if not only_gradient:
            return loss * math.nan, count
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, count

    try:
        accumulate(engine, setting.batches(seed), poisoned)
        assert only_gradient and not math.isfinite(engine.gradient_norm())
    except TrainingError:
        assert not only_gradient
    engine.drop_step()


def _held(setting) -> dict[str, Tensor]:
    """Parameters as this rank stores them, masters and moments on rank 0, the generators' states, and
    counts."""
    engine = setting.engine
    with engine.probe_pass():  # lets go of what was gathered
        pass
    found = {
        name: getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }
    for name in engine.trained_shapes():
        for key, value in (engine.read_trained(name) or {}).items():
            found[f"{name} {key}"] = value.clone()
    found |= {f"generator of {name}": state for name, state in random_states(setting.comm.device).items()}
    counts = engine.steps_taken(), engine.engine_steps()
    return found | {"counts": torch.tensor(counts), "at boundary": torch.tensor(engine.at_boundary())}
