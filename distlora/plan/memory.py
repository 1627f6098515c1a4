"""Memory of one rank, in bytes: the parts of a training step, and the peak of each phase of a run.

Tensors are counted, as the memory benchmarks count them. CUDA's own memory, the allocator's cache and the
workspaces of kernels are not.
"""

from dataclasses import dataclass, field
from math import prod

import torch

from distlora.maths.blocks import GRADIENT_COLUMNS, GRADIENT_ELEMENTS
from distlora.maths.linalg import EXACT_SIDE
from distlora.methods import TakesFromWeight, probe_of
from distlora.plan import stored
from distlora.plan.activations import Activations, activations
from distlora.plan.packed import packed_anew, unpacked
from distlora.plan.setup import FLOAT32, Setup
from distlora.plan.traffic import columns_of

#: Bytes of a GiB.
GIB = 1 << 30
#: Blocks of a gradient that exist at once in the probe: two are copied to the host while the next is formed.
PROBE_BLOCKS = 3
#: Prompts that are answered at once, as in `distlora.evaluation.scoring`.
GENERATION_BATCH = 32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The first six fields add up to the peak of a training step.

    adapters: with the matrices that correct their gradients, and the pairs that recompositions add beside
    weights. gathered: weights that are whole for a moment, under ZeRO-3 or because they are packed, and
    DeepSpeed's buffers. host: of the rank's share of host memory. loading: on the host while the weights are
    loaded. checkpoint: on disk, of all ranks. peaks: bytes on the GPU by phase of the run.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    gathered: int
    host: int
    loading: int
    checkpoint: int
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def memory_of(setup: Setup, deepspeed: bool = True) -> Memory:
    """The memory of one rank in every phase of the run.

    deepspeed: False leaves out DeepSpeed's prefetching, its buckets, and what it keeps gathered beyond the
    module that is running, as the benchmark with a simulated rank does.
    """
    gathered = _whole(setup, deepspeed, setup.recipe.train.micro_batch_size)
    training = activations(setup, setup.recipe.train.micro_batch_size, setup.checkpointing)
    weights, adapters = stored.weights_and_adapters(setup)
    adapters += stored.correction_bytes(setup.method) * len(setup.layers) + stored.beside_weights(setup)
    masters, moments = stored.masters_and_moments(setup)
    gradients, buffers = stored.gradients(setup), stored.buckets(setup) if deepspeed and setup.config else 0
    constant = weights + adapters + masters + buffers
    alive = training.kept + max(training.block + gathered.block, training.loss + gathered.head)
    peaks = {"training": constant + moments + gradients + alive}
    if setup.layers:
        peaks |= _peaks_of_initialisation(setup, constant, deepspeed)
    forward = activations(setup, setup.recipe.train.micro_batch_size, False).forward
    peaks["evaluation"] = constant + moments + forward + _answers(setup) + gathered.forward
    peaks["idle"] = constant + moments
    whole = alive - training.peak
    return Memory(
        weights, adapters, masters + moments, gradients, training.peak, whole + buffers,
        stored.on_the_host(setup), stored.while_loading(setup), stored.checkpoint(setup), peaks,
    )  # fmt: skip


# ---------------------------------------------------------------------- phases of a run


@dataclass(frozen=True)
class _Whole:
    """Bytes of weights that are whole for a moment, in addition to what is stored of them.

    head: at the model's head. block: in a block. forward: in a pass without gradients.
    """

    head: int = 0
    block: int = 0
    forward: int = 0


def _whole(setup: Setup, deepspeed: bool, micro_batch: int) -> _Whole:
    """Weights that ZeRO-3 has gathered, and matrices that are unpacked."""
    gathered, matrix = _gathered(setup, deepspeed), unpacked(setup, micro_batch)
    return _Whole(gathered.head, gathered.block + matrix, gathered.forward + matrix)


def _gathered(setup: Setup, deepspeed: bool) -> _Whole:
    if setup.stage < 3 or (setup.world_size == 1 and not setup.offloads("param")):
        return _Whole()
    shapes = setup.shapes
    if deepspeed:
        found = setup.gathered()
        together = shapes.width * (found.peak + found.together)
        # DeepSpeed records no pass without gradients: weights of the pass before it may still be whole.
        return _Whole(together, together, together)
    adapted = shapes.targets()
    size = [
        sum(piece.elements for piece in pieces if piece.name in setup.partitioned)
        for pieces in shapes.modules
    ]
    block = max((size[number] for number in adapted), default=0)
    head = max((size[number] for number in range(len(size)) if number not in adapted), default=0)
    return _Whole(shapes.width * head, shapes.width * block, shapes.width * max(head, block))


def _peaks_of_initialisation(setup: Setup, constant: int, deepspeed: bool) -> dict[str, int]:
    """Peaks of the probe, of the line search and of the decompositions, as far as the method has them."""
    method, peaks = setup.method, {}
    settings = probe_of(method)
    if settings is not None:
        passed: Activations = activations(setup, settings.micro_batch_size, True, every_input=True)
        gathered = _whole(setup, deepspeed, settings.micro_batch_size)
        tokens = settings.micro_batch_size * setup.length
        widest = min(GRADIENT_COLUMNS, max(into for _, into in setup.layers.values()))
        forming = FLOAT32 * (
            PROBE_BLOCKS * min(GRADIENT_ELEMENTS, max(map(prod, setup.layers.values()))) + tokens * widest
        )
        sums = stored.probe_sums(setup) if settings.sums == "device" else 0
        alive = passed.kept + max(passed.block + forming + gathered.block, passed.loss + gathered.head)
        peaks["probe"] = constant + alive + sums
        if settings.eta == "search":
            size = max(settings.micro_batch_size, setup.recipe.train.micro_batch_size)
            peaks["search"] = (
                constant + activations(setup, size, True).forward + _whole(setup, deepspeed, size).forward
            )
    peaks["SVDs"] = constant + _decomposition(setup)
    return peaks


def _decomposition(setup: Setup) -> int:
    """The most that any layer's owner needs to factorise it and to write its factors."""
    layers = setup.shapes.attached.layers
    return max(_factorising(setup, name, layer.shape, prod(layer.stack)) for name, layer in layers.items())


def _factorising(setup: Setup, name: str, shape: tuple[int, int], experts: int) -> int:
    """Bytes for one layer: the matrix in float32, its factors, and what is sent of it. experts: how many
    matrices the layer has; all of them are read, and one is factorised at a time.
    """
    method, (out, into), packing = setup.method, shape, setup.shapes.packings.get(name)
    taken, reserve = columns_of(method)
    factors = FLOAT32 * sum(map(prod, method.shapes(out, into).values())) + FLOAT32 * taken * (out + into)
    factors *= experts
    anew = packed_anew(packing) if packing is not None and isinstance(method, TakesFromWeight) else 0
    if method.source_matrix() is None:
        return factors
    rank, matrix, side = method.rank + reserve, FLOAT32 * out * into, min(out, into)
    exact = side <= EXACT_SIDE or 3 * rank > side
    columns = side if exact else min(2 * rank + 8, side)
    work = FLOAT32 * columns * (out + into) + FLOAT32 * columns * out * (0 if exact else 1)
    reading = 0
    if method.source_matrix() == "weight" and not anew:
        gathered = setup.stage == 3 and setup.world_size > 1
        parts = 2 * setup.shapes.width * setup.shapes.sizes[f"{name}.weight"] if gathered else 0
        reading = parts + (experts * matrix if packing is None else packing.unpacking_nbytes(torch.float32))
    return max(experts * matrix + work, reading, anew) + factors


def _answers(setup: Setup) -> int:
    """Keys and values of the answers that an evaluation generates.

    Under ZeRO-3 the model is gathered for them only where it fits beside them, so it is not counted here.
    """
    train, data, config = setup.recipe.train, setup.recipe.data, setup.shapes.config
    if not train.exact_match_samples or not data.evaluation_sections:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prompts = min(GENERATION_BATCH, -(-train.exact_match_samples // setup.world_size))
    tokens = prompts * (data.max_length + data.max_new_tokens)
    return 2 * tokens * heads * head * len(setup.shapes.blocks) * setup.shapes.width
