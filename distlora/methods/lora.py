"""LoRA: train A and B; B starts at zero (arXiv 2106.09685).

Hu et al.: the adapted weight is `W + (α/r)·B·A`.
"""

import math
from typing import ClassVar, Literal

import torch

from distlora.methods.capabilities import StartsFromAdapter
from distlora.methods.contract import Init, LayerInit, Method


class TrainsBoth(Method):
    """A and B are trained. B starts at zero."""

    zero_gradient_at_start: ClassVar[tuple[str, ...]] = ("A",)  # dL/dA = s·Bᵀ g, and B = 0

    def initialise(self, layer: LayerInit) -> Init:
        out_features, in_features = layer.shape
        # Kaiming uniform with a = √5, as the reference code: the bound is 1/√in.
        bound = 1 / math.sqrt(in_features)
        a = (torch.rand(self.rank, in_features, generator=layer.generator) * 2 - 1) * bound
        return Init({"A": a, "B": torch.zeros(out_features, self.rank)})


class LoRA(StartsFromAdapter, TrainsBoth):
    name: Literal["lora"] = "lora"

    peft_form: ClassVar[tuple[bool, bool]] = False, False
