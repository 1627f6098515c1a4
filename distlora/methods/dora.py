"""DoRA: LoRA on the directions of W's rows; their norms m are trained beside it (arXiv 2402.09353).

Liu et al.: the adapted weight is `m ⊙ (W + s·B·A)/‖W + s·B·A‖_row`.
"""

from typing import ClassVar, Literal

import torch

from distlora.maths.linalg import row_norms
from distlora.maths.low_rank import LowRank
from distlora.methods.capabilities import HasMagnitude
from distlora.methods.contract import Factors, Init, LayerInit
from distlora.methods.lora import LoRA

#: What the row of B of a zero row gets in an export, in one element. Any number serves whose product with A
#: float16 can hold: the magnitude of such a row is zero.
NOT_ZERO = 2.0**-10


class DoRA(HasMagnitude, LoRA):
    name: Literal["dora"] = "dora"

    peft_form: ClassVar[tuple[bool, bool]] = False, True
    trains: ClassVar[tuple[str, ...]] = ("A", "B", "m")

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "weight"

    def initialise(self, layer: LayerInit) -> Init:
        """A and B as LoRA; m = ‖W‖_row."""
        factors = super().initialise(layer).factors
        return Init(factors | {"m": row_norms(layer.source.to(layer.device)).cpu()})

    def export_low_rank(self, factors: Factors) -> LowRank:
        """As LoRA, with one element in the row of B of every row that is zero and stays so, because other
        software divides by the norm of the sum.
        """
        pair = super().export_low_rank(factors)
        silent = (factors["m"] == 0) & ~pair.left.any(-1)
        # Times the largest row of A, so that the product is not zero either.
        largest = pair.right.norm(dim=-1).argmax(-1)[..., None, None]
        column = torch.arange(self.rank, device=pair.left.device) == largest
        return LowRank(torch.where(silent.unsqueeze(-1) & column, NOT_ZERO, pair.left), pair.right)
