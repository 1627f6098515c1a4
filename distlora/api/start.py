"""Giving an adapter its factors: from the pretrained weights and a probe, or from a checkpoint."""

import os
from typing import Any

import torch

from distlora.api.adapted import Adapted
from distlora.api.plan import Plan, ProbeSource, Rate
from distlora.checkpoints.directory import Checkpoint, newest, of_step
from distlora.checkpoints.restore import restore
from distlora.engine.ledger import PretrainedWeights
from distlora.engine.local import LocalEngine
from distlora.engine.owners import open_ledger
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.initialisation.factors import InitReport, install_gradient_maps
from distlora.initialisation.factors import initialise as initialise_factors
from distlora.initialisation.probe import Loss
from distlora.methods import Method, NeedsProbe, TransformsGradients


def initialise(
    adapted: Adapted,
    engine: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    probe: ProbeSource | None = None,
    loss: Loss | None = None,
    steps: int | None = None,
    first_rate: Rate | None = None,
    clip: float | None = None,
    seed: int = 42,
    check_gradients: bool = True,
    pretrained: PretrainedWeights | None = None,
) -> InitReport:
    """Gives every layer its factors, the same at every ZeRO stage and on any number of ranks.

    engine: of `deepspeed.initialize`, at ZeRO stage 0 to 3, in float32 or bfloat16; None for plain PyTorch,
    with the `optimizer` of the trained parameters. probe, loss: where the method starts from gradients, this
    rank's batches, equally many on every rank, and (model, batch) to the mean loss of a batch; every batch
    counts alike. steps: of the whole run, where the method recomposes. first_rate: where the method's eta is
    "schedule". clip: norm to which gradients are clipped where a method transforms them; the engine's own
    clipping must then be off. check_gradients: whether the first steps look for tensors that do not train.
    pretrained: weights of packed layers as they were before that.
    """
    if adapted.has_begun:
        raise UserError("the adapter has its factors already: attach and initialise once")
    taken = getattr(engine, "global_steps", 0)
    if taken:
        raise UserError(
            f"the engine has made {taken} steps already: go on with distlora.load, from a checkpoint of "
            "distlora.save",
            agreed=True,
        )
    ours = _around(adapted, engine, optimizer, clip)
    plan = Plan(adapted, ours, probe, loss, steps, first_rate, seed)
    open_ledger(ours, adapted.attached, seed, pretrained, watched=ours is not engine)
    was_training = adapted.model.training
    first = plan.probe(0) if _probes_at_start(adapted.method) else None
    report = initialise_factors(ours, adapted.attached, seed, plan.rate(0), first)
    ours.train_mode(was_training)
    adapted.begin(ours, plan.recomposer(report), check_gradients)
    return report


def load(
    adapted: Adapted,
    engine: Any,
    checkpoint: str | os.PathLike | Checkpoint,
    *,
    step: int | None = None,
    training: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    probe: ProbeSource | None = None,
    loss: Loss | None = None,
    steps: int | None = None,
    first_rate: Rate | None = None,
    clip: float | None = None,
    seed: int = 42,
    check_gradients: bool = True,
    random_states: bool = False,
    pretrained: PretrainedWeights | None = None,
) -> dict[str, Any]:
    """Restores what `save` wrote, in place of `initialise`; returns its state ("step", "extra", …).

    The engine is new and holds the pretrained weights, or has just loaded its own checkpoint of the same
    step: which of the two it is, is found out. Any stage and number of ranks will do. checkpoint: the
    directory that `save` was given. step: of it; None: the newest complete one. training: False for
    evaluation and export alone. random_states: whether torch's global generators are set to what they were.
    The other arguments are those of `initialise`.
    """
    if adapted.has_begun:
        raise UserError("the adapter has its factors already: attach again before you load")
    ours = _around(adapted, engine, optimizer, clip)
    found = _find(checkpoint, step, ours)
    taken = getattr(engine, "global_steps", 0)
    if taken not in (0, found.step):
        where = f"the engine is at step {taken}, and {found.path} of step {found.step}"
        raise UserError(f"{where}: load the same step of both", agreed=True)
    plan = Plan(adapted, ours, probe, loss, steps, first_rate, seed)
    open_ledger(ours, adapted.attached, seed, pretrained, watched=ours is not engine)
    recomposer = plan.recomposer(None) if training else None
    state = restore(ours, adapted.attached, found, recomposer, random_states)
    install_gradient_maps(ours, adapted.attached)
    adapted.steps = found.step
    adapted.begin(ours, recomposer, check_gradients)
    return state


def _find(checkpoint: str | os.PathLike | Checkpoint, step: int | None, engine: Engine) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    found = of_step(checkpoint, step) if step is not None else newest(checkpoint, engine.comm)
    if found is None:
        raise UserError(f"{checkpoint} holds no complete checkpoint", agreed=True)
    return found


def _around(
    adapted: Adapted, engine: Any, optimizer: torch.optim.Optimizer | None, clip: float | None
) -> Engine:
    """Our view of what trains the model: an engine of ours as it is, one of DeepSpeed's, or an optimizer."""
    if hasattr(engine, "probe_pass"):
        return engine
    if engine is None:
        if optimizer is None:
            raise UserError("give the engine of deepspeed.initialize, or for plain PyTorch optimizer=…")
        return LocalEngine.around(adapted.model, optimizer, clip)
    if not any(base.__module__.startswith("deepspeed.") for base in type(engine).__mro__):
        raise UserError(f"{type(engine).__name__} is no DeepSpeed engine; for plain PyTorch give optimizer=…")
    _refuse_clipping_twice(adapted, engine)
    from distlora.engine.zero.engine import ZeroEngine  # late: plain PyTorch does without DeepSpeed

    return ZeroEngine.around(engine, adapted.model, clip)


def _refuse_clipping_twice(adapted: Adapted, engine: Any) -> None:
    if isinstance(adapted.method, TransformsGradients) and engine.gradient_clipping():
        raise UserError(
            f"method {adapted.method.name} transforms gradients, which DeepSpeed would then clip by their "
            "new norm: set gradient_clipping to 0 in its config, and give clip= here",
            agreed=True,
        )


def _probes_at_start(method: Method) -> bool:
    return isinstance(method, NeedsProbe) and method.probe_settings() is not None
