"""The linear map that every layer is made of, and the sum of two of them with rescaled rows.

The weight W (out, in) may be stored in packed form. Then `unpack` makes W of it, in the dtype of the product.
The backward pass makes W again, because to keep it until then would take the memory that packing saves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Unpack = Callable[[Tensor], Tensor]
#: Takes dL/dy and x.
Tap = Callable[[Tensor, Tensor], None]


class _Linear(torch.autograd.Function):
    """`y = x Wᵀ + b`, which saves only what its own backward pass needs.

    `torch.nn.functional.linear` under `deepspeed.zero.Init` keeps the input in memory even if the weight is
    frozen. Here the input is saved only if the weight is trained. The weight is held by reference, and not by
    `save_for_backward`: under ZeRO-3 its storage comes and goes, and a saved alias would keep the gathered
    copy in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, unpack: Unpack | None) -> Tensor:
        ctx.weight, ctx.unpack = weight, unpack
        ctx.save_for_backward(x if weight.requires_grad else None)
        return _product(x, weight, bias, unpack)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = _back(dy, ctx.weight, ctx.unpack) if needs_x else None
        rows = _rows(dy)
        dw = rows.T @ _rows(x).to(dy.dtype) if needs_weight else None
        db = rows.sum(0) if needs_bias else None
        return dx, dw, db, None


class _TappedLinear(torch.autograd.Function):
    """`y = x Wᵀ + b`, whose backward pass hands `(dL/dy, x)` to a tap: the weight's gradient is `dyᵀ x`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        tap: Tap,
        unpack: Unpack | None,
    ) -> Tensor:
        ctx.weight, ctx.tap, ctx.unpack = weight, tap, unpack
        ctx.save_for_backward(x)
        return _product(x, weight, bias, unpack)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.tap(_rows(dy), _rows(x))
        dx = _back(dy, ctx.weight, ctx.unpack) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None


class _RowsRescaled(torch.autograd.Function):
    """`base ⊙ (c − 1) + update ⊙ c`, which saves one wide tensor, `base + update`, instead of both."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, update: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(base + update, scale)
        return torch.addcmul(base * (scale - 1), update, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        total, scale = ctx.saved_tensors
        needs_base, needs_update, needs_scale = ctx.needs_input_grad
        dc = dy * total if needs_scale else None
        return (
            dy * (scale - 1) if needs_base else None,
            dy * scale if needs_update else None,
            _rows(dc).sum(0) if needs_scale and scale.dim() == 1 else dc,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, unpack: Unpack | None) -> Tensor:
    """`x Wᵀ + b`, computed in the dtype of W and returned in that of x."""
    if unpack is None:
        return torch.nn.functional.linear(x, weight, bias)
    matrix = unpack(weight)
    return torch.nn.functional.linear(
        x.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype)
    ).to(x.dtype)


def _back(dy: Tensor, weight: Tensor, unpack: Unpack | None) -> Tensor:
    """`dL/dx = dy W`, computed in the dtype of W and returned in that of dy. Under autocast, where y has
    another dtype than W, in that of dy.
    """
    if unpack is None:
        return dy @ weight.to(dy.dtype)
    matrix = unpack(weight)
    return (dy.to(matrix.dtype) @ matrix).to(dy.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """(…, n) as (tokens, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, unpack: Unpack | None = None) -> Tensor:
    """`x Wᵀ + b`, (…, out). x: (…, in). weight: (out, in), or its packed form with `unpack`. bias: (out,)."""
    result: Tensor = _Linear.apply(x, weight, bias, unpack)
    return result


def tapped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, tap: Tap, unpack: Unpack | None = None
) -> Tensor:
    """`linear` that calls `tap(dy, x)` in its backward pass, with dy: (tokens, out) and x: (tokens, in).

    anchor: any tensor that requires a gradient. It makes the output require one even if neither x nor the
    weight does, as in the first block over frozen embeddings. So `backward(inputs=[anchor])` reaches every
    tapped layer, and no parameter.
    """
    result: Tensor = _TappedLinear.apply(x, weight, bias, anchor, tap, unpack)
    return result


def rows_rescaled(base: Tensor, update: Tensor, scale: Tensor) -> Tensor:
    """`base ⊙ (c − 1) + update ⊙ c`: what is added to the output `base` of a linear layer when `update` is
    added to it and the rows of the sum are multiplied by c. base, update: (…, out). scale: c (out,), or one
    for every row of the output, (…, out).
    """
    result: Tensor = _RowsRescaled.apply(base, update, scale)
    return result
