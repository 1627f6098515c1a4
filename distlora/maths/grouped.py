"""The linear maps of a stack of experts, each on its own rows of the input.

The rows x (S, in) are sorted by expert: the first counts[0] of them are of expert 0, and so on. The stack of
matrices is W (E, out, in), or (E, in, out) where it is stored transposed. An expert without rows costs
nothing, and its gradient is zero.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: Is shown (dL/dy, x, counts) in the backward pass: (S, out), (S, in) and the rows of each expert.
GroupedTap = Callable[[Tensor, Tensor, Sequence[int]], None]


class _GroupedLinear(torch.autograd.Function):
    """As `distlora.maths.functional.linear`: the input is saved only if the weight is trained, and the weight
    is held by reference, because under ZeRO-3 its storage comes and goes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int], transposed: bool
    ) -> Tensor:
        ctx.weight, ctx.counts, ctx.transposed = weight, counts, transposed
        ctx.save_for_backward(x if weight.requires_grad else None)
        return _products(x, weight, bias, counts, transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,), counts = ctx.saved_tensors, ctx.counts
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = _products(dy, ctx.weight, None, counts, not ctx.transposed) if needs_x else None
        dw = _outer_products(dy, x, ctx.weight, counts, ctx.transposed) if needs_weight else None
        db = torch.stack([rows.sum(0) for rows in dy.split(list(counts))]) if needs_bias else None
        return dx, dw, db, None, None


class _TappedGroupedLinear(torch.autograd.Function):
    """The same with a frozen weight, whose backward pass hands `(dL/dy, x, counts)` to a tap."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        counts: Sequence[int],
        transposed: bool,
        anchor: Tensor,
        tap: GroupedTap,
    ) -> Tensor:
        ctx.weight, ctx.counts, ctx.transposed, ctx.tap = weight, counts, transposed, tap
        ctx.save_for_backward(x)
        return _products(x, weight, bias, counts, transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.tap(dy, x, ctx.counts)
        needs_x = ctx.needs_input_grad[0]
        dx = _products(dy, ctx.weight, None, ctx.counts, not ctx.transposed) if needs_x else None
        return dx, None, None, None, None, None, None


class _SpreadRows(torch.autograd.Function):
    """A gather whose backward pass adds in one order, which an index_add does not do on every device."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return torch.cat([own.expand(count, -1) for own, count in zip(values, counts)])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return torch.stack([rows.sum(0) for rows in dy.split(list(ctx.counts))]), None


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and where these lie."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int], transposed: bool
) -> Tensor:
    """`x_e W_eᵀ + b_e` of all experts, (S, out)."""
    y = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1], dtype=weight.dtype)
    x = x.to(weight.dtype)
    for expert, rows in _slices(counts):
        matrix = weight[expert] if transposed else weight[expert].T
        if bias is None:
            torch.mm(x[rows], matrix, out=y[rows])
        else:
            torch.addmm(bias[expert], x[rows], matrix, out=y[rows])
    return y


def _outer_products(dy: Tensor, x: Tensor, weight: Tensor, counts: Sequence[int], transposed: bool) -> Tensor:
    """`dL/dW` of all experts, in the shape of the stored stack."""
    dw = torch.zeros_like(weight)
    for expert, rows in _slices(counts):
        left, right = (x, dy) if transposed else (dy, x)
        torch.mm(left[rows].T.to(dw.dtype), right[rows].to(dw.dtype), out=dw[expert])
    return dw


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int], transposed: bool = False
) -> Tensor:
    """`x_e W_eᵀ + b_e` for every expert e: (S, out), in the dtype of the weight.

    x: (S, in), sorted by expert. weight: (E, out, in), or (E, in, out) where transposed. bias: (E, out) or
    None. counts: the rows of each expert, E numbers whose sum is S.
    """
    result: Tensor = _GroupedLinear.apply(x, weight, bias, counts, transposed)
    return result


def tapped_grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    transposed: bool,
    anchor: Tensor,
    tap: GroupedTap,
) -> Tensor:
    """`grouped_linear` with a frozen weight that calls `tap(dy, x, counts)` in its backward pass, whether or
    not an expert has rows. anchor: see `distlora.maths.functional.tapped_linear`.
    """
    result: Tensor = _TappedGroupedLinear.apply(x, weight, bias, counts, transposed, anchor, tap)
    return result


def spread_rows(values: Tensor, counts: Sequence[int]) -> Tensor:
    """What every row of the input has of its expert: (E, n) to (S, n). counts: the rows of each expert."""
    result: Tensor = _SpreadRows.apply(values, counts)
    return result
