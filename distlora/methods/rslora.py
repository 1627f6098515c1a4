"""rsLoRA: LoRA with a scaling that keeps the size of the learned update at every rank (Kalajdzievski, arXiv
2312.03732).
"""

import math
from typing import ClassVar, Literal

from distlora.methods.lora import LoRA

#: alpha where the recipe names none. Not the rank, as elsewhere: the paper's point is an alpha that does not
#: grow with it.
DEFAULT_ALPHA = 16.0


class RSLoRA(LoRA):
    name: Literal["rslora"] = "rslora"

    summary: ClassVar[str] = "LoRA, scaled by alpha / sqrt(rank); alpha is 16 unless set"
    source: ClassVar[str] = "arXiv 2312.03732"

    @property
    def scaling(self) -> float:
        """s = α/√r."""
        return (DEFAULT_ALPHA if self.alpha is None else self.alpha) / math.sqrt(self.rank)
