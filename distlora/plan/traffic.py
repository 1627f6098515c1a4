"""What ranks send each other, by kind of collective: in a training step, in the initialisation, and in a
recomposition.

The bytes are those of the whole tensor of a collective: the tensor that is all-reduced or broadcast, the
result of an all-gather, the operand of a reduce-scatter. Single numbers, and tables of a few numbers a layer
(counts, losses, norms), are left out.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from distlora.initialisation.trial import trial
from distlora.methods import (
    Factors,
    Method,
    TakesFromWeight,
    TransformsGradients,
    probe_of,
    writes_weight,
)
from distlora.plan.packed import renewed
from distlora.plan.setup import FLOAT32, Setup

#: Bytes by kind of collective.
Traffic = Counter[str]
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce-scatter", "all-gather"
BROADCAST, REDUCE = "broadcast", "reduce"
#: Bytes of the two numbers by which ranks learn that one of them failed.
FLAG = 16
#: An all-gather within a group of ranks that together hold all frozen weights (hpZ).
GROUP_GATHER = "all-gather in groups"


def step_traffic(setup: Setup) -> Traffic:
    """Traffic of one optimizer step with all its micro-batches, once DeepSpeed knows the order of modules."""
    traffic: Traffic = Counter()
    if setup.world_size == 1:
        return traffic
    trained, width = sum(setup.shapes.trained.values()), setup.shapes.width
    if setup.stage <= 1:  # every rank accumulates its gradients, which are reduced once, in float32
        traffic[ALL_REDUCE] = FLOAT32 * setup.summed_at_once
    if setup.stage == 2:
        traffic[ALL_REDUCE] = FLOAT32 * trained * setup.accumulation
    if setup.stage in (1, 2):
        # Every rank has stepped its own part of the trained parameters, which are joined into one tensor.
        traffic[ALL_GATHER] = width * _rounded_up(trained, 2 * setup.world_size)
    if setup.stage == 3:
        scattered = sum(setup.padded(size) for size in setup.shapes.trained.values())
        traffic[REDUCE_SCATTER] = FLOAT32 * scattered * setup.accumulation
        traffic += _times(weights_of_a_pass(setup), setup.accumulation)
        traffic[ALL_GATHER] += width * sum(
            setup.padded(setup.shapes.sizes[name]) for name in setup.persistent
        )
    if isinstance(setup.method, TransformsGradients):
        # Every rank gets the whole gradients, and under ZeRO-3 also the whole factors.
        sizes = [_sizes(setup.method, shape) for shape in setup.layers.values()]
        factors = sum(size for layer in sizes for name, size in layer.items() if name in setup.method.trains)
        traffic[ALL_REDUCE] += FLOAT32 * factors * (2 if setup.stage == 3 else 1)
    return traffic


def weights_of_a_pass(setup: Setup, probe: bool = False, recorded: bool = True) -> Traffic:
    """What ZeRO-3 gathers in one forward and backward pass over one micro-batch; nothing at other stages."""
    traffic: Traffic = Counter()
    if setup.stage < 3 or setup.world_size == 1:
        return traffic
    for name, times in setup.gathered(probe, recorded).times.items():
        kind = GROUP_GATHER if setup.group > 1 and name not in setup.shapes.trained else ALL_GATHER
        traffic[kind] += setup.shapes.width * times * setup.padded(setup.shapes.sizes[name])
    return traffic


def weights_of_a_forward_pass(setup: Setup) -> Traffic:
    """What ZeRO-3 gathers in one pass without gradients: every partitioned parameter once."""
    traffic: Traffic = Counter()
    if setup.stage == 3 and setup.world_size > 1:
        for name in setup.partitioned:
            kind = GROUP_GATHER if setup.group > 1 and name not in setup.shapes.trained else ALL_GATHER
            traffic[kind] += setup.shapes.width * setup.padded(setup.shapes.sizes[name])
    return traffic


# ---------------------------------------------------------------------- initialisation


def init_traffic(setup: Setup) -> Traffic:
    """Traffic of the initialisation without a line search: the probe, weights to the owners of their layers,
    factors to all ranks.
    """
    traffic: Traffic = Counter()
    if setup.world_size == 1 or not setup.layers:
        return traffic
    method, settings = setup.method, probe_of(setup.method)
    if settings is not None:
        traffic += probe_traffic(setup, setup.probe_passes(settings))
    taken, _ = columns_of(method)
    for name in setup.shapes.attached.layers:
        # The rest of a packed weight is packed anew and compared with what was stored before. The pretrained
        # weight is read from its file.
        rest = isinstance(method, TakesFromWeight) and name in setup.shapes.packings
        if setup.stage == 3 and (rest or method.source_matrix() == "weight"):
            traffic[ALL_GATHER] += setup.shapes.width * setup.padded(setup.shapes.sizes[f"{name}.weight"])
        if rest:
            traffic[BROADCAST] += renewed(setup.shapes.packings[name])
    for shape in setup.layers.values():
        factors = sum(map(prod, method.shapes(*shape).values()))
        traffic[BROADCAST] += FLOAT32 * (factors + taken * sum(shape))
    return traffic


def probe_traffic(setup: Setup, passes: int) -> Traffic:
    """Traffic of so many passes: every layer's gradient to its owner, and under ZeRO-3 the weights.

    In the first pass DeepSpeed learns the order of the modules, and gathers more.
    """
    traffic = _times(weights_of_a_pass(setup, probe=True), max(0, passes - 1))
    traffic += weights_of_a_pass(setup, probe=True, recorded=False)
    traffic[REDUCE] = FLOAT32 * passes * sum(map(prod, setup.layers.values()))
    return traffic


def search_traffic(setup: Setup) -> Traffic:
    """Traffic of one try of the line search for the size of the first step; nothing without a search."""
    settings = probe_of(setup.method)
    if settings is None or settings.eta != "search" or setup.world_size == 1:
        return Counter()
    size = max(settings.micro_batch_size, setup.recipe.train.micro_batch_size)
    return _times(weights_of_a_forward_pass(setup), setup.passes(settings, size))


def columns_of(method: Method) -> tuple[int, int]:
    """Columns that the method adds to a frozen weight at the start, and columns of its reserve."""
    if not writes_weight(method):
        return 0, 0
    found = trial(method)
    return found.taken, found.reserved


# ---------------------------------------------------------------------- recomposition


def recomposition_traffic(setup: Setup) -> Traffic:
    """Traffic of one recomposition, here with its tables of numbers; nothing for a method that never
    recomposes.
    """
    traffic: Traffic = Counter()
    method, layers = setup.recomposing, setup.layers
    if method is None or setup.world_size == 1:
        return traffic
    table, entry = 8 * len(layers), 8 * len(setup.shapes.attached.layers)
    if method.element_scores() is not None:
        traffic[ALL_REDUCE] += method.rank * table
    if method.refill_from() == "restart":
        traffic += init_traffic(setup)
        # The initial values of the trained factors go to the owners of the layers.
        sizes = (_sizes(method, shape) for shape in layers.values())
        traffic[REDUCE] += FLOAT32 * sum(size[name] for size in sizes for name in method.trains)
    else:
        count = len(method.choose(torch.zeros(method.rank)))
        traffic[BROADCAST] += FLOAT32 * count * sum(map(sum, layers.values())) + entry
        if method.refill_from() == "gradient":
            traffic += probe_traffic(setup, setup.probe_passes(method.refill_probe()))
            # The norms of all columns of B and rows of A; and whether an owner failed.
            traffic[ALL_REDUCE] += 2 * method.rank * table + FLAG
    traffic[BROADCAST] += sum(
        renewed(packing)
        for name, packing in setup.shapes.packings.items()
        if name in layers and not method.fuses_beside(True)
    )
    traffic += _reading_factors(setup)
    # Whether an owner failed; the rounding error and four norms of every layer.
    traffic[ALL_REDUCE] += FLAG + 5 * entry
    return traffic


def _reading_factors(setup: Setup) -> Traffic:
    """Traffic of reading all factors: every rank gets them whole."""
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
    """Bytes over links. inter: those that leave one node. intra: those that one GPU sends to its neighbour in
    the node.
    """

    inter: float
    intra: float


def over_links(traffic: Traffic, nodes: int, gpus: int, group: int = 1) -> Links:
    """The bytes over links if every collective runs as a ring in rank order, of which one edge leaves each
    node.

    On n ranks, an all-gather or reduce-scatter of S bytes sends S·(n−1)/n over every edge, and an all-reduce
    sends twice that. A broadcast or reduce sends S. group: ranks of an `all-gather in groups`.
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
    return (2 if kind == ALL_REDUCE else 1) * (ranks - 1) / ranks


def _times(traffic: Traffic, count: int) -> Traffic:
    return Counter({kind: size * count for kind, size in traffic.items()})


def _rounded_up(number: int, to: int) -> int:
    return -(-number // to) * to
