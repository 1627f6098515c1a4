"""LoRA as published: arXiv 2106.09685, and PEFT's result for the same factors."""

import pytest
import torch

from distlora.adapter.layer import AdapterLinear
from distlora.methods import Init, LayerInit
from distlora.methods.lora import LoRA

OUT, IN, RANK = 60, 131, 8


def _init(rank=RANK, seed=0, shape=(OUT, IN)) -> Init:
    return LoRA(rank=rank).initialise(LayerInit(shape, None, torch.Generator().manual_seed(seed)))


def test_b_starts_at_zero_and_a_uniform_within_one_over_sqrt_in():
    factors = _init(rank=32, shape=(64, 1000)).factors
    bound = 1000**-0.5
    assert not factors["B"].any()
    assert factors["A"].abs().max() <= bound
    assert factors["A"].abs().max() > 0.99 * bound
    assert factors["A"].std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(factors["A"].mean()) < 0.02 * bound


def test_a_is_that_of_torch_kaiming_uniform_with_a_sqrt_5():
    """nn.Linear's own initialisation is Kaiming uniform with a = √5: same bound, so the same draw scaled
    alike.
    """
    torch_bound = torch.nn.init.calculate_gain("leaky_relu", 5**0.5) * (3 / IN) ** 0.5
    drawn = torch.rand(RANK, IN, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(_init().factors["A"], drawn * torch_bound)


def test_the_generator_decides():
    assert torch.equal(_init(seed=1).factors["A"], _init(seed=1).factors["A"])
    assert not torch.equal(_init(seed=1).factors["A"], _init(seed=2).factors["A"])


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (16, 2.0), (4, 0.5)])
def test_scaling_is_alpha_over_rank(alpha, scaling):
    assert LoRA(rank=8, alpha=alpha).scaling == scaling


@pytest.mark.parametrize("alpha", [None, 20.0])
def test_gradients_are_those_of_the_chain_rule(alpha):
    """dL/dA = s·Bᵀ g and dL/dB = s·g Aᵀ, with g the gradient of the merged weight."""
    method = LoRA(rank=RANK, alpha=alpha)
    layer = AdapterLinear(torch.nn.Linear(IN, OUT), method, "layer")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.copy_(torch.randn(factor.shape, generator=generator))
    x, target = torch.randn(9, IN, generator=generator), torch.randn(9, OUT, generator=generator)
    (layer(x) - target).square().sum().backward()

    merged = (layer.weight + method.scaling * layer.B @ layer.A).detach().requires_grad_()
    (torch.nn.functional.linear(x, merged, layer.bias) - target).square().sum().backward()
    torch.testing.assert_close(
        layer.A.grad, method.scaling * layer.B.detach().T @ merged.grad, rtol=1e-3, atol=1e-2
    )
    torch.testing.assert_close(
        layer.B.grad, method.scaling * merged.grad @ layer.A.detach().T, rtol=1e-3, atol=1e-2
    )


def test_output_and_gradients_equal_pefts():
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(4)
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    method = LoRA(rank=RANK, alpha=12.0)
    mine = AdapterLinear(torch.nn.Linear(IN, OUT), method, "0")
    with torch.no_grad():
        mine.A.copy_(torch.randn(mine.A.shape, generator=generator))
        mine.B.copy_(torch.randn(mine.B.shape, generator=generator))
        mine.weight.copy_(net[0].weight)
        mine.bias.copy_(net[0].bias)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=["0"]))
    pair = theirs.base_model.model[0]
    with torch.no_grad():
        pair.lora_A.default.weight.copy_(mine.A)
        pair.lora_B.default.weight.copy_(mine.B)
    x = torch.randn(2, 9, IN, generator=generator)
    y, expected = mine(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.A.grad, pair.lora_A.default.weight.grad, rtol=1e-3, atol=1e-1)
    torch.testing.assert_close(mine.B.grad, pair.lora_B.default.weight.grad, rtol=1e-3, atol=1e-1)
