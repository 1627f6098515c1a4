"""Where a method meets an engine: initialisation of all layers, spread over the ranks."""

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.ledger import pretrained_at_owner
from distlora.engine.owners import assign_owners, broadcast_pair, open_ledger, turns
from distlora.engine.protocol import Engine
from distlora.initialise.probe import Probe, mean_gradients
from distlora.maths.generators import layer_generator
from distlora.maths.linalg import low_rank_norm, squared_norm
from distlora.maths.low_rank import LowRank
from distlora.methods import Factors, Init
from distlora.methods.contract import LayerInit

log = logging.getLogger(__name__)

#: The line search over eta: exponents of ten of the root mean square of ΔW, every half decade.
SEARCH_FROM, SEARCH_TO = -5.5, -1.0
SEARCH_PATIENCE = 2
SEARCH_REFINEMENTS = (0.25,)


@dataclass
class InitReport:
    """What initialisation did. scalars: for logging under `init/`. search: (eta, probe loss) in the order
    tried. reserves: components for later, of the layers that this rank owns."""

    scalars: dict[str, float] = field(default_factory=dict)
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
) -> InitReport:
    """Gives every layer its factors, the same for every world size and ZeRO stage.

    seed: of the recipe. first_rate: the schedule's first learning rate that is not zero (for `eta:
    schedule`). data: the probe's samples, needed where the method starts from gradients. number: 0 at the
    start of a run, j for the j-th time that the adapter starts anew. keep_function: the factor that eta
    scales stays zero. Layer i is factorised by its owner alone (`assign_owners`); everyone else receives the
    factors.
    """
    method, layers = attached.method, attached.layers
    report = InitReport()
    if not layers:
        return report
    if engine.ledger is None:
        open_ledger(engine, attached, seed)
    owners = assign_owners(layers, method, engine.comm.world_size)
    settings = method.probe_settings()
    gradients: dict[str, Tensor] = {}
    if settings is not None:
        log.info("probing the full gradients of %d layers on %d samples", len(layers), data.samples)
        gradients = mean_gradients(
            engine, layers, owners, data.batches(), data.samples, data.loss, settings.sums
        )
        report.scalars["samples"] = data.samples
    eta = 1.0
    takes_step = settings is not None and settings.eta is not None
    if takes_step and settings.eta != "search" and not keep_function:
        eta = first_rate if settings.eta == "schedule" else settings.eta

    log.info("initialising the factors of %d layers", len(layers))
    draw_seed, starting = _draw_seed(seed, number), number == 0
    report.scalars |= factorise_all(
        engine, attached, owners, gradients, draw_seed, eta, report.reserves, stoppable=starting
    )
    if takes_step:
        if keep_function:
            eta = 0.0
            _scale(engine, layers, method.proportional_to_eta(), eta)
        elif settings.eta == "search":
            factor = method.proportional_to_eta()
            eta = search_eta(
                engine, layers, factor, data, report, may_stay=number > 0 and factor in method.trains
            )
        report.scalars["eta"] = eta
    return report


def factorise_all(
    engine: Engine,
    attached: Attached,
    owners: dict[str, int],
    gradients: dict[str, Tensor],
    seed: int | str,
    eta: float,
    reserves: dict[str, LowRank] | None = None,
    stoppable: bool = False,
) -> dict[str, float]:
    """Factors for every layer, from its weight or gradient, written into the engine; returns the means and
    the least values of what the method reported.

    gradients: of the layers that this rank owns, where the method asks for them; each is taken out as it is
    used. reserves: where to put the reserves of the layers that this rank owns. stoppable: Preempted may be
    raised between layers.
    """
    layers = attached.layers
    scalars: dict[str, dict[str, float]] = {}
    losses = _Losses()
    for turn in turns(layers, owners):
        found = _factorise(engine, attached, turn, owners, gradients, seed, eta)
        if stoppable:
            engine.comm.sum_or_stop()
        for name, layer in turn.items():
            _install(engine, attached, layer, owners[name], found.get(name), losses)
        scalars |= {name: init.report for name, init in found.items()}
        if reserves is not None:
            reserves |= {name: init.reserve for name, init in found.items() if init.reserve is not None}
    return _means(engine.comm, scalars, list(layers)) | losses.report(engine.comm)


@dataclass
class _Losses:
    """Squared norms over the whole model of what the change of frozen weights cost, each summed over this
    rank's shares.

    Of plain weights: what was rounded away, and what was added (`added` is the sum of all ranks already). Of
    packed ones: the pretrained weights, what packing them had cost, and what packing costs once the factors
    have their part.
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
    """What `initialise` does for gradients, for layers whose factors came from a checkpoint."""
    for layer in attached.layers.values():
        factors = {name: factor.to(engine.dtype) for name, factor in engine.read(layer).items()}
        layer.map_gradients(attached.method.gradient_map(factors))


def _factorise(
    engine: Engine,
    attached: Attached,
    turn: dict[str, AdapterLinear],
    owners: dict[str, int],
    gradients: dict[str, Tensor],
    seed: int | str,
    eta: float,
) -> dict[str, Init]:
    """The own layers of this turn, with their factors."""
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
            generator = layer_generator(seed, name)
            found[name] = method.initialise(
                LayerInit(turn[name].shape, source, generator, engine.dtype, eta, engine.comm.device)
            )
    except Exception as error:  # the others wait in a broadcast: tell them before this rank leaves
        failure = error
    engine.comm.agree(failure)
    return found


def _weight(engine: Engine, attached: Attached, layer: AdapterLinear, owner: int) -> Tensor | None:
    """The weight that a layer's factors are made of, on its owner: of a packed one what packing made of it,
    unless the method is going to take something out of it."""
    if (
        layer.packing is not None
        and engine.ledger.pretrained is not None
        and attached.method.takes_from_weight
    ):
        return pretrained_at_owner(engine.comm, engine.ledger.pretrained, layer.name, owner)
    return engine.weight_at_owner(layer, owner)


def _install(
    engine: Engine, attached: Attached, layer: AdapterLinear, owner: int, init: Init | None, losses: _Losses
) -> None:
    """The owner's factors into the layer on every rank, with the update of the weight and the correction of
    gradients that go with them."""
    factors = _broadcast(engine.comm, layer, owner, init)
    engine.write(layer, factors)
    layer.map_gradients(
        layer.method.gradient_map({name: factor.to(engine.dtype) for name, factor in factors.items()})
    )
    update = broadcast_pair(engine.comm, layer.shape, owner, init and init.base_update)
    if update is None:
        return
    if layer.packing is None:
        losses.rounded_away += engine.ledger.apply(engine, layer, 0, "nearest", update)
        losses.added += low_rank_norm(update.left, update.right) ** 2
        return
    _measure_packing(engine, attached, layer, owner, losses)
    losses.packing_the_rest += engine.ledger.apply(engine, layer, 0, "nearest", update)


def _measure_packing(
    engine: Engine, attached: Attached, layer: AdapterLinear, owner: int, losses: _Losses
) -> None:
    """What packing the pretrained weight has cost. Apart from what follows, which takes as many whole weights
    itself.
    """
    live, original = engine.weight_at_owner(layer, owner), _weight(engine, attached, layer, owner)
    if live is not None:
        losses.weights += squared_norm(original)
        losses.packing_them += squared_norm(original - live)


def _broadcast(comm: Comm, layer: AdapterLinear, owner: int, init: Init | None) -> Factors:
    """The owner's factors on every rank, float32 on the device. Frozen ones may hold values rounded to a
    lower dtype.
    """
    factors = {}
    for name, shape in layer.method.shapes(*layer.shape).items():
        value = torch.zeros(shape, device=comm.device)
        if init is not None:
            value.copy_(init.factors[name])
        factors[name] = comm.broadcast(value, owner)
    return factors


def _means(comm: Comm, scalars: dict[str, dict[str, float]], names: list[str]) -> dict[str, float]:
    """Each reported number as mean and least value over all layers; one collective."""
    keys = comm.share(
        sorted({key for report in scalars.values() for key in report}) if comm.is_main else None
    )
    table = torch.zeros(len(names), max(1, len(keys)), dtype=torch.float64, device=comm.device)
    for row, name in enumerate(names):
        for column, key in enumerate(keys):
            table[row, column] = scalars.get(name, {}).get(key, 0.0)
    comm.all_reduce(table)
    result = {}
    for column, key in enumerate(keys):
        result[key] = float(table[:, column].mean())
        result[f"{key}_min"] = float(table[:, column].min())
    return result


def search_eta(
    engine: Engine,
    layers: dict[str, AdapterLinear],
    factor: str,
    data: Probe,
    report: InitReport,
    may_stay: bool = False,
) -> float:
    """The eta with the least loss on the probe's samples: half decades upwards until the loss has risen
    twice, then finer.

    may_stay: answer 0 where no step lowers the loss, as happens late in a run.
    Only a scale changes, so one try is one forward pass, and nothing is written before the choice is made.
    """
    unit = report.scalars["step_rms"]  # of ΔW at eta = 1: 1 under AdamW, the gradient's own under SGD
    losses: dict[float, float] = {}

    def attempt(exponent: float) -> float:
        if exponent not in losses:
            eta = 10**exponent / unit
            for layer in layers.values():
                layer.try_scale(factor, eta)
            losses[exponent] = _probe_loss(engine, data)
            report.search.append((eta, losses[exponent]))
            log.info("eta %.3g: probe loss %.4f", eta, losses[exponent])
        return losses[exponent]

    try:
        for layer in layers.values():
            layer.try_scale(factor, 0.0)
        report.scalars["loss_before"] = _probe_loss(engine, data)
        worse, exponent = 0, SEARCH_FROM
        while exponent <= SEARCH_TO and worse < SEARCH_PATIENCE:
            least = min(losses.values(), default=float("inf"))
            worse = 0 if attempt(exponent) <= least else worse + 1
            exponent += 0.5
        for width in SEARCH_REFINEMENTS:
            best = min(losses, key=losses.get)
            attempt(best - width)
            attempt(best + width)
    finally:
        for layer in layers.values():
            layer.try_scale(None)
    best = min(losses, key=losses.get)
    eta = 10**best / unit
    report.scalars["loss_after"] = losses[best]
    if may_stay and losses[best] >= report.scalars["loss_before"]:
        eta, report.scalars["loss_after"] = 0.0, report.scalars["loss_before"]
    _scale(engine, layers, factor, eta)
    return eta


def _scale(engine: Engine, layers: dict[str, AdapterLinear], factor: str, scale: float) -> None:
    for layer in layers.values():
        engine.write(layer, {factor: engine.read(layer)[factor] * scale})


@torch.no_grad()
def _probe_loss(engine: Engine, data: Probe) -> float:
    """Mean over the probe's samples of each sample's mean loss, equal on all ranks."""
    total = torch.zeros((), device=engine.comm.device)
    engine.train_mode(False)
    with engine.probe_pass():
        for batch in data.forward_batches():
            total += engine.run_probe(data.loss, batch).detach().float()
    engine.train_mode(True)
    return float(engine.comm.all_reduce(total)) / data.samples
