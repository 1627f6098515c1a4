"""New components, made of the present gradients."""

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine
from distlora.initialisation.probe import Probe, mean_gradients
from distlora.maths.generators import layer_generator
from distlora.maths.importance import component_sums
from distlora.maths.low_rank import LowRank, stacked_pairs
from distlora.methods import LayerInit
from distlora.recompose.stacks import Chosen, matrices_of, rows_of


def from_gradients(
    engine: Engine,
    attached: Attached,
    owners: dict[str, int],
    chosen: dict[str, Chosen],
    data: Probe,
    seed: int | str,
) -> dict[str, LowRank]:
    """New components of the layers that this rank owns: leading directions of the gradients at the adapted
    weights, as large as the components that they replace. Collective.

    chosen: the components to be replaced, by layer. data: the probe's samples. seed: of the random numbers in
    the decompositions.
    """
    method, sizes = attached.method, component_sizes(engine, attached)
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
            gradient = gradients.pop(name)  # removed, so that it is freed when it was used
            fresh[name] = _new(engine, attached.layers[name], gradient, sizes[name], chosen[name], seed)
            del gradient
    except Exception as error:  # the others wait: tell them before this rank leaves
        failure = error
    engine.comm.agree(failure)
    return fresh


def _new(
    engine: Engine, layer: AdapterLinear, gradient: Tensor, sizes: Tensor, chosen: Chosen, seed: int | str
) -> LowRank:
    """New components of every matrix of a layer. gradient: (out, in), of a stack (E, out, in)."""
    device, found = engine.comm.device, []
    gradients = gradient if layer.stack else gradient[None]
    for name, own, size, replaced in zip(layer.matrix_names, gradients, sizes, chosen):
        source = LayerInit(
            layer.shape, own.to(device), layer_generator(seed, name), engine.dtype, device=device
        )
        magnitude = float(size[list(replaced)].mean())
        found.append(layer.method.new_components(source, magnitude, len(replaced)))
    return stacked_pairs(found) if layer.stack else found[0]


def component_sizes(engine: Engine, attached: Attached) -> dict[str, Tensor]:
    """The norms of s·B_k·A_k as the forward pass uses them, by layer: (matrices, r) float64. Computed from
    each rank's parts, in one collective of 2r numbers a matrix.
    """
    method, layers = attached.method, attached.layers
    count = sum(map(matrices_of, layers.values()))
    means = torch.zeros(count, 2, method.rank, dtype=torch.float64, device=engine.comm.device)
    for name, rows in rows_of(layers, means).items():
        layer = layers[name]
        shapes = layer.factor_shapes()
        for factor, part in engine.parts(layer).items():
            if part.counted:
                axis = method.component_axis(factor)
                squares = part.master.to(engine.dtype).float().square()
                sums = component_sums(axis, squares, part.start, shapes[factor])
                rows[:, axis] += sums.view(-1, method.rank).to(rows.device)
    # Mean squares of the elements over a row of A, and over a column of B.
    means = rows_of(layers, engine.comm.all_reduce(means).cpu())
    numbers = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    return {name: method.scaling * (numbers[name] * both.prod(1)).sqrt() for name, both in means.items()}
