"""Layers whose factors could never train as they start, and those that start without knowing a direction.

A gradient of A needs B and a gradient of B needs A. Where a method makes both of the weight, and that is zero
(the last projections in the new blocks of LLaMA-Pro), both are zero and stay so. That is certain at once, and
has another remedy than a gradient that comes late.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from distlora.adapter.targets import in_short
from distlora.engine.comm import Comm
from distlora.errors import UserError
from distlora.maths.functional import linear
from distlora.maths.linalg import squared_norm
from distlora.methods import HasMagnitude, Init, LayerInit, Method, recomposing

log = logging.getLogger(__name__)


class DeadStarts:
    """Collects both on the rank that makes a layer's factors, and tells all ranks."""

    def __init__(self, method: Method):
        self._method = method
        self._dead: list[str] = []
        self._aimless: list[str] = []
        #: Rows of W that are zero, which a magnitude multiplies by zero for ever, by layer.
        self._rows: dict[str, int] = {}

    def look(self, name: str, layer: LayerInit, init: Init) -> None:
        """At a layer's factors, before what they were made of is forgotten."""
        method = self._method
        if method.source_matrix() == "gradient" and squared_norm(layer.source) == 0:
            self._aimless.append(name)
        if _comes_from_gradients_later(method):
            return
        if not can_train(method, layer, init):
            self._dead.append(name)
        elif isinstance(method, HasMagnitude):
            zero = int((init.factors[method.magnitude] == 0).sum())
            self._rows |= {name: zero} if zero else {}

    def tell(self, comm: Comm) -> None:
        """Collective. Errors: UserError on all ranks where factors could never train."""
        found = (self._dead, self._aimless, list(self._rows))
        if not any(comm.sum(*(float(len(names)) for names in found))):
            return
        dead, aimless, rows = ([name for names in comm.gather(own) for name in names] for own in found)
        name = self._method.name
        if dead:
            of_weight = self._method.source_matrix() == "weight"
            why = "what it starts from, the weight, is zero there" if of_weight else "its factors start so"
            raise UserError(
                f"method {name} would never train anything in {_listed(dead)}, since {why}: leave their "
                "blocks out (targets.exclude), or take a method that starts beside the weight, such as lora",
                agreed=True,
            )
        if aimless:
            log.warning(
                "the gradient that %s starts from is zero in %s: it starts there in arbitrary directions",
                name, _listed(aimless),
            )  # fmt: skip
        if rows:
            log.warning(
                "%s does not train rows of a weight that are zero, as some are in %s", name, _listed(rows)
            )


def can_train(method: Method, layer: LayerInit, init: Init) -> bool:
    """Whether any trained factor has a gradient for any input and any gradient of the output: asked with
    random ones, for which a gradient is zero only if it always is.
    """
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = layer.shape
    x, dy = (
        torch.randn(1, size, generator=generator).to(layer.device) for size in (in_features, out_features)
    )
    factors = {
        name: factor.to(layer.device, torch.float32, copy=True) for name, factor in init.factors.items()
    }
    trained = [factors[name].requires_grad_(True) for name in method.trains]
    with torch.enable_grad():
        y = _output(method, layer, x, factors)
        if not y.requires_grad:
            return False
        gradients = torch.autograd.grad((y * dy).sum(), trained, allow_unused=True)
    return any(gradient is not None and float(gradient.abs().max()) != 0 for gradient in gradients)


def _output(method: Method, layer: LayerInit, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    if isinstance(method, HasMagnitude):  # what the weight computes is multiplied with it
        weight = layer.source.to(layer.device)
        return method.forward(x, weight, None, factors, False, linear)
    nothing = torch.zeros(1, layer.shape[0], device=layer.device)
    return method.forward(x, nothing, None, factors, False, lambda *_: nothing)


def _comes_from_gradients_later(method: Method) -> bool:
    """Whether new components, of gradients, will take the places of those that cannot train."""
    recomposes = recomposing(method)
    return recomposes is not None and recomposes.refill_probe() is not None


def _listed(names: Iterable[str]) -> str:
    return in_short(sorted(names))
