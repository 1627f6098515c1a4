"""What an adapter layer computes in one pass through the model. Every layer is in one of these passes at a
time, and calls it with itself and the input x (…, in); the answer is (…, out).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from distlora.methods import Factors, HasMagnitude

if TYPE_CHECKING:
    from distlora.adapter.layer import AdapterLinear

#: Is shown (dL/dy, x) of a layer, (tokens, out) and (tokens, in), in the backward pass; of a stack of experts
#: also how many tokens each expert has.
Tap = Callable[..., None]
#: `x Wᵀ + b` from x, the stored weight and the bias.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Pass(Protocol):
    def __call__(self, layer: "AdapterLinear", x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Adapted:
    """The layer as it is trained, evaluated and exported. Every layer is in this pass unless it is told
    otherwise.
    """

    def __call__(self, layer: "AdapterLinear", x: Tensor) -> Tensor:
        return _adapted(layer, x, layer.factors(), layer.training, layer.product)


@dataclass(frozen=True)
class Bare:
    """The layer as it was before it was adapted, whatever its factors are."""

    def __call__(self, layer: "AdapterLinear", x: Tensor) -> Tensor:
        return _frozen(layer, x, layer.weight, layer.bias, layer.product)


@dataclass(frozen=True)
class Tried:
    """The adapted layer with one factor multiplied by `scale`, which is not written."""

    factor: str
    scale: float

    def __call__(self, layer: "AdapterLinear", x: Tensor) -> Tensor:
        factors = layer.factors()
        factors[self.factor] = factors[self.factor] * self.scale
        return _adapted(layer, x, factors, layer.training, layer.product)


@dataclass(frozen=True)
class Tapped:
    """The layer as it was before it was adapted; its backward pass shows (dL/dy, x) to `tap`.

    anchor: see `tapped_linear`.
    """

    anchor: Tensor
    tap: Tap

    def __call__(self, layer: "AdapterLinear", x: Tensor) -> Tensor:
        return _frozen(layer, x, layer.weight, layer.bias, self._product_of(layer))

    def _product_of(self, layer: "AdapterLinear") -> Product:
        return lambda x, weight, bias: layer.tapped_product(x, weight, bias, self.anchor, self.tap)


@dataclass(frozen=True)
class TappedAdapted(Tapped):
    """The adapted layer without dropout, tapped likewise. No factor collects a gradient."""

    def __call__(self, layer: "AdapterLinear", x: Tensor) -> Tensor:
        factors = {name: factor.detach() for name, factor in layer.factors().items()}
        return _adapted(layer, x, factors, False, self._product_of(layer))


def _adapted(layer: "AdapterLinear", x: Tensor, factors: Factors, training: bool, product: Product) -> Tensor:
    """What the method makes of the layer. product: computes `x Wᵀ + b` with the stored weight."""

    def base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _frozen(layer, x, weight, bias, product)

    norms = {}
    if isinstance(layer.method, HasMagnitude):
        norms = {"prepared": layer.prepared(factors), "spread": layer.spread}
    return layer.method.forward(x, layer.weight, layer.bias, factors, training, base, layer.along, **norms)


def _frozen(
    layer: "AdapterLinear", x: Tensor, weight: Tensor, bias: Tensor | None, product: Product
) -> Tensor:
    """`x Wᵀ + b` of the frozen layer, with the pairs that were put beside W."""
    y, beside = product(x, weight, bias), layer.beside
    return y if beside is None else y + layer.along(layer.along(x, beside.right, None), beside.left, None)
