"""DoRA: direction and magnitude of the weight's rows apart, `m ⊙ (W + s·B·A)/‖W + s·B·A‖_row` (Liu et al.,
arXiv 2402.09353).
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from distlora.maths.linalg import one_for_zero, row_norms
from distlora.maths.low_rank import LowRank
from distlora.methods.contract import Factors, HoldsPretrained, Init, LayerInit
from distlora.methods.lora import LoRA

#: What the row of B of a zero row gets in an export, once. Any number will do that float16 holds times A: its
#: magnitude is zero.
NOT_ZERO = 2.0**-10


class DoRA(HoldsPretrained, LoRA):
    name: Literal["dora"] = "dora"

    summary: ClassVar[str] = "LoRA on the directions of W's rows; their norms m are trained beside it"
    source: ClassVar[str] = "arXiv 2402.09353"
    export_kind: ClassVar[str] = "DoRA"
    under_decay: ClassVar[str] = "shrinks the rows of the pretrained weight"
    trains: ClassVar[tuple[str, ...]] = ("A", "B", "m")
    magnitude: ClassVar[str | None] = "m"
    prepares: ClassVar[bool] = True

    def problem_with_base(self, kind: Literal["nf4", "int8"], partitioned: bool) -> str | None:
        if kind == "int8":
            return f"method {self.name} sets norms of rows beside the rows' own scales of int8, which is not supported; use nf4"
        return super().problem_with_base(kind, partitioned)

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "weight"

    def initialise(self, layer: LayerInit) -> Init:
        """A and B as LoRA; m = ‖W‖_row."""
        factors = super().initialise(layer).factors
        return Init(factors | {"m": row_norms(layer.source.to(layer.device)).cpu()})

    def prepare(self, weight: Tensor, factors: Factors) -> Factors:
        """norm: ‖W + s·B·A‖_row (out,), 1 for a zero row.

        Rounded to m's dtype before anything is divided by it: at the start m/norm is then exactly 1.
        """
        pair = self.delta(
            {
                name: factors[name].to(torch.promote_types(factors[name].dtype, torch.float32))
                for name in self.path
            }
        )
        return {"norm": one_for_zero(row_norms(weight, pair.left, pair.right).to(factors["m"].dtype))}

    def row_scale(self, factors: Factors, prepared: Factors) -> Tensor | None:
        """m/norm, in which the norm is a constant to the gradient (Section 4.3)."""
        return factors["m"] / prepared["norm"]

    def export_low_rank(self, factors: Factors) -> LowRank:
        """As LoRA, with one entry in the row of B of every row that is zero and stays so, since others divide
        by its norm.
        """
        pair = super().export_low_rank(factors)
        silent = (factors["m"] == 0) & ~pair.left.any(1)
        # Times the largest row of A, so that the product is not zero either.
        column = torch.arange(self.rank, device=pair.left.device) == pair.right.norm(dim=1).argmax()
        return LowRank(torch.where(silent[:, None] & column, NOT_ZERO, pair.left), pair.right)
