"""Methods that train the norm of every row of the adapted weight: `m ⊙ (W + s·B·A)/‖W + s·B·A‖_row`."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from distlora.maths.functional import linear, rows_rescaled
from distlora.maths.linalg import one_for_zero, row_norms
from distlora.methods.capabilities.from_weight import HoldsPretrained
from distlora.methods.contract import Factors, Linear, Shapes


class HasMagnitude(HoldsPretrained):
    """A trained factor (out,), beside the path, is the norm of every row of the adapted weight.

    It begins as the norms of the pretrained weight, which must be whole for the norms: `prepare` takes them.
    Of a stack of weights `prepare` and `row_scale` take tensors with E before their shapes.
    """

    #: The name of that factor.
    magnitude: ClassVar[str] = "m"

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return super().shapes(out_features, in_features) | {self.magnitude: (out_features,)}

    def prepare(self, weight: Tensor, factors: Factors) -> Factors:
        """What the forward pass needs of the whole of W and of the factors: "norm", ‖W + s·B·A‖_row (out,), 1
        for a zero row.

        Called without gradients, once after every change (an optimizer step, a write, an addition to W), in
        the layer's own forward pass, where W is whole. The answer is kept until the next change:
        micro-batches, evaluations and recomputations use it. The norm is rounded to the dtype of the
        magnitude before anything is divided by it, so that m/norm is exactly 1 at the start.
        """
        exact = {
            name: factors[name].to(torch.promote_types(factors[name].dtype, torch.float32))
            for name in self.path
        }
        pair = self.delta(exact)
        norms = row_norms(weight, pair.left, pair.right)
        return {"norm": one_for_zero(norms.to(factors[self.magnitude].dtype))}

    def row_scale(self, factors: Factors, prepared: Factors) -> Tensor:
        """c = m/norm (out,), by which the rows of `W + s·B·A` are multiplied. The norm is a constant to the
        gradient (DoRA, Section 4.3). prepared: what `prepare` answered.
        """
        return factors[self.magnitude] / prepared["norm"]

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: Factors,
        training: bool,
        base: Linear = linear,
        along: Linear = linear,
        prepared: Factors | None = None,
        spread: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Tensor:
        """`(x Wᵀ + s·(…(x Aᵀ)…)Bᵀ) ⊙ c + b`. prepared: what `prepare` answered for this weight and these
        factors; None to ask it here. spread: of a stack, makes (S, out) of c or b (E, out), for the S rows
        of x.

        Where dropout acts, it drops the input of everything that differs from the pretrained layer: with the
        dropped input x̃ it is `x Wᵀ + b + (x̃ Wᵀ) ⊙ (c − 1) + s·(…(x̃ Aᵀ)…)Bᵀ ⊙ c`. So do the reference code
        of the paper and PEFT.
        """
        if prepared is None:
            with torch.no_grad():
                prepared = self.prepare(weight, factors)
        scale = spread(self.row_scale(factors, prepared))
        if training and self.dropout:
            u = self._dropped(x, training)
            change = rows_rescaled(base(u, weight, None), self._along_path(u, factors, along), scale)
            return base(x, weight, bias) + change
        y = base(x, weight, None) + self._update(x, factors, training, along)
        return y * scale if bias is None else torch.addcmul(spread(bias), y, scale)
