"""Memory of one rank, in bytes: what lies on its GPU all the time, the peak of each phase of a run, and what
lies on the host.

Counted are tensors, as the memory benchmarks count them. Not counted: CUDA's own memory, the allocator's
cache, and what kernels need for themselves.
"""

import functools
from dataclasses import dataclass, field
from math import prod

import torch

from distlora.engine.optimizers import OptimizerSpec
from distlora.initialise.probe import BLOCK_COLUMNS, BLOCK_ELEMENTS
from distlora.maths.linalg import EXACT_SIDE
from distlora.methods import Method
from distlora.plan.activations import Activations, activations
from distlora.plan.packed import packed_anew, unpacked
from distlora.plan.setup import FLOAT32, Setup
from distlora.plan.traffic import columns_of

#: Blocks of a gradient that are alive at once: two travel to the host while the next is formed.
PROBE_BLOCKS = 3
#: Prompts that are answered at once, as in `distlora.evaluation.scoring`.
GENERATION_BATCH = 32


@dataclass(frozen=True)
class Memory:
    """weights, adapters, optimizer, gradients, activations, gathered: parts of the training step's peak,
    which they add up to. adapters: with what their gradients are corrected by, and what recompositions put
    beside weights. gathered: weights that are whole for a while, under ZeRO-3 or because they are packed, and
    DeepSpeed's buffers. peaks: by phase. host: of a rank. loading: of a rank, before its weights are on the
    GPU."""

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
    """deepspeed: False leaves out its prefetching, what it keeps gathered beyond the module at work, and its
    buckets, as the benchmark with a simulated rank does."""
    gathered = _whole(setup, deepspeed, setup.recipe.train.micro_batch_size)
    training = activations(setup, setup.recipe.train.micro_batch_size, setup.checkpointing)
    weights, adapters = _weights(setup)
    adapters += _corrections(setup.method) * len(setup.layers) + _beside(setup)
    masters, moments = _optimizer(setup)
    gradients, buffers = _gradients(setup), _buckets(setup) if deepspeed and setup.config else 0
    quiet = weights + adapters + masters + buffers
    alive = training.kept + max(training.block + gathered.block, training.loss + gathered.head)
    peaks = {"training": quiet + moments + gradients + alive}
    if setup.layers:
        peaks |= _at_the_start(setup, quiet, deepspeed)
    forward = activations(setup, setup.recipe.train.micro_batch_size, False).forward
    peaks["evaluation"] = quiet + moments + forward + _answers(setup) + gathered.forward
    peaks["idle"] = quiet + moments
    whole = alive - training.peak
    return Memory(
        weights, adapters, masters + moments, gradients, training.peak, whole + buffers,
        _host(setup), _loading(setup), _checkpoint(setup), peaks,
    )  # fmt: skip


# ---------------------------------------------------------------------- all the time


def _here(setup: Setup, sizes: dict[str, int]) -> int:
    """Elements of these parameters that a rank holds."""
    if setup.stage < 3 or setup.world_size == 1:
        return sum(sizes.values())
    parts = sum(setup.padded(size) // setup.world_size for size in sizes.values())
    group = min(setup.group, setup.world_size)
    second = (
        sum(-(-size // group) for name, size in sizes.items() if name not in setup.shapes.trained)
        if group > 1
        else 0
    )
    return parts + second + sum(size for name, size in sizes.items() if name in setup.persistent)


def _weights(setup: Setup) -> tuple[int, int]:
    """Of the model, in the type in which it is stored, with the scales of packed weights; and of the
    adapters.
    """
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
        parts = (_here(setup, sizes) for sizes in (own, added))
    weights, adapters = (setup.shapes.width * part for part in parts)
    return weights + setup.shapes.scales, adapters


def _beside(setup: Setup) -> int:
    """Of the pairs that the forward pass adds to weights, at the end of the run."""
    kept = [
        shape
        for name, shape in setup.layers.items()
        if setup.method.fuses_beside(name in setup.shapes.packings)
    ]
    return setup.shapes.width * setup.swaps * setup.columns_of_a_swap * sum(map(sum, kept))


@functools.lru_cache
def _corrections(method: Method) -> int:
    """Of the matrices by which the gradients of one layer are corrected, found by asking for those of a small
    layer.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = method.shapes(2 * method.rank, 2 * method.rank)
    maps = method.gradient_map(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )
    return sum(matrix.nbytes for pair in maps.values() for matrix in pair)


def _share_of_trained(setup: Setup) -> int:
    """Elements of trained parameters whose optimizer state lies on a rank."""
    trained = sum(setup.shapes.trained.values())
    return trained if setup.stage == 0 else -(-trained // setup.world_size)


def _spec(setup: Setup) -> OptimizerSpec:
    own = setup.recipe.train.optimizer
    return OptimizerSpec(own.name, betas=own.betas, eps=own.eps, momentum=own.momentum)


def _moments(setup: Setup) -> int:
    """Bytes of a rank's moments."""
    return round(_share_of_trained(setup) * (_spec(setup).bytes_per_element() - FLOAT32))


def _optimizer(setup: Setup) -> tuple[int, int]:
    """float32 masters, and moments, on the GPU."""
    if setup.offloads("optimizer"):
        return 0, 0
    share = _share_of_trained(setup)
    is_master = setup.stage == 0 and setup.shapes.width == FLOAT32
    return 0 if is_master else FLOAT32 * share, _moments(setup)


def _gradients(setup: Setup) -> int:
    """At the optimizer's step: as they were accumulated, and in float32."""
    trained, share = sum(setup.shapes.trained.values()), _share_of_trained(setup)
    accumulated = setup.shapes.width * (trained if setup.stage <= 1 else share)
    if setup.offloads("optimizer"):
        return accumulated
    return accumulated + (FLOAT32 * share if setup.shapes.width < FLOAT32 else 0)


def _buckets(setup: Setup) -> int:
    """Where DeepSpeed lays gradients end to end before they are reduced."""
    if setup.stage == 0:
        return 0
    trained = sum(setup.shapes.trained.values())
    if setup.stage == 3:
        return setup.shapes.width * setup.bucket
    return setup.shapes.width * min(setup.bucket, trained) * (2 if setup.zero.get("overlap_comm") else 1)


# ---------------------------------------------------------------------- for a while


@dataclass(frozen=True)
class _Whole:
    """Bytes of weights that are whole, beside what is stored of them: at the head, in a block, and in a pass
    without gradients.
    """

    head: int = 0
    block: int = 0
    forward: int = 0


def _whole(setup: Setup, deepspeed: bool, micro_batch: int) -> _Whole:
    """What ZeRO-3 has gathered, and what is made of packed weights."""
    gathered, matrix = _gathered(setup, deepspeed), unpacked(setup, micro_batch)
    return _Whole(gathered.head, gathered.block + matrix, gathered.forward + matrix)


def _gathered(setup: Setup, deepspeed: bool) -> _Whole:
    if setup.stage < 3 or (setup.world_size == 1 and not setup.offloads("param")):
        return _Whole()
    shapes = setup.shapes
    if deepspeed:
        found = setup.gathered()
        together = shapes.width * (found.peak + found.together)
        # A pass without gradients is none that was recorded: weights may stay from the one before.
        return _Whole(together, together, together)
    adapted = shapes.targets()
    size = [
        sum(piece.elements for piece in pieces if piece.name in setup.partitioned)
        for pieces in shapes.modules
    ]
    block = max((size[number] for number in adapted), default=0)
    head = max((size[number] for number in range(len(size)) if number not in adapted), default=0)
    return _Whole(shapes.width * head, shapes.width * block, shapes.width * max(head, block))


def _at_the_start(setup: Setup, quiet: int, deepspeed: bool) -> dict[str, int]:
    """Peaks of the probe, of the decompositions and of the line search; only those that the method has."""
    method, peaks = setup.method, {}
    settings = method.probe_settings()
    if settings is not None:
        passed: Activations = activations(setup, settings.micro_batch_size, True, every_input=True)
        gathered = _whole(setup, deepspeed, settings.micro_batch_size)
        tokens = settings.micro_batch_size * setup.recipe.data.max_length
        widest = min(BLOCK_COLUMNS, max(into for _, into in setup.layers.values()))
        forming = FLOAT32 * (
            PROBE_BLOCKS * min(BLOCK_ELEMENTS, max(map(prod, setup.layers.values()))) + tokens * widest
        )
        sums = _sums(setup) if settings.sums == "device" else 0
        alive = passed.kept + max(passed.block + forming + gathered.block, passed.loss + gathered.head)
        peaks["probe"] = quiet + alive + sums
        if settings.eta == "search":
            size = max(settings.micro_batch_size, setup.recipe.train.micro_batch_size)
            peaks["search"] = (
                quiet + activations(setup, size, True).forward + _whole(setup, deepspeed, size).forward
            )
    peaks["SVDs"] = quiet + _decomposition(setup)
    return peaks


def _decomposition(setup: Setup) -> int:
    """The most that factorising one layer takes on its owner, and putting what comes of it into the layer."""
    return max(_factorising(setup, name, shape) for name, shape in setup.layers.items())


def _factorising(setup: Setup, name: str, shape: tuple[int, int]) -> int:
    """Of one layer: the matrix in float32, its factors, and what is sent of it."""
    method, (out, into), packing = setup.method, shape, setup.shapes.packings.get(name)
    taken, reserve = columns_of(method)
    factors = FLOAT32 * sum(map(prod, method.shapes(out, into).values())) + FLOAT32 * taken * (out + into)
    anew = packed_anew(packing) if packing is not None and method.takes_from_weight else 0
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
        reading = parts + (matrix if packing is None else packing.unpacking_nbytes(torch.float32))
    return max(matrix + work, reading, anew) + factors


def _answers(setup: Setup) -> int:
    """Keys and values of answers that are generated. Under ZeRO-3 the model is gathered for them only where
    it fits beside.
    """
    train, data, config = setup.recipe.train, setup.recipe.data, setup.shapes.config
    if not train.exact_match_samples or not setup.recipe.data.eval_split:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prompts = min(GENERATION_BATCH, -(-train.exact_match_samples // setup.world_size))
    tokens = prompts * (data.max_length + data.max_new_tokens)
    return 2 * tokens * heads * head * len(setup.shapes.blocks) * setup.shapes.width


# ---------------------------------------------------------------------- elsewhere


def _sums(setup: Setup) -> int:
    """The probe's sums, of the layers that a rank owns."""
    return FLOAT32 * sum(map(prod, setup.layers.values())) // setup.world_size


def _host(setup: Setup) -> int:
    """Offloaded state, the probe's sums, a pretrained weight that is read again, reserve and ledger; not the
    process itself.
    """
    share, held = _share_of_trained(setup), 0
    if setup.offloads("optimizer"):
        held += 2 * FLOAT32 * share + _moments(setup)
    if setup.offloads("param"):
        held += setup.shapes.width * sum(
            setup.padded(size) // setup.world_size for size in setup.shapes.sizes.values()
        )
    settings = setup.method.probe_settings()
    if setup.layers and settings is not None and settings.sums == "host":
        held += _sums(setup)
    if setup.method.takes_from_weight:
        read = [
            prod(packing.shape) for name, packing in setup.shapes.packings.items() if name in setup.layers
        ]
        held += (2 * setup.shapes.width + FLOAT32) * max(
            read, default=0
        )  # as in its file, in the model's type, and in float32
    return held + (_ledger(setup) + _reserve(setup)) // setup.world_size


def _loading(setup: Setup) -> int:
    """Weights on their way from the files: ZeRO-3 gives each rank its part at once, but what is to be packed
    comes whole first.
    """
    if setup.stage == 3 and not setup.shapes.packings:
        return setup.shapes.width * max(setup.shapes.sizes.values())
    return setup.shapes.width * (setup.shapes.elements - setup.shapes.factors)


def _ledger(setup: Setup) -> int:
    """Of all ranks, at the end of the run: what was added to weights, in the model's type."""
    taken, _ = columns_of(setup.method)
    columns = taken + setup.swaps * setup.columns_of_a_swap
    return setup.shapes.width * columns * sum(map(sum, setup.layers.values()))


def _reserve(setup: Setup) -> int:
    return setup.shapes.width * columns_of(setup.method)[1] * sum(map(sum, setup.layers.values()))


def _checkpoint(setup: Setup) -> int:
    """Factors and other trained parameters, masters with their moments, ledger, scores and reserve, at their
    largest.
    """
    trained = sum(setup.shapes.trained.values())
    heads = trained - sum(
        size
        for name, size in setup.shapes.trained.items()
        if name.rpartition(".")[0] in setup.shapes.attached.layers
    )
    state = FLOAT32 * trained * (1 + len(_spec(setup).moments()))
    scores = (
        2 * FLOAT32 * trained
        if setup.switching is not None and setup.method.element_scores() is not None
        else 0
    )
    return (
        setup.shapes.width * (setup.shapes.factors + heads)
        + state
        + scores
        + _ledger(setup)
        + _reserve(setup)
    )
