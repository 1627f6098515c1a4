"""The adapter layer: W, bias and all factors are direct parameters of one module.

One module, so that ZeRO-3 gathers exactly what the layer's own forward and backward use, and releases it
afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distlora.adapter.packed import Packing
from distlora.maths.functional import linear, tapped_linear
from distlora.maths.linalg import low_rank_norm, squared_norm
from distlora.maths.low_rank import LowRank
from distlora.methods import Factors, Method

Tap = Callable[[Tensor, Tensor], None]


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed: `weight` is flat, and only `packing` makes (out, in) of
    it.

    device: where the work of packing is done; what is packed stays where the weight was.
    """

    def __init__(self, linear: nn.Linear, packing: Packing, device: torch.device):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a whole weight
        self.in_features, self.out_features, self.bias, self.packing = (
            linear.in_features,
            linear.out_features,
            linear.bias,
            packing,
        )
        weight = linear.weight.detach()
        self.weight = nn.Parameter(packing.pack(weight.to(device)).to(weight.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packing.unpack)


class AdapterLinear(nn.Module):
    """A linear layer `y = x Wᵀ + b` with a method's factors beside W.

    weight: (out, in), frozen; where `packing` is not None it is what that makes W of, flat. bias: (out,) or
    None, frozen. Each factor is a parameter under its own name, zero until written. name: the layer's name in
    the bare model, such as `model.layers.0.self_attn.q_proj`.

    What a method prepares of W and the factors is kept until `changed` is called: whoever writes into one of
    them calls it.
    """

    def __init__(self, linear: nn.Linear, method: Method, name: str):
        super().__init__()
        self.name, self.method = name, method
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packing: Packing | None = getattr(linear, "packing", None)
        for factor, shape in method.shapes(self.out_features, self.in_features).items():
            empty = torch.zeros(shape, dtype=self.weight.dtype, device=self.weight.device)
            self.register_parameter(factor, nn.Parameter(empty, requires_grad=factor in method.trains))
        self._beside: LowRank | None = None
        self._tap: Tap | None = None
        self._anchor: Tensor | None = None
        self._tap_adapted = False
        self._trial: tuple[str, float] | None = None
        self._bare = False
        self._gradient_hooks: list = []
        self._version, self._prepared_at = 0, -1
        self._prepared: Factors = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in). `weight.shape` does not tell: under ZeRO-3 it is empty between passes."""
        return self.out_features, self.in_features

    def whole_weight(self, stored: Tensor | None = None) -> Tensor:
        """W (out, in) in float32, with all that was put beside it; not to be changed. stored: the whole
        `weight`, where the layer's own is cut up (ZeRO-3, outside the module's own passes)."""
        stored = self.weight.detach() if stored is None else stored
        weight = (
            stored.float().view(self.shape)
            if self.packing is None
            else self.packing.unpack(stored, torch.float32)
        )
        beside = self._beside
        return weight if beside is None else torch.addmm(weight, beside.left.float(), beside.right.float())

    def packed(self, weight: Tensor) -> tuple[Tensor, float]:
        """What is stored for a weight (out, in), float32, with scales of its own from now on; and the squared
        error of that.
        """
        stored = self.packing.pack(weight)
        return stored, squared_norm(weight - self.packing.unpack(stored, torch.float32))

    @property
    def beside(self) -> LowRank | None:
        """All that was put beside W so far, left (out, k) and right (k, in)."""
        return self._beside

    def put_beside(self, update: LowRank) -> float:
        """From now on W is W + left @ right, without a change of what is stored; returns the squared error of
        the update's cast.

        Not a parameter: every rank holds it whole.
        """
        left, right = (side.detach().to(self.weight.dtype, copy=True) for side in (update.left, update.right))
        error = low_rank_norm(
            torch.cat([update.left.float(), -left.float()], 1),
            torch.cat([update.right.float(), right.float()], 0),
        )
        if self._beside is not None:
            left, right = torch.cat([self._beside.left, left], 1), torch.cat([self._beside.right, right], 0)
        self._beside = LowRank(left, right)
        self.changed()
        return error**2

    def factors(self) -> Factors:
        """The factors as the forward pass uses them. Under ZeRO-3 they are whole only inside the module's own
        passes.
        """
        return {name: getattr(self, name) for name in self.method.factor_names}

    def dense_weight(self) -> Tensor:
        """W (out, in), in float32 where it has to be made. Under ZeRO-3 it is whole only inside the module's
        own passes.
        """
        return self.weight if self.packing is None and self._beside is None else self.whole_weight()

    def forward(self, x: Tensor) -> Tensor:
        if self._bare:
            return self._base(x, self.weight, self.bias)
        factors = self.factors()
        if self._tap is not None:
            return self._tapped(x, factors)
        if self._trial is not None:
            name, scale = self._trial
            factors[name] = factors[name] * scale
        return self.method.forward(
            x, self.weight, self.bias, factors, self.training, self._base, prepared=self._prepare(factors)
        )

    def _base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` of the frozen layer."""
        return self._with_beside(x, linear(x, weight, bias, self._unpack))

    def _with_beside(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self._beside is None else y + linear(linear(x, self._beside.right), self._beside.left)

    @property
    def _unpack(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.packing is None else self.packing.unpack

    def changed(self) -> None:
        """W or a factor has another value now, or is going to have one at the next forward pass."""
        self._version += 1

    def _prepare(self, factors: Factors) -> Factors:
        """What the method made of the present version of W and the factors: at its first forward pass, kept
        for all others.
        """
        if self.method.prepares and self._prepared_at != self._version:
            with torch.no_grad():
                self._prepared = self.method.prepare(self.dense_weight(), factors)
            self._prepared_at = self._version
        return self._prepared

    def _tapped(self, x: Tensor, factors: Factors) -> Tensor:
        def base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._with_beside(x, tapped_linear(x, weight, bias, self._anchor, self._tap, self._unpack))

        if not self._tap_adapted:
            return base(x, self.weight, self.bias)
        # Detached: the pass must leave no gradient on a trained factor.
        factors = {name: factor.detach() for name, factor in factors.items()}
        return self.method.forward(x, self.weight, self.bias, factors, False, base, self._prepare(factors))

    def tap(self, anchor: Tensor | None, tap: Tap | None, adapted: bool = False) -> None:
        """Show `(dL/dy, x)` of every backward pass to `tap`, until called with None, None.

        adapted: with the adapter in the pass, else without it. The adapter collects no gradient either way.
        """
        self._anchor, self._tap, self._tap_adapted = anchor, tap, adapted

    def try_scale(self, factor: str | None, scale: float = 1.0) -> None:
        """Multiply one factor by `scale` in the forward pass, without writing it, until called with None."""
        self._trial = None if factor is None else (factor, scale)
        self.changed()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, the layer is what it was before anything was attached, whatever its factors are."""
        self._bare = True
        try:
            yield
        finally:
            self._bare = False

    def map_gradients(self, maps: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Replace the gradient g of factor `name` by `P g Q` as it appears, for `maps[name] = (P, Q)`;
        forgets earlier maps.

        P and Q are multiplied in float32, whatever the gradient's dtype.
        """
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = [
            getattr(self, name).register_hook(_sandwich(p, q)) for name, (p, q) in maps.items()
        ]

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, method={self.method.name}, rank={self.method.rank}"


def _sandwich(p: Tensor, q: Tensor):
    return lambda gradient: (p @ gradient.float() @ q).to(gradient.dtype)
