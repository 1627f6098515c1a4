"""Parameters, MACs and FLOPs of a forward pass, counted by torch on a model without weights: nothing is
computed.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distlora.errors import UserError
from distlora.models.targets import Batch
from distlora.sentences import first_line


@dataclass(frozen=True)
class PassCost:
    """Of one forward pass over one sample. flops: two for each multiplication and addition of a matrix
    product; sums, norms and activations are not counted.
    """

    parameters: int
    flops: int

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations."""
        return self.flops // 2


@torch.no_grad()
def pass_cost(model: nn.Module, inputs: Batch) -> PassCost:
    """Of a transformers model on the meta device, over the inputs of one sample, there too. Raises UserError
    for a model whose course depends on values, which meta tensors have not.
    """
    try:
        model(**inputs)  # what a layer prepares once and keeps is no part of a pass
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    except RuntimeError as error:  # NotImplementedError is one
        name = type(model).__name__
        raise UserError(f"{name} cannot be run without its weights ({first_line(error)})") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return PassCost(parameters, counter.get_total_flops())
