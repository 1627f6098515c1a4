"""Gradients of many micro-batches, as an engine adds them up and as float64 does."""

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.data import collate
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.protocol import Engine
from distlora.models.losses import response_loss
from tests.distributed.world import build, samples, write_random_factors

MICRO_BATCHES = 64
#: Powers of two by which losses are scaled, so that every micro-batch's own gradient is rounded alike.
SIZES = [2.0 ** (number * 7 % 13 - 6) for number in range(MICRO_BATCHES)]


def worst_sum(setting) -> float:
    """The largest relative error of a trained tensor's summed gradient; the same on every rank."""
    world = setting.comm.world_size
    engine, attached = _engine(setting, MICRO_BATCHES // world)
    own = MICRO_BATCHES // world
    for number in range(setting.comm.rank * own, (setting.comm.rank + 1) * own):
        engine.backward(_loss(engine, number))
    assert engine.at_boundary()
    found, wanted = _gradients(engine, attached), _by_float64(setting)
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())


def _engine(setting, accumulation: int) -> tuple[Engine, Attached]:
    """One of the setting's kind that takes so many micro-batches a step on every rank."""
    old = setting.engine
    if isinstance(old, LocalEngine):
        engine = LocalEngine(old.comm, old.dtype)
    else:
        steps = {
            "train_batch_size": accumulation * old.comm.world_size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
        }
        engine = type(old)(old.comm, old._config | steps)
    return _built(engine, setting)


def _built(engine: Engine, setting) -> tuple[Engine, Attached]:
    attached = build(engine, setting.directory, **setting.build_settings)
    write_random_factors(engine, attached)
    return engine, attached


def _loss(engine: Engine, number: int) -> Tensor:
    batch = collate([samples(MICRO_BATCHES, 3)[number]], 0, engine.comm.device)
    return SIZES[number] * engine.run(response_loss, batch)[0]


def _gradients(engine: Engine, attached: Attached) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def look(layer, gradients, factors):
        found.update({f"{layer.name}.{name}": value.double() for name, value in gradients.items()})
        return {}

    engine.map_gradients(list(attached.layers.values()), look)
    return found


def _by_float64(setting) -> dict[str, Tensor]:
    """The sum of the same micro-batches' gradients, each taken by itself: in plain PyTorch; under ZeRO-3,
    whose hooks change the order in which bfloat16 rounds within a backward pass, from steps of one
    micro-batch a rank that change nothing."""
    if getattr(setting.engine, "stage", 0) == 3:
        engine, attached = _engine(setting, 1)
        engine.set_rate(0.0)
        first, stride = setting.comm.rank, setting.comm.world_size
    else:
        solo = Comm(Topology(), torch.device("cpu"), distributed=False)
        engine, attached = _built(LocalEngine(solo, setting.engine.dtype), setting)
        engine.set_rate(0.0)
        first, stride = 0, 1
    sums: dict[str, Tensor] = {}
    for number in range(first, MICRO_BATCHES, stride):
        engine.backward(_loss(engine, number))
        for name, gradient in _gradients(engine, attached).items():
            sums[name] = sums.get(name, 0.0) + gradient
        engine.step()
    return sums
