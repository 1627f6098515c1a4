"""The one linear map that every layer is made of."""

import torch
from torch import Tensor


class _Linear(torch.autograd.Function):
    """`y = x Wᵀ + b`, saving only what its own backward needs.

    `torch.nn.functional.linear` under `deepspeed.zero.Init` keeps the input alive even where the weight is frozen. Here the
    input is saved only if the weight is trained. The weight itself is held by reference and not through
    `save_for_backward`: under ZeRO-3 its storage comes and goes, and a saved alias would keep the gathered copy alive.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x if weight.requires_grad else None)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dy @ ctx.weight if needs_x else None
        rows = _rows(dy)
        dw = rows.T @ _rows(x) if needs_weight else None
        db = rows.sum(0) if needs_bias else None
        return dx, dw, db


class _TappedLinear(torch.autograd.Function):
    """`y = x Wᵀ + b` whose backward shows `(dL/dy, x)` to a tap: all that the weight's gradient `dyᵀ x` is made of."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, tap) -> Tensor:
        ctx.weight, ctx.tap = weight, tap
        ctx.save_for_backward(x)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        ctx.tap(_rows(dy), _rows(x))
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """(…, n) as (tokens, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b`. x: (…, in), weight: (out, in), bias: (out,) or None. Returns (…, out)."""
    return _Linear.apply(x, weight, bias)


def tapped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, tap) -> Tensor:
    """`linear` that calls `tap(dy, x)` in its backward, with dy: (tokens, out) and x: (tokens, in).

    anchor: any tensor that requires a gradient. It makes the output require one even where neither x nor the weight does
    (the first block over frozen embeddings), so that `backward(inputs=[anchor])` reaches every tapped layer and no parameter.
    """
    return _TappedLinear.apply(x, weight, bias, anchor, tap)
