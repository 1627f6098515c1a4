"""New heads: parameters that the pretrained weights lack, drawn by the recipe's seed."""

from collections.abc import Collection

import torch

from distlora.engine.protocol import Engine
from distlora.maths.generators import layer_generator

#: Standard deviation of a head's weights where the model's config names none.
SPREAD = 0.02


def draw_heads(engine: Engine, names: Collection[str], seed: int) -> None:
    """Fills the matrices among these trained parameters with normal numbers of the spread that the model's
    config asks for.

    Each has a generator of its own, so that they are the same at every ZeRO stage and world size, which
    cannot be said of what the model's class draws while it is loaded. The vectors stay as the class made
    them: zero for a bias, one for a norm. Collective, before the first step.
    """
    spread = getattr(engine.module.config, "initializer_range", SPREAD)
    for name, shape in engine.trained_shapes().items():
        if name in names and len(shape) > 1:
            value = spread * torch.randn(shape, generator=layer_generator(seed, name))
            engine.write_trained(name, {"master": value} if engine.comm.is_main else None, steps=0)
