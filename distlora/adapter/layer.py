"""The adapter layer: W, bias and all factors are direct parameters of one module.

It is one module so that ZeRO-3 gathers exactly what the layer's own forward and backward passes use, and
releases it afterwards. What the forward pass computes depends on the pass that the layer is in, see `passes`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from distlora.adapter.linears import keeps_transpose, matrix_of, shape_of
from distlora.adapter.packed import Packing
from distlora.adapter.passes import Adapted, Bare, Pass, Tap, Tapped, TappedAdapted, Tried
from distlora.maths.functional import linear, tapped_linear
from distlora.maths.linalg import squared_norm
from distlora.maths.low_rank import LowRank, add_low_rank, add_pair, pair_norm
from distlora.maths.rounding import Rounding
from distlora.methods import Factors, Method


class PackedLinear(nn.Linear):
    """A frozen linear layer with a packed weight: `weight` is flat, and `packing` makes (out, in) of it.

    device: where packing is computed; the packed weight stays where the weight was. fan_in_fan_out: whether
    the model's files hold it as (in, out).
    """

    def __init__(self, linear: nn.Module, packing: Packing, device: torch.device):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a whole weight
        self.out_features, self.in_features = shape_of(linear)
        self.bias, self.packing, self.fan_in_fan_out = linear.bias, packing, keeps_transpose(linear)
        weight = matrix_of(linear)
        self.weight = nn.Parameter(packing.pack(weight.to(device)).to(weight.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packing.unpack)


class AdapterLinear(nn.Module):
    """A linear layer `y = x Wᵀ + b` with a method's factors beside W.

    weight: (out, in), frozen; (in, out) where `transposed`, flat and packed where `packing` is not None.
    bias: (out,) or None, frozen. Each factor is a parameter under its own name, zero until it is written.
    name: the layer's name in the bare model, such as `model.layers.0.self_attn.q_proj`. fan_in_fan_out:
    whether the model's files hold the weight as (in, out), as those of GPT-2 do. called: whether a pass has
    reached the layer yet. stack: (), or (E,) where the layer is a stack of experts, see `expert_layers`: it
    stands before the shape of every tensor.

    What a method prepares from W and the factors is kept until `changed` is called. Whoever writes into one
    of them must call it.
    """

    def __init__(self, linear: nn.Module, method: Method, name: str):
        super().__init__()
        self.name, self.method = name, method
        self.out_features, self.in_features = shape_of(linear)
        self.fan_in_fan_out = keeps_transpose(linear)
        self.weight, self.bias = linear.weight, linear.bias
        self.packing: Packing | None = getattr(linear, "packing", None)
        self.stack: tuple[int, ...] = getattr(linear, "stack", ())
        shapes = self.factor_shapes()
        self._factor_names = tuple(shapes)
        for factor, shape in shapes.items():
            empty = torch.zeros(shape, dtype=self.weight.dtype, device=self.weight.device)
            self.register_parameter(factor, nn.Parameter(empty, requires_grad=factor in method.trains))
        self.present_pass: Pass = Adapted()
        self.called = False
        self._beside: LowRank | None = None
        self._gradient_hooks: list = []
        self._prepared: Factors | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.called = self.called or x.numel() > 0
        return self.present_pass(self, x)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in). `weight.shape` does not say so: under ZeRO-3 it is empty between passes."""
        return self.out_features, self.in_features

    @property
    def transposed(self) -> bool:
        """Whether `weight` holds the transpose of W. Packing turns it: what is packed is W."""
        return self.fan_in_fan_out and self.packing is None

    def as_stored(self, update: LowRank) -> LowRank:
        """What is to be added to `weight`, as it is stored, so that `update` (out, in) is added to W."""
        return LowRank(update.right.T, update.left.T) if self.transposed else update

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of what `whole_weight` answers."""
        return *self.stack, *self.shape

    @property
    def matrix_names(self) -> list[str]:
        """A name for every matrix of the layer: its own, or that of each expert of a stack."""
        return [f"{self.name}.{expert}" for expert in range(*self.stack)] if self.stack else [self.name]

    @property
    def elements(self) -> int:
        """Of the whole weight."""
        return prod(self.whole_shape)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every factor, trained or frozen."""
        return {name: (*self.stack, *shape) for name, shape in self.method.shapes(*self.shape).items()}

    def pair_shapes(self, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of left and right of a low-rank update of W with so many columns."""
        return (*self.stack, self.out_features, columns), (*self.stack, columns, self.in_features)

    # ------------------------------------------------------------------ products

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` of the stored weight."""
        return linear(x, weight, bias, self.unpack)

    def tapped_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, tap: Tap
    ) -> Tensor:
        """The same, whose backward pass shows (dL/dy, x) to `tap`."""
        return tapped_linear(x, weight, bias, anchor, tap, self.unpack)

    def along(self, u: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """`u Fᵀ` of a factor."""
        return linear(u, factor, bias)

    def spread(self, values: Tensor) -> Tensor:
        """What every row of the output has of one number for each of its elements (out,): the same."""
        return values

    # ------------------------------------------------------------------ the weight

    def whole_weight(self, stored: Tensor | None = None) -> Tensor:
        """W (out, in) in float32, with all that was put beside it; must not be changed. stored: the whole
        `weight`, where the layer's own is partitioned (ZeRO-3, outside the module's own passes).
        """
        stored = self.weight.detach() if stored is None else stored
        if self.packing is not None:
            weight = self.packing.unpack(stored, torch.float32)
        elif self.transposed:
            weight = stored.float().view(self.in_features, self.out_features).T
        else:
            weight = stored.float().view(self.shape)
        beside = self._beside
        return weight if beside is None else add_pair(weight, beside)

    @torch.no_grad()
    def overwrite(self, weight: Tensor) -> None:
        """Stores another W, in the shape that `whole_weight` answers; of a weight that is whole here and not
        packed.
        """
        self.weight.data.copy_(weight.mT if self.transposed else weight)
        self.changed()

    def add_to_part(
        self,
        part: Tensor,
        start: int,
        update: LowRank,
        rounding: Rounding,
        key: int,
        device: torch.device,
    ) -> float:
        """`W ← round(W + left @ right)` on a part of the stored weight: see `add_low_rank`."""
        return add_low_rank(part, start, self.as_stored(update), rounding, key, device)

    def packed(self, weight: Tensor) -> tuple[Tensor, float]:
        """A weight (out, in), float32, as it is stored, and the squared error of that. The scales of the
        packing become those of this weight.
        """
        stored = self.packing.pack(weight)
        return stored, squared_norm(weight - self.packing.unpack(stored, torch.float32))

    @property
    def beside(self) -> LowRank | None:
        """All that was put beside W so far, left (out, k) and right (k, in)."""
        return self._beside

    def put_beside(self, update: LowRank) -> float:
        """Adds left @ right to W without changing what is stored. Returns the squared error of the pair's
        cast.

        The pair is no parameter: every rank holds it whole.
        """
        left, right = (side.detach().to(self.weight.dtype, copy=True) for side in (update.left, update.right))
        error = LowRank(
            torch.cat([update.left.float(), -left.float()], -1),
            torch.cat([update.right.float(), right.float()], -2),
        )
        if self._beside is not None:
            left, right = torch.cat([self._beside.left, left], -1), torch.cat([self._beside.right, right], -2)
        self._beside = LowRank(left, right)
        self.changed()
        return pair_norm(error) ** 2

    def factors(self) -> Factors:
        """The factors as the forward pass uses them. Under ZeRO-3 they are whole only inside the module's own
        passes.
        """
        return {name: getattr(self, name) for name in self._factor_names}

    def dense_weight(self) -> Tensor:
        """W (out, in), in float32 where it has to be unpacked or summed. Under ZeRO-3 it is whole only inside
        the module's own passes.
        """
        if self.packing is not None or self._beside is not None:
            return self.whole_weight()
        return self.weight.mT if self.transposed else self.weight

    @property
    def unpack(self) -> Callable[[Tensor], Tensor] | None:
        """Makes W of what is stored, in the dtype of products with it; None where W itself is stored."""
        if self.packing is not None:
            return self.packing.unpack
        return torch.t if self.transposed else None

    # ------------------------------------------------------------------ what changes only now and then

    def changed(self) -> None:
        """W or a factor has another value now, or is going to have one at the next forward pass."""
        self._prepared = None

    def prepared(self, factors: Factors) -> Factors:
        """What a method with a magnitude prepares from W and the factors: asked at the first forward pass
        after a change, and kept for the others.
        """
        if self._prepared is None:
            with torch.no_grad():
                self._prepared = self.method.prepare(self.dense_weight(), factors)
        return self._prepared

    # ------------------------------------------------------------------ the pass that the layer is in

    def tap(self, anchor: Tensor | None, tap: Tap | None, adapted: bool = False) -> None:
        """Shows `(dL/dy, x)` of every backward pass to `tap`, until called with None, None.

        adapted: whether the adapter is part of the pass. It collects no gradient either way.
        """
        if tap is None:
            self.present_pass = Adapted()
        else:
            self.present_pass = TappedAdapted(anchor, tap) if adapted else Tapped(anchor, tap)

    def try_scale(self, factor: str | None, scale: float = 1.0) -> None:
        """Multiplies one factor by `scale` in forward passes, until called with None. Nothing is written."""
        self.present_pass = Adapted() if factor is None else Tried(factor, scale)
        self.changed()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, the layer is what it was before it was adapted, whatever its factors are."""
        before, self.present_pass = self.present_pass, Bare()
        try:
            yield
        finally:
            self.present_pass = before

    # ------------------------------------------------------------------ gradients

    def map_gradients(self, maps: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Replaces the gradient g of factor `name` by `P g Q` as it appears, for `maps[name] = (P, Q)`.
        Earlier maps are forgotten. The product is computed in float32, whatever the gradient's dtype.
        """
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = [
            getattr(self, name).register_hook(_sandwich(p, q)) for name, (p, q) in maps.items()
        ]

    def transform_gradients(self, gradients: Factors, factors: Factors) -> Factors:
        """Of a method that transforms gradients: see `TransformsGradients.transform_gradients`."""
        return self.method.transform_gradients(gradients, factors)

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, "
            f"method={self.method.name}, rank={self.method.rank}"
        )


def _sandwich(p: Tensor, q: Tensor):
    return lambda gradient: (p @ gradient.float() @ q).to(gradient.dtype)
