"""Sums of gradients over micro-batches, in float32 whatever the dtype of the weights."""

from collections.abc import Iterable

import torch
from torch import nn


def sum_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Lets autograd add up the gradients of parameters in a lower precision as float32 tensors.

    A sum of many bfloat16 gradients in bfloat16 loses what is smaller than 1/256 of it: up to two decimal
    places of a step. `parameter.grad` is float32 from here on.
    """
    for parameter in parameters:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.grad_dtype = torch.float32


def fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros of the right dtype for those that have no gradient, such as of experts that no row chose: others
    that make them would take the dtype of the weights.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
