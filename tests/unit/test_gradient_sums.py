"""Sums of micro-batches' gradients: in float32, whatever the dtype of the weights."""

import torch
from torch import nn

from distlora.engine.gradient_sums import fill_gradients, sum_in_float32
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from tests.distributed.cases import solo

MICRO_BATCHES = 64


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x, target):
        return ((x @ self.weight.t() - target).float() ** 2).sum()


def micro_batches():
    """Of very different size."""
    generator = torch.Generator().manual_seed(0)
    for number in range(MICRO_BATCHES):
        x, target = (torch.randn(4, width, generator=generator) for width in (7, 5))
        yield x.bfloat16(), (target * 10.0 ** (number * 7 % 13 / 3 - 2)).bfloat16()


def by_float64():
    total = torch.zeros(5, 7, dtype=torch.float64)
    for batch in micro_batches():
        model = Linear()
        model(*batch).backward()
        total += model.weight.grad.double()
    return total


def test_64_micro_batches_add_up_as_in_float64():
    model, engine = Linear(), LocalEngine(solo(), torch.bfloat16)
    engine.start(model, OptimizerSpec("sgd", lr=1.0))
    for batch in micro_batches():
        engine.backward(engine.run(lambda model, *given: model(*given), *batch))
    wanted = by_float64()
    assert float((model.weight.grad.double() - wanted).norm() / wanted.norm()) <= 1e-6
    before = engine.read_trained("weight")["master"].clone()
    info = engine.step()
    moved = before - engine.read_trained("weight")["master"]
    assert float((moved.double() - wanted).norm() / wanted.norm()) <= 1e-6
    assert abs(info.grad_norm - float(wanted.norm())) <= 1e-6 * float(wanted.norm())
    assert model.weight.dtype == torch.bfloat16 and model.weight.grad is None


def test_weights_in_float32_are_left_alone():
    parameter = nn.Parameter(torch.zeros(2))
    sum_in_float32([parameter])
    assert parameter.grad_dtype == torch.float32
    double = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    sum_in_float32([double])
    assert double.grad_dtype == torch.float64


def test_a_parameter_that_no_row_reached_gets_zeros_of_the_sums_dtype():
    model = Linear()
    sum_in_float32(model.parameters())
    model(*next(micro_batches())).backward()
    before = model.weight.grad.clone()
    fill_gradients(model.parameters())
    assert torch.equal(model.weight.grad, before)
    assert model.unused.grad.dtype == torch.float32 and not model.unused.grad.any()
