"""What ranks send each other, by kind: in a training step, in the initialisation, and at a recomposition.

Bytes are those of the whole tensor that a collective works on: of what an all-reduce or broadcast carries, of
an all-gather's result, of a reduce-scatter's operand. Left out are single numbers and tables of a few numbers
a layer (counts, losses, norms).
"""

import functools
from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from distlora.methods import Factors, Method
from distlora.methods.contract import LayerInit
from distlora.plan.packed import renewed
from distlora.plan.setup import FLOAT32, Setup

#: Bytes by kind of collective.
Traffic = Counter[str]
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce-scatter", "all-gather"
BROADCAST, REDUCE, GATHER = "broadcast", "reduce", "gather"
#: Bytes by which ranks tell each other that one of them failed.
FLAG = 8
#: Within groups of ranks that hold the frozen weights once each (hpZ).
GROUP_GATHER = "all-gather in groups"


def step_traffic(setup: Setup) -> Traffic:
    """Of one optimizer step with all its micro-batches, once DeepSpeed knows the order of the modules."""
    traffic: Traffic = Counter()
    if setup.world_size == 1:
        return traffic
    trained, width = sum(setup.shapes.trained.values()), setup.shapes.width
    if setup.stage <= 1:  # gradients add up on every rank, and are reduced once
        traffic[ALL_REDUCE] = width * trained
    if setup.stage == 2:
        traffic[ALL_REDUCE] = width * trained * setup.accumulation
    if setup.stage in (
        1,
        2,
    ):  # every rank has stepped its own part of all trained parameters, laid end to end
        traffic[ALL_GATHER] = width * _rounded_up(trained, 2 * setup.world_size)
    if setup.stage == 3:
        scattered = sum(setup.padded(size) for size in setup.shapes.trained.values())
        traffic[REDUCE_SCATTER] = width * scattered * setup.accumulation
        traffic += _times(weights_of_a_pass(setup), setup.accumulation)
        traffic[ALL_GATHER] += width * sum(
            setup.padded(setup.shapes.sizes[name]) for name in setup.persistent
        )
    if (
        setup.method.transforms_gradients
    ):  # made whole on every rank, and the factors too where they are cut up
        sizes = [_sizes(setup.method, shape) for shape in setup.layers.values()]
        factors = sum(size for layer in sizes for name, size in layer.items() if name in setup.method.trains)
        traffic[ALL_REDUCE] += FLOAT32 * factors * (2 if setup.stage == 3 else 1)
    return traffic


def weights_of_a_pass(setup: Setup, probe: bool = False, recorded: bool = True) -> Traffic:
    """What ZeRO-3 gathers in one forward and backward pass of one micro-batch; nothing at other stages."""
    traffic: Traffic = Counter()
    if setup.stage < 3 or setup.world_size == 1:
        return traffic
    for name, times in setup.gathered(probe, recorded).times.items():
        kind = GROUP_GATHER if setup.group > 1 and name not in setup.shapes.trained else ALL_GATHER
        traffic[kind] += setup.shapes.width * times * setup.padded(setup.shapes.sizes[name])
    return traffic


def weights_of_a_forward_pass(setup: Setup) -> Traffic:
    """Every partitioned parameter once."""
    traffic: Traffic = Counter()
    if setup.stage == 3 and setup.world_size > 1:
        for name in setup.partitioned:
            kind = GROUP_GATHER if setup.group > 1 and name not in setup.shapes.trained else ALL_GATHER
            traffic[kind] += setup.shapes.width * setup.padded(setup.shapes.sizes[name])
    return traffic


# ---------------------------------------------------------------------- initialisation


def init_traffic(setup: Setup) -> Traffic:
    """Of the initialisation without a line search: probe, sources to the owners, factors to everyone."""
    traffic: Traffic = Counter()
    if setup.world_size == 1 or not setup.layers:
        return traffic
    method = setup.method
    if method.probe_settings() is not None:
        traffic += probe_traffic(setup, setup.probe_passes(method.probe_settings()))
    taken, _ = columns_of(method)
    for name in setup.layers:
        # The rest of a packed weight is packed anew, and compared with what was there; the pretrained one is
        # read from its file.
        rest = method.takes_from_weight and name in setup.shapes.packings
        if setup.stage == 3 and (rest or method.source_matrix() == "weight"):
            traffic[GATHER] += setup.shapes.width * setup.padded(setup.shapes.sizes[f"{name}.weight"])
        if rest:
            traffic[BROADCAST] += renewed(setup.shapes.packings[name])
    for shape in setup.layers.values():
        factors = sum(map(prod, method.shapes(*shape).values()))
        traffic[BROADCAST] += FLOAT32 * (factors + taken * sum(shape))
    return traffic


def probe_traffic(setup: Setup, passes: int) -> Traffic:
    """Of so many passes: every layer's gradient to its owner, and under ZeRO-3 the weights. DeepSpeed learns
    the order of the modules in the first one, and gathers more in it."""
    traffic = _times(weights_of_a_pass(setup, probe=True), max(0, passes - 1))
    traffic += weights_of_a_pass(setup, probe=True, recorded=False)
    traffic[REDUCE] = FLOAT32 * passes * sum(map(prod, setup.layers.values()))
    return traffic


def search_traffic(setup: Setup) -> Traffic:
    """Of one try of the line search for the size of the first step; nothing where there is none."""
    settings = setup.method.probe_settings()
    if settings is None or settings.eta != "search" or setup.world_size == 1:
        return Counter()
    size = max(settings.micro_batch_size, setup.recipe.train.micro_batch_size)
    return _times(weights_of_a_forward_pass(setup), setup.passes(settings, size))


@functools.lru_cache
def columns_of(method: Method) -> tuple[int, int]:
    """Of what the method adds to a frozen weight at the start, and of its reserve, found by initialising a
    small layer.
    """
    if not method.changes_weight:
        return 0, 0
    side = 2 * method.rank
    while method.problem_with(side, side) is not None:
        side *= 2
    source = (
        torch.randn(side, side, generator=torch.Generator().manual_seed(0))
        if method.source_matrix()
        else None
    )
    init = method.initialise(LayerInit((side, side), source, torch.Generator().manual_seed(0)))
    return tuple(0 if pair is None else pair.right.shape[0] for pair in (init.base_update, init.reserve))


# ---------------------------------------------------------------------- recomposition


def swap_traffic(setup: Setup) -> Traffic:
    """Of one recomposition, with the tables of numbers that go with it; nothing for a method without any."""
    traffic: Traffic = Counter()
    method, layers = setup.method, setup.layers
    if setup.switching is None or setup.world_size == 1:
        return traffic
    table = 8 * len(layers)
    if method.element_scores() is not None:
        traffic[ALL_REDUCE] += method.rank * table
    if method.refill_from() == "restart":
        traffic += init_traffic(setup)
        # What the trained factors started as goes to the layers' owners.
        sizes = (_sizes(method, shape) for shape in layers.values())
        traffic[REDUCE] += FLOAT32 * sum(size[name] for size in sizes for name in method.trains)
    else:
        count = len(method.choose(torch.zeros(method.rank)))
        traffic[BROADCAST] += FLOAT32 * count * sum(map(sum, layers.values())) + table
        if method.refill_from() == "gradient":
            traffic += probe_traffic(setup, setup.probe_passes(method.refill_probe()))
            # Sizes of all columns of B and rows of A; and whether an owner failed.
            traffic[ALL_REDUCE] += 2 * method.rank * table + FLAG
    traffic[BROADCAST] += sum(
        renewed(packing)
        for name, packing in setup.shapes.packings.items()
        if name in layers and not method.fuses_beside(True)
    )
    traffic += _reading(setup)
    # Whether an owner failed; the rounding error and four norms of every layer.
    traffic[ALL_REDUCE] += FLAG + 5 * table
    return traffic


def _reading(setup: Setup) -> Traffic:
    """All factors, made whole on every rank."""
    traffic: Traffic = Counter()
    for shape in setup.layers.values():
        for name, size in _sizes(setup.method, shape).items():
            if name in setup.method.trains:
                traffic[ALL_REDUCE] += FLOAT32 * size
            elif setup.stage == 3:
                traffic[ALL_GATHER] += setup.shapes.width * setup.padded(size)
    return traffic


def _sizes(method: Method, shape: tuple[int, int]) -> dict[str, int]:
    shapes: Factors = method.shapes(*shape)
    return {name: prod(shape) for name, shape in shapes.items()}


# ---------------------------------------------------------------------- links


@dataclass(frozen=True)
class Links:
    """inter: bytes that leave one node. intra: bytes that one GPU sends to its neighbour in the node."""

    inter: float
    intra: float


def over_links(traffic: Traffic, nodes: int, gpus: int, group: int = 1) -> Links:
    """Rings in rank order, of which one edge leaves each node. Of S bytes on n ranks an all-gather or
    reduce-scatter sends S·(n−1)/n over every edge and an all-reduce twice that; a broadcast or reduce sends
    S, a gather on average half of it.

    group: ranks of an `all-gather in groups`.
    """
    world_size = nodes * gpus
    inter = intra = 0.0
    for kind, size in traffic.items():
        ranks = min(group, world_size) if kind == GROUP_GATHER else world_size
        edge = _share_of_an_edge(kind, ranks) * size
        inter += edge if nodes > 1 and ranks > gpus else 0.0
        intra += edge if gpus > 1 else 0.0
    return Links(inter, intra)


def _share_of_an_edge(kind: str, ranks: int) -> float:
    if kind in (BROADCAST, REDUCE):
        return 1.0
    if kind == GATHER:
        return 0.5
    return (2 if kind == ALL_REDUCE else 1) * (ranks - 1) / ranks


def _times(traffic: Traffic, count: int) -> Traffic:
    return Counter({kind: size * count for kind, size in traffic.items()})


def _rounded_up(number: int, to: int) -> int:
    return -(-number // to) * to
