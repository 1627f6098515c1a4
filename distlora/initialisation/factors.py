"""The initialisation of all layers, spread over the ranks."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.ledger import pretrained_at_owner
from distlora.engine.owners import assign_owners, broadcast_pair, open_ledger, turns
from distlora.engine.protocol import Engine
from distlora.initialisation.dead_starts import DeadStarts
from distlora.initialisation.experts import gradient_maps, initialise_stack
from distlora.initialisation.probe import Probe, mean_gradients
from distlora.initialisation.search import scale_factor, search_eta
from distlora.maths.generators import layer_generator
from distlora.maths.linalg import squared_norm
from distlora.maths.low_rank import LowRank, pair_norm
from distlora.methods import (
    CorrectsGradients,
    Factors,
    Init,
    LayerInit,
    ProbeSettings,
    TakesFromWeight,
    probe_of,
)
from distlora.progress import each

log = logging.getLogger(__name__)


#: From the name of a layer to its factors, on the rank that owns it: float32, on the CPU.
Given = Callable[[str], Factors]


@dataclass
class InitReport:
    """What initialisation did. scalars: for logging under `init/`. layers: what the method reported of each
    layer, by quantity and layer. search: (eta, probe loss) in the order of the attempts. reserves: components
    for later, of the layers that this rank owns.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    search: list[tuple[float, float]] = field(default_factory=list)
    reserves: dict[str, LowRank] = field(default_factory=dict)


def initialise(
    engine: Engine,
    attached: Attached,
    seed: int,
    first_rate: float,
    data: Probe | None = None,
    number: int = 0,
    keep_function: bool = False,
    given: Given | None = None,
) -> InitReport:
    """Gives every layer its factors, the same for every world size and ZeRO stage.

    seed: of the recipe. first_rate: the schedule's first learning rate that is not zero (for `eta:
    schedule`). data: the probe's samples, needed where the method starts from gradients. number: 0 at the
    start of a run, j for the j-th time that the adapter starts anew. keep_function: the factor that eta
    scales becomes zero. given: the factors of a layer by its name, in place of those that the method would
    make. Each layer is factorised by its owner alone (`assign_owners`); the other ranks receive the factors.
    """
    method, layers = attached.method, attached.layers
    report = InitReport()
    if not layers:
        return report
    if engine.ledger is None:
        open_ledger(engine, attached, seed)
    owners = assign_owners(layers, method, engine.comm.world_size)
    settings = probe_of(method)
    gradients: dict[str, Tensor] = {}
    if settings is not None:
        log.info("probing the full gradients of %d layers on %d samples", len(layers), data.samples)
        gradients = mean_gradients(
            engine,
            layers,
            owners,
            each(data.batches(), "probing", "passes", data.passes),
            data.samples,
            data.loss,
            settings.sums,
        )
        report.scalars["samples"] = data.samples

    log.info("initialising the factors of %d layers", len(layers))
    takes_step = settings is not None and settings.eta is not None
    eta = _given_eta(settings, first_rate) if takes_step and not keep_function else None
    draw_seed, starting = _draw_seed(seed, number), number == 0
    report.scalars |= factorise_all(
        engine, attached, owners, gradients, draw_seed, 1.0 if eta is None else eta, report.reserves,
        stoppable=starting, given=given, by_layer=report.layers,
    )  # fmt: skip
    if not takes_step:
        return report
    if keep_function:
        eta = 0.0
        scale_factor(engine, layers, method.proportional_to_eta(), eta)
    elif eta is None:
        eta = _search(engine, attached, data, report, late=not starting)
    report.scalars["eta"] = eta
    return report


def _given_eta(settings: ProbeSettings, first_rate: float) -> float | None:
    """The size of the first step; None where it has to be searched."""
    if settings.eta == "search":
        return None
    return first_rate if settings.eta == "schedule" else settings.eta


def _search(engine: Engine, attached: Attached, data: Probe, report: InitReport, late: bool) -> float:
    """The size of the first step by a line search, which goes into the report. late: not at the start of the
    run. A step of zero is allowed then, if what it scales can still be trained.
    """
    method = attached.method
    factor = method.proportional_to_eta()
    found = search_eta(
        engine, attached.layers, factor, data, report.scalars["step_rms"],
        may_stay=late and factor in method.trains,
    )  # fmt: skip
    report.search = found.tried
    report.scalars |= {"loss_before": found.loss_before, "loss_after": found.loss_after}
    return found.eta


def factorise_all(
    engine: Engine,
    attached: Attached,
    owners: dict[str, int],
    gradients: dict[str, Tensor],
    seed: int | str,
    eta: float,
    reserves: dict[str, LowRank] | None = None,
    stoppable: bool = False,
    given: Given | None = None,
    by_layer: dict[str, dict[str, float]] | None = None,
) -> dict[str, float]:
    """Writes the factors of every layer, made of its weight or gradient, into the engine. Returns means and
    least values of what the method reported.

    gradients: of the layers that this rank owns, where the method asks for them; each one is removed when it
    is used. reserves: is given the reserves of the layers that this rank owns. stoppable: whether Preempted
    may be raised between layers. by_layer: is given what the method reported, by quantity and layer.
    """
    layers = attached.layers
    scalars: dict[str, dict[str, float]] = {}
    losses, dead_starts = _Losses(), DeadStarts(attached.method)
    rounds = list(turns(layers, owners))
    for turn in each(rounds, "initialising", "rounds of layers", len(rounds)):
        if given is not None:
            found = _take(engine, turn, owners, given)
        else:
            found = _factorise(engine, attached, turn, owners, gradients, seed, eta, dead_starts)
        if stoppable:
            engine.comm.sum_or_stop()
        for name, layer in turn.items():
            _install(engine, attached, layer, owners[name], found.get(name), losses)
        scalars |= {name: init.report for name, init in found.items()}
        if reserves is not None:
            reserves |= {name: init.reserve for name, init in found.items() if init.reserve is not None}
    dead_starts.tell(engine.comm)
    found = _by_quantity(engine.comm, scalars, list(layers))
    if by_layer is not None:
        by_layer |= found
    return _means(found) | losses.report(engine.comm)


@dataclass
class _Losses:
    """What the change of frozen weights cost, as squared norms over the whole model, of which each rank has a
    share.

    Plain weights: rounded_away, and added (the sum of all ranks already). Packed weights: the pretrained
    weights, the error of packing them, and the error of packing what the factors leave of them.
    """

    rounded_away: float = 0.0
    added: float = 0.0
    weights: float = 0.0
    packing_them: float = 0.0
    packing_the_rest: float = 0.0

    def report(self, comm: Comm) -> dict[str, float]:
        rounded_away, weights, before, after = comm.sum(
            self.rounded_away, self.weights, self.packing_them, self.packing_the_rest
        )
        found = {"rounding_loss": math.sqrt(rounded_away / self.added)} if self.added else {}
        if before:
            found["quantization_error"] = math.sqrt(before / weights)
            found["quantization_error_left"] = math.sqrt(after / before)
        return found


def _draw_seed(seed: int, number: int) -> int | str:
    return seed if number == 0 else f"{seed}.{number}"


def install_gradient_maps(engine: Engine, attached: Attached) -> None:
    """Installs the corrections of gradients in layers whose factors came from a checkpoint."""
    if not isinstance(attached.method, CorrectsGradients):
        return
    for layer in attached.layers.values():
        factors = {name: factor.to(engine.dtype) for name, factor in engine.read(layer).items()}
        layer.map_gradients(gradient_maps(layer, factors))


def _take(
    engine: Engine, turn: dict[str, AdapterLinear], owners: dict[str, int], given: Given
) -> dict[str, Init]:
    """The factors of the layers that this rank owns in this turn, as they are given."""
    found, failure = {}, None
    try:
        for name in turn:
            if owners[name] == engine.comm.rank:
                found[name] = Init(given(name))
    except Exception as error:  # the others wait in a broadcast: tell them before this rank leaves
        failure = error
    engine.comm.agree(failure)
    return found


def _factorise(
    engine: Engine,
    attached: Attached,
    turn: dict[str, AdapterLinear],
    owners: dict[str, int],
    gradients: dict[str, Tensor],
    seed: int | str,
    eta: float,
    dead_starts: DeadStarts,
) -> dict[str, Init]:
    """The factors of the layers that this rank owns in this turn."""
    method, sources = attached.method, {}
    for name, layer in turn.items():
        weight = (
            _weight(engine, attached, layer, owners[name]) if method.source_matrix() == "weight" else None
        )
        if owners[name] == engine.comm.rank:
            sources[name] = weight if method.source_matrix() == "weight" else gradients.pop(name, None)
    found, failure = {}, None
    try:
        for name, source in sources.items():
            layer, device = turn[name], engine.comm.device
            if layer.stack:
                found[name] = initialise_stack(
                    layer, source, seed, engine.dtype, eta, device, dead_starts.look
                )
                continue
            generator = layer_generator(seed, name)
            given = LayerInit(layer.shape, source, generator, engine.dtype, eta, device)
            found[name] = method.initialise(given)
            dead_starts.look(name, given, found[name])
    except Exception as error:  # the others wait in a broadcast: tell them before this rank leaves
        failure = error
    engine.comm.agree(failure)
    return found


def _weight(engine: Engine, attached: Attached, layer: AdapterLinear, owner: int) -> Tensor | None:
    """The weight that a layer's factors are made of, on its owner. Of a packed weight that is what packing
    left of it, unless the method takes something out of the weight.
    """
    takes = isinstance(attached.method, TakesFromWeight)
    if takes and layer.packing is not None and engine.ledger.pretrained is not None:
        return pretrained_at_owner(engine.comm, engine.ledger.pretrained, layer.name, owner)
    return engine.weight_at_owner(layer, owner)


def _install(
    engine: Engine, attached: Attached, layer: AdapterLinear, owner: int, init: Init | None, losses: _Losses
) -> None:
    """Writes the owner's factors into the layer on every rank, with the update of the weight and the
    correction of gradients that belong to them.
    """
    factors = _broadcast(engine.comm, layer, owner, init)
    engine.write(layer, factors)
    if isinstance(layer.method, CorrectsGradients):
        used = {name: factor.to(engine.dtype) for name, factor in factors.items()}
        layer.map_gradients(gradient_maps(layer, used))
    update = broadcast_pair(engine.comm, layer.whole_shape, owner, init and init.base_update)
    if update is None:
        return
    if layer.packing is None:
        losses.rounded_away += engine.ledger.apply(engine, layer, 0, "nearest", update)
        losses.added += pair_norm(update) ** 2
        return
    _measure_packing(engine, attached, layer, owner, losses)
    losses.packing_the_rest += engine.ledger.apply(engine, layer, 0, "nearest", update)


def _measure_packing(
    engine: Engine, attached: Attached, layer: AdapterLinear, owner: int, losses: _Losses
) -> None:
    """Counts what packing the pretrained weight has cost.

    A function of its own, so that its whole weights are freed before the next ones are made.
    """
    live, original = engine.weight_at_owner(layer, owner), _weight(engine, attached, layer, owner)
    if live is not None:
        losses.weights += squared_norm(original)
        losses.packing_them += squared_norm(original - live)


def _broadcast(comm: Comm, layer: AdapterLinear, owner: int, init: Init | None) -> Factors:
    """The owner's factors on every rank, float32 on the device. Frozen ones may have been rounded to a lower
    dtype.
    """
    factors = {}
    for name, shape in layer.factor_shapes().items():
        value = torch.zeros(shape, device=comm.device)
        if init is not None:
            value.copy_(init.factors[name])
        factors[name] = comm.broadcast(value, owner)
    return factors


def _by_quantity(
    comm: Comm, scalars: dict[str, dict[str, float]], names: list[str]
) -> dict[str, dict[str, float]]:
    """Each reported number of all layers, by its key and then by layer, on every rank. One collective.
    scalars: of the layers that this rank owns.
    """
    keys = comm.share(
        sorted({key for report in scalars.values() for key in report}) if comm.is_main else None
    )
    table = torch.zeros(len(names), max(1, len(keys)), dtype=torch.float64, device=comm.device)
    for row, name in enumerate(names):
        for column, key in enumerate(keys):
            table[row, column] = scalars.get(name, {}).get(key, 0.0)
    comm.all_reduce(table)
    return {key: dict(zip(names, table[:, column].tolist())) for column, key in enumerate(keys)}


def _means(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean and least value over all layers of each number."""
    result = {}
    for key, by_layer in found.items():
        values = torch.tensor(list(by_layer.values()), dtype=torch.float64)
        result[key], result[f"{key}_min"] = float(values.mean()), float(values.min())
    return result
