"""The size of a first step, by a line search on the probe's samples."""

import logging
from dataclasses import dataclass, field

import torch

from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine
from distlora.initialisation.probe import Probe, modes_kept
from distlora.progress import phase

log = logging.getLogger(__name__)

#: The sizes that are tried, as exponents of ten of the root mean square of ΔW: every half decade from FROM up
#: to TO, until the loss has risen PATIENCE times; then both sides of the best one, at these distances.
FROM, TO = -5.5, -1.0
PATIENCE = 2
REFINEMENTS = (0.25,)


@dataclass
class Search:
    """eta: the size that was chosen. loss_before: probe loss without a step. loss_after: with the chosen one.
    tried: (eta, probe loss) in the order of the attempts.
    """

    eta: float = 0.0
    loss_before: float = 0.0
    loss_after: float = 0.0
    tried: list[tuple[float, float]] = field(default_factory=list)


def search_eta(
    engine: Engine,
    layers: dict[str, AdapterLinear],
    factor: str,
    data: Probe,
    unit: float,
    may_stay: bool = False,
) -> Search:
    """The eta with the least loss on the probe's samples. The factor is then scaled by it in all layers.

    factor: what eta scales. unit: root mean square of ΔW at eta = 1 (1 under AdamW, the gradient's own under
    SGD). may_stay: answer 0 where no step lowers the loss, as happens late in a run. Only a scale changes, so
    an attempt is one forward pass, and nothing is written before the choice is made.
    """
    found, losses = Search(), {}

    def attempt(exponent: float) -> float:
        if exponent not in losses:
            eta = 10**exponent / unit
            losses[exponent] = _loss_with(engine, layers, factor, eta, data)
            found.tried.append((eta, losses[exponent]))
            log.info("eta %.3g: probe loss %.4f", eta, losses[exponent])
        return losses[exponent]

    try:
        found.loss_before = _loss_with(engine, layers, factor, 0.0, data)
        worse, exponent = 0, FROM
        while exponent <= TO and worse < PATIENCE:
            least = min(losses.values(), default=float("inf"))
            worse = 0 if attempt(exponent) <= least else worse + 1
            exponent += 0.5
        for width in REFINEMENTS:
            best = min(losses, key=losses.get)
            attempt(best - width)
            attempt(best + width)
    finally:
        for layer in layers.values():
            layer.try_scale(None)
    best = min(losses, key=losses.get)
    found.eta, found.loss_after = 10**best / unit, losses[best]
    if may_stay and found.loss_after >= found.loss_before:
        found.eta, found.loss_after = 0.0, found.loss_before
    scale_factor(engine, layers, factor, found.eta)
    return found


def scale_factor(engine: Engine, layers: dict[str, AdapterLinear], factor: str, scale: float) -> None:
    """Multiplies one factor of every layer by `scale`, in all copies of it."""
    for layer in layers.values():
        engine.write(layer, {factor: engine.read(layer)[factor] * scale})


def _loss_with(
    engine: Engine, layers: dict[str, AdapterLinear], factor: str, scale: float, data: Probe
) -> float:
    """The probe loss with the factor multiplied by `scale`. The layers stay in that pass."""
    for layer in layers.values():
        layer.try_scale(factor, scale)
    with phase("trying a size of the first step"):
        return _probe_loss(engine, data)


@torch.no_grad()
def _probe_loss(engine: Engine, data: Probe) -> float:
    """Mean over the probe's samples of each sample's mean loss, equal on all ranks."""
    total = torch.zeros((), device=engine.comm.device)
    with engine.probe_pass(), modes_kept(engine.module):
        engine.module.eval()
        for batch in data.forward_batches():
            total += engine.run_probe(data.loss, batch).detach().float()
    return float(engine.comm.all_reduce(total)) / data.samples
