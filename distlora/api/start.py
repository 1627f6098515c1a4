"""Giving an adapter its factors: from the pretrained weights and a probe, or from a checkpoint."""

import os
from typing import Any

import torch

from distlora.api.adapted import Adapted
from distlora.api.plan import Plan, ProbeSource, Rate
from distlora.checkpoints.directory import Checkpoint, newest, of_step, share_checkpoint
from distlora.checkpoints.restore import restore
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.ledger import PretrainedWeights
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import steps_taken
from distlora.engine.owners import open_ledger
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.exports.starting import Start
from distlora.initialisation.factors import InitReport, install_gradient_maps
from distlora.initialisation.factors import initialise as initialise_factors
from distlora.initialisation.probe import Loss, modes_kept
from distlora.methods import Method, TransformsGradients, probe_of


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
    clips_after: bool = False,
    seed: int = 42,
    check_gradients: bool = True,
    pretrained: PretrainedWeights | None = None,
) -> InitReport:
    """Gives every layer its factors, the same at every ZeRO stage and on any number of ranks.

    engine: of `deepspeed.initialize`, at ZeRO stage 0 to 3, in float32 or bfloat16; None for plain PyTorch,
    with the `optimizer` of the trained parameters. probe, loss: where the method starts from gradients, this
    rank's batches, equally many on every rank, and (model, batch) to the mean loss of a batch; every batch
    counts alike. (The method's own `samples` and `micro_batch_size` are for recipes.) steps: of the whole
    run, where the method recomposes. first_rate: where the method's eta is "schedule". clip: norm to which
    gradients are clipped where a method transforms them; the engine's own clipping must then be off.
    clips_after: in plain PyTorch, whether the caller clips to `clip` after `before_step` where no method
    transforms gradients, and not before it.
    check_gradients: whether the first steps look for tensors that do not train. pretrained: weights of packed
    layers as they were before that.
    """
    adapted.refuse_second_start()
    taken = getattr(engine, "global_steps", 0) or _steps_of(optimizer)
    if taken:
        what = "engine" if engine is not None else "optimizer"
        raise UserError(
            f"the {what} has made {taken} steps already: go on with distlora.load, from a checkpoint of "
            "distlora.save",
            agreed=True,
        )
    ours = _around(adapted, engine, optimizer, clip, clips_after)
    plan = Plan(adapted, ours, probe, loss, steps, first_rate, seed)
    plan.check()
    first = plan.probe(0) if probe_of(adapted.method) is not None else None
    with adapted.starting(), modes_kept(adapted.model):
        open_ledger(ours, adapted.attached, seed, pretrained, watched=ours is not engine)
        given = adapted.start and (lambda layer: adapted.start.factors(layer, adapted.method))
        report = initialise_factors(ours, adapted.attached, seed, plan.rate(0), first, given=given)
        if adapted.start is not None:
            _take_heads(ours, adapted.start)
        adapted.begin(ours, plan.recomposer(report), check_gradients, steps)
    return report


def load(
    adapted: Adapted,
    engine: Any,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    step: int | None = None,
    training: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    probe: ProbeSource | None = None,
    loss: Loss | None = None,
    steps: int | None = None,
    first_rate: Rate | None = None,
    clip: float | None = None,
    clips_after: bool = False,
    seed: int = 42,
    check_gradients: bool = True,
    random_states: bool = False,
    pretrained: PretrainedWeights | None = None,
) -> dict[str, Any]:
    """Restores what `save` wrote, in place of `initialise`; returns its state ("step", "extra", …).

    The engine is new and holds the pretrained weights, or has just loaded its own checkpoint of the same
    step: which of the two it is, is found out. None: plain PyTorch, with the `optimizer`. Any stage and
    number of ranks will do. A learning-rate schedule is the caller's, and is not in the checkpoint.
    checkpoint: the directory that `save` was given. step: of it; None: the newest complete one. training:
    False for evaluation and export alone. random_states: whether torch's global generators are set to what
    they were. seed: of a checkpoint that does not say its own, as those of before it was written down. The
    other arguments are those of `initialise`.
    """
    adapted.refuse_second_start()
    ours = _around(adapted, engine, optimizer, clip, clips_after)
    found = _find(checkpoint, step, ours)
    _refuse_another_step(engine, found)
    seed = found.state.get("seed", seed)
    plan = Plan(adapted, ours, probe, loss, steps, first_rate, seed)
    if training:
        plan.check()
    with adapted.starting():
        open_ledger(ours, adapted.attached, seed, pretrained, watched=ours is not engine)
        recomposer = plan.recomposer(None) if training else None
        state = restore(ours, adapted.attached, found, recomposer, random_states)
        install_gradient_maps(ours, adapted.attached)
        adapted.steps = state.get("taken", found.step)
        adapted.begin(ours, recomposer, check_gradients, steps)
    return state


def _take_heads(engine: Engine, start: Start) -> None:
    """Writes the parameters that an adapter holds whole. Collective."""
    for name in start.files.heads:
        value = on_every_rank(engine.comm, lambda name=name: start.files.head(name))
        engine.write_parameter(name, value.to(engine.comm.device))


def _refuse_another_step(engine: Any, found: Checkpoint) -> None:
    """An engine that has loaded a checkpoint of its own must have loaded the one of the same moment."""
    taken = getattr(engine, "global_steps", 0)
    then = found.state.get("engine_steps", found.step)
    if taken not in (0, then):
        where = f"the engine is at its step {taken}, and {found.path} is of step {then}"
        raise UserError(f"{where}: load the same step of both", agreed=True)


def _steps_of(optimizer: torch.optim.Optimizer | None) -> int:
    return 0 if optimizer is None else steps_taken(optimizer)


def _find(checkpoint: str | os.PathLike[str] | Checkpoint, step: int | None, engine: Engine) -> Checkpoint:
    """Rank 0 looks; the directory may be on its host alone."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    comm = engine.comm
    if step is not None:
        return share_checkpoint(comm, on_main(comm, checkpoint, lambda: of_step(checkpoint, step)))
    found = newest(checkpoint, comm)
    if found is None:
        raise UserError(f"{checkpoint} holds no complete checkpoint", agreed=True)
    return found


def _around(
    adapted: Adapted,
    engine: Any,
    optimizer: torch.optim.Optimizer | None,
    clip: float | None,
    clips_after: bool,
) -> Engine:
    """Our view of what trains the model: an engine of ours as it is, one of DeepSpeed's, or an optimizer."""
    if hasattr(engine, "probe_pass"):
        return engine
    if not (clips_after and engine is None):
        _refuse_idle_clip(adapted.method, engine, clip)
    if engine is None:
        if optimizer is None:
            raise UserError("give the engine of deepspeed.initialize, or for plain PyTorch optimizer=…")
        return LocalEngine.around(adapted.model, optimizer, clip)
    if not any(base.__module__.startswith("deepspeed.") for base in type(engine).__mro__):
        raise UserError(f"{type(engine).__name__} is no DeepSpeed engine; for plain PyTorch give optimizer=…")
    from distlora.engine.zero.engine import ZeroEngine  # late: plain PyTorch does without DeepSpeed

    return ZeroEngine.around(engine, adapted.model, clip)


def _refuse_idle_clip(method: Method, engine: Any, clip: float | None) -> None:
    transforms, already = isinstance(method, TransformsGradients), engine is not None and _clips(engine)
    if transforms and already:
        raise UserError(
            f"method {method.name} transforms gradients, which DeepSpeed would then clip by their new norm: "
            "set gradient_clipping to 0 in its config, and give clip= here",
            agreed=True,
        )
    if clip is not None and not transforms:
        raise UserError(
            f"clip= is for methods that transform gradients, which {method.name} does not: clip as usual, by "
            "gradient_clipping in DeepSpeed's config, or before before_step in plain PyTorch",
            agreed=True,
        )


def _clips(engine: Any) -> bool:
    return bool(getattr(engine, "gradient_clipping", lambda: 0)())
