"""What one rank stores, in bytes: on its GPU throughout the run, on its host, and in a checkpoint on disk."""

import functools
from math import prod

import torch

from distlora.engine.optimizers import OptimizerSpec
from distlora.methods import CorrectsGradients, Method, TakesFromWeight, probe_of
from distlora.plan.setup import FLOAT32, Setup
from distlora.plan.traffic import columns_of

# ---------------------------------------------------------------------- on the GPU


def _on_one_rank(setup: Setup, sizes: dict[str, int]) -> int:
    """Elements of these parameters on one rank."""
    if setup.stage < 3 or setup.world_size == 1:
        return sum(sizes.values())
    parts = sum(setup.padded(size) // setup.world_size for size in sizes.values())
    group = min(setup.group, setup.world_size)
    secondary = (
        sum(-(-size // group) for name, size in sizes.items() if name not in setup.shapes.trained)
        if group > 1
        else 0
    )
    return parts + secondary + sum(size for name, size in sizes.items() if name in setup.persistent)


def weights_and_adapters(setup: Setup) -> tuple[int, int]:
    """Bytes of the model as it is stored, with the scales of packed weights; and bytes of the adapters."""
    factors = {
        f"{name}.{factor}"
        for name, layer in setup.shapes.attached.layers.items()
        for factor in layer.method.path
    }
    own = {name: size for name, size in setup.shapes.sizes.items() if name not in factors}
    added = {name: size for name, size in setup.shapes.sizes.items() if name in factors}
    if setup.offloads("param"):
        parts = (
            sum(size for name, size in sizes.items() if name in setup.persistent) for sizes in (own, added)
        )
    else:
        parts = (_on_one_rank(setup, sizes) for sizes in (own, added))
    weights, adapters = (setup.shapes.width * part for part in parts)
    return weights + setup.shapes.scales, adapters


def beside_weights(setup: Setup) -> int:
    """Bytes of the low-rank pairs that the forward pass adds to weights, at the end of the run."""
    method = setup.recomposing
    if method is None:
        return 0
    kept = [
        shape for name, shape in setup.layers.items() if method.fuses_beside(name in setup.shapes.packings)
    ]
    return setup.shapes.width * setup.recompositions * setup.columns_of_a_recomposition * sum(map(sum, kept))


@functools.lru_cache
def correction_bytes(method: Method) -> int:
    """Bytes of the matrices that correct the gradients of one layer, measured on a small layer."""
    if not isinstance(method, CorrectsGradients):
        return 0
    generator = torch.Generator().manual_seed(0)
    shapes = method.shapes(2 * method.rank, 2 * method.rank)
    maps = method.gradient_map(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )
    return sum(matrix.nbytes for pair in maps.values() for matrix in pair)


def _share_of_trained(setup: Setup) -> int:
    """Elements of trained parameters whose optimizer state one rank holds."""
    trained = sum(setup.shapes.trained.values())
    return trained if setup.stage == 0 else -(-trained // setup.world_size)


def _spec(setup: Setup) -> OptimizerSpec:
    own = setup.recipe.train.optimizer
    return OptimizerSpec(own.name, betas=own.betas, eps=own.eps, momentum=own.momentum)


def _moments(setup: Setup) -> int:
    """Bytes of the moments of one rank."""
    return round(_share_of_trained(setup) * (_spec(setup).bytes_per_element() - FLOAT32))


def masters_and_moments(setup: Setup) -> tuple[int, int]:
    """Bytes of the float32 masters on the GPU, and bytes of the moments there."""
    if setup.offloads("optimizer"):
        return 0, 0
    share = _share_of_trained(setup)
    is_master = setup.stage == 0 and setup.shapes.width == FLOAT32
    return 0 if is_master else FLOAT32 * share, _moments(setup)


def gradients(setup: Setup) -> int:
    """Bytes at the optimizer's step: gradients as they were accumulated, in float32, and what DeepSpeed holds
    beside them for weights in bfloat16."""
    trained, share = sum(setup.shapes.trained.values()), _share_of_trained(setup)
    accumulated = FLOAT32 * (trained if setup.stage <= 1 else share)
    if setup.offloads("optimizer") or setup.shapes.width == FLOAT32:
        return accumulated
    if setup.stage == 1:  # those of the last backward pass
        return accumulated + setup.shapes.width * trained
    return accumulated + (FLOAT32 * share if setup.stage == 3 else 0)  # joined for the optimizer


def buckets(setup: Setup) -> int:
    """Bytes of the buffers in which DeepSpeed joins gradients before it reduces them."""
    if setup.stage == 0:
        return 0
    trained, width = sum(setup.shapes.trained.values()), setup.shapes.width
    if setup.stage == 3:
        return FLOAT32 * setup.bucket
    if setup.stage == 1 and width < FLOAT32:
        return FLOAT32 * trained
    at_once = min(setup.bucket, trained)
    kept = width * at_once * (2 if setup.zero.get("overlap_comm") else 1)
    return kept + (FLOAT32 * at_once if width < FLOAT32 else 0)  # as ranks add it up


# ---------------------------------------------------------------------- on the host and on disk


def probe_sums(setup: Setup) -> int:
    """Bytes of the probe's sums, of the layers that one rank owns."""
    return FLOAT32 * sum(map(prod, setup.layers.values())) // setup.world_size


def on_the_host(setup: Setup) -> int:
    """Bytes of host memory of one rank, without the process itself.

    These are offloaded state, the probe's sums, a pretrained weight that is read again, reserve and ledger.
    """
    share, held = _share_of_trained(setup), 0
    if setup.offloads("optimizer"):
        held += 2 * FLOAT32 * share + _moments(setup)
    if setup.offloads("param"):
        held += setup.shapes.width * sum(
            setup.padded(size) // setup.world_size for size in setup.shapes.sizes.values()
        )
    settings = probe_of(setup.method)
    if setup.layers and settings is not None and settings.sums == "host":
        held += probe_sums(setup)
    if isinstance(setup.method, TakesFromWeight):
        read = [
            prod(packing.shape) for name, packing in setup.shapes.packings.items() if name in setup.layers
        ]
        # The weight exists as in its file, in the model's type, and in float32.
        held += (2 * setup.shapes.width + FLOAT32) * max(read, default=0)
    return held + (_ledger(setup) + _reserve(setup)) // setup.world_size


def while_loading(setup: Setup) -> int:
    """Bytes of host memory of one rank while it loads the weights.

    Under ZeRO-3 each rank gets its part of a tensor at once; a weight that is to be packed comes whole first.
    """
    if setup.stage == 3 and not setup.shapes.packings:
        return setup.shapes.width * max(setup.shapes.sizes.values())
    return setup.shapes.width * (setup.shapes.elements - setup.shapes.factors)


def _ledger(setup: Setup) -> int:
    """Bytes of all that was added to weights by the end of the run, on all ranks, in the model's type."""
    taken, _ = columns_of(setup.method)
    columns = taken + setup.recompositions * setup.columns_of_a_recomposition
    return setup.shapes.width * columns * sum(map(sum, setup.layers.values()))


def _reserve(setup: Setup) -> int:
    return setup.shapes.width * columns_of(setup.method)[1] * sum(map(sum, setup.layers.values()))


def checkpoint(setup: Setup) -> int:
    """Bytes of the largest checkpoint.

    It has the factors and other trained parameters, masters with their moments, ledger, scores and reserve.
    """
    trained = sum(setup.shapes.trained.values())
    heads = trained - sum(
        size
        for name, size in setup.shapes.trained.items()
        if name.rpartition(".")[0] in setup.shapes.attached.layers
    )
    state = FLOAT32 * trained * (1 + len(_spec(setup).moments()))
    scored = setup.recomposing is not None and setup.recomposing.element_scores() is not None
    scores = 2 * FLOAT32 * trained if scored else 0
    return (
        setup.shapes.width * (setup.shapes.factors + heads)
        + state
        + scores
        + _ledger(setup)
        + _reserve(setup)
    )
