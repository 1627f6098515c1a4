"""New components, made of the present gradients."""

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.engine.protocol import Engine
from distlora.initialisation.probe import Probe, mean_gradients
from distlora.maths.generators import layer_generator
from distlora.maths.importance import component_sums
from distlora.maths.low_rank import LowRank
from distlora.methods import LayerInit


def from_gradients(
    engine: Engine,
    attached: Attached,
    owners: dict[str, int],
    chosen: dict[str, tuple[int, ...]],
    data: Probe,
    seed: int | str,
) -> dict[str, LowRank]:
    """New components of the layers that this rank owns: leading directions of the gradients at the adapted
    weights, as large as the components that they replace. Collective.

    chosen: the components to be replaced, by layer. data: the probe's samples. seed: of the random numbers in
    the decompositions.
    """
    method, device = attached.method, engine.comm.device
    sizes = component_sizes(engine, attached)
    with torch.enable_grad():
        gradients = mean_gradients(
            engine,
            attached.layers,
            owners,
            data.batches(),
            data.samples,
            data.loss,
            method.refill_probe().sums,
            adapted=True,
        )
    fresh, failure = {}, None
    try:
        for name in list(gradients):
            gradient = gradients.pop(name).to(device)  # removed, so that it is freed when it was used
            source = LayerInit(
                gradient.shape, gradient, layer_generator(seed, name), engine.dtype, device=device
            )
            replaced = list(chosen[name])
            fresh[name] = method.new_components(source, float(sizes[name][replaced].mean()), len(replaced))
            del gradient, source
    except Exception as error:  # the others wait: tell them before this rank leaves
        failure = error
    engine.comm.agree(failure)
    return fresh


def component_sizes(engine: Engine, attached: Attached) -> dict[str, Tensor]:
    """The norms of s·B_k·A_k as the forward pass uses them, by layer: (r,) float64. Computed from each rank's
    parts, in one collective of 2r numbers a layer.
    """
    method, layers = attached.method, attached.layers
    means = torch.zeros(len(layers), 2, method.rank, dtype=torch.float64, device=engine.comm.device)
    for rows, layer in zip(means, layers.values()):
        shapes = method.shapes(*layer.shape)
        for factor, part in engine.parts(layer).items():
            if part.counted:
                axis = method.component_axis(factor)
                squares = part.master.to(engine.dtype).float().square()
                rows[axis] += component_sums(axis, squares, part.start, shapes[factor]).to(rows.device)
    # Mean squares of the elements over a row of A, and over a column of B.
    means = engine.comm.all_reduce(means).cpu()
    numbers = [layer.in_features * layer.out_features for layer in layers.values()]
    return {
        name: method.scaling * (number * both.prod(0)).sqrt()
        for name, number, both in zip(layers, numbers, means)
    }
