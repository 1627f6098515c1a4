"""Adapters folded into the weights, for the time of an evaluation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.maths.low_rank import add_pair
from distlora.methods import HasMagnitude


def refuse_packed(layers: dict[str, AdapterLinear]) -> None:
    """Raises UserError where a sum would have to be packed again."""
    for name, layer in layers.items():
        if layer.packing is not None:
            raise UserError(
                f"--merge: the weight of {name} is packed as {layer.packing.kind}, which cannot hold the sum "
                "with its update; leave --merge out",
                agreed=True,
            )


@contextmanager
def folded(engine: Engine) -> Iterator[None]:
    """Within `engine.whole_model()`, where that has gathered everything: each layer computes with one matrix,
    of its weight and its adapter, summed in float32 and rounded once.

    The weights are overwritten where they are, so they take no more memory than before. Under ZeRO-3 what is
    written to gathered weights is forgotten with them; at other stages the engine's model is of no use for
    training any more.
    """
    with ExitStack() as stack:
        for layer in engine.layers.values():
            _fold(layer)
            stack.enter_context(layer.bare())
        yield


@torch.no_grad()
def _fold(layer: AdapterLinear) -> None:
    factors = {name: factor.float() for name, factor in layer.factors().items()}
    weight = layer.whole_weight()
    pair = layer.method.delta(factors)
    whole = add_pair(weight, pair)
    if isinstance(layer.method, HasMagnitude):
        scale = layer.method.row_scale(factors, layer.method.prepare(weight, factors))
        whole = whole * scale.unsqueeze(-1)
    if layer.beside is not None:  # it stays beside the weight
        whole = add_pair(whole, layer.beside, -1)
    layer.overwrite(whole)
