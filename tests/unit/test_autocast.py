"""Under autocast a linear map and its gradients are as torch's own."""

import pytest
import torch
from torch.nn.functional import linear as torch_linear

from distlora.maths.functional import linear, rows_rescaled, tapped_linear


def _tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        result = function(*tensors)
    return list(torch.autograd.grad(result.float().square().sum(), tensors))


@pytest.mark.parametrize("stored", ["as it is", "transposed"])
def test_gradients_are_those_of_torch(stored):
    x, weight, bias = _tensors((3, 5, 7), (11, 7), (11,))
    wanted = _gradients(torch_linear, [x, weight, bias])

    def ours(x, weight, bias):
        if stored == "transposed":
            return linear(x, weight.detach().T.contiguous(), bias, torch.t)
        return linear(x, weight, bias)

    tensors = [x, bias] if stored == "transposed" else [x, weight, bias]
    found = _gradients(
        lambda *given: ours(given[0], weight if len(given) == 2 else given[1], given[-1]), tensors
    )
    expected = [wanted[0], wanted[2]] if stored == "transposed" else wanted
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.3)


def test_a_tap_sees_the_gradient_of_the_output():
    x, weight, anchor = _tensors((4, 7), (11, 7), ())
    seen = []

    def tapped(x: torch.Tensor) -> torch.Tensor:
        return tapped_linear(x, weight, None, anchor, lambda *shown: seen.append(shown))

    _gradients(tapped, [x])
    ((dy, given),) = seen
    assert dy.shape == (4, 11) and given.shape == (4, 7)


def test_rescaled_rows():
    tensors = _tensors((4, 11), (4, 11), (11,))
    found = _gradients(lambda base, update, scale: rows_rescaled(base.bfloat16(), update, scale), tensors)
    assert [gradient.dtype for gradient in found] == [torch.float32] * 3
