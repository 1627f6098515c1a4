"""rsLoRA: LoRA, scaled by alpha / sqrt(rank); alpha is 16 unless set (arXiv 2312.03732).

Kalajdzievski: with this scaling the size of the learned update does not depend on the rank.
"""

import math
from typing import ClassVar, Literal

from distlora.methods.capabilities import StartsFromAdapter
from distlora.methods.lora import TrainsBoth

#: alpha where the recipe names none. It is not the rank, as elsewhere, because the paper's point is an alpha
#: that does not grow with the rank.
DEFAULT_ALPHA = 16.0


class ScaledByRoot(TrainsBoth):
    """The scaling of rsLoRA."""

    @property
    def scaling(self) -> float:
        """s = α/√r."""
        return (DEFAULT_ALPHA if self.alpha is None else self.alpha) / math.sqrt(self.rank)


class RSLoRA(StartsFromAdapter, ScaledByRoot):
    name: Literal["rslora"] = "rslora"

    peft_form: ClassVar[tuple[bool, bool]] = True, False
