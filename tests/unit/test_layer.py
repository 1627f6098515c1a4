"""The adapter layer: one module that owns W, bias and factors, and what can be switched on it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from distlora.adapter.layer import AdapterLinear
from distlora.adapter.passes import Adapted, Bare, Tried
from distlora.methods.dora import DoRA
from distlora.methods.lora import LoRA
from distlora.methods.lora_sb import LoRASB

OUT, IN, RANK = 60, 131, 4


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _layer(method=None, bias=True, dtype=torch.float64, seed=0):
    """A layer with random factors, none of them zero."""
    generator = _generator(seed)
    layer = AdapterLinear(
        torch.nn.Linear(IN, OUT, bias=bias, dtype=dtype), method or LoRASB(rank=RANK, alpha=6.0), "block.proj"
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                / max(parameter.shape) ** 0.5
            )
            parameter.requires_grad_(name in layer.method.trains)
    return layer


def _input(dtype=torch.float64, seed=5):
    return torch.randn(2, 9, IN, generator=_generator(seed), dtype=torch.float64).to(dtype)


def _core_gradient(layer):
    layer.R.grad = None
    layer(_input(layer.weight.dtype)).square().sum().backward()
    return layer.R.grad.clone()


# ---------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_takes_over_the_very_parameters(bias):
    linear = torch.nn.Linear(IN, OUT, bias=bias)
    layer = AdapterLinear(linear, LoRASB(rank=RANK), "a.b")
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert set(layer.state_dict()) == {"weight", "A", "R", "B"} | ({"bias"} if bias else set())
    assert (layer.shape, layer.name) == ((OUT, IN), "a.b")
    assert list(layer.children()) == []  # direct parameters of one module: one gather under ZeRO-3
    assert layer.factors().keys() == {"A", "R", "B"} and layer.factors()["R"] is layer.R


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_zero_until_written_and_have_the_weights_dtype(dtype):
    layer = AdapterLinear(torch.nn.Linear(IN, OUT, dtype=dtype), LoRA(rank=RANK), "a")
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.A.any() and not layer.B.any()
    assert (tuple(layer.A.shape), tuple(layer.B.shape)) == ((RANK, IN), (OUT, RANK))
    x = _input(dtype)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_shape_does_not_come_from_the_weight():
    """Under ZeRO-3 the weight is empty between passes."""
    layer = _layer()
    layer.weight.data = torch.empty(0)
    assert layer.shape == (OUT, IN)


def test_what_is_shown_of_it():
    assert "lora_sb" in repr(_layer()) and "in=131" in repr(_layer()) and "out=60" in repr(_layer())


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_merged_linear_layer(bias):
    layer = _layer(bias=bias)
    merged = layer.weight + 1.5 * layer.B @ layer.R @ layer.A
    torch.testing.assert_close(layer(_input()), torch.nn.functional.linear(_input(), merged, layer.bias))


def test_dropout_follows_the_modules_mode():
    layer = _layer(LoRA(rank=RANK, dropout=0.5))
    with torch.random.fork_rng():
        assert torch.equal(layer.eval()(_input()), layer(_input()))
        assert not torch.equal(layer.train()(_input()), layer(_input()))


# ---------------------------------------------------------------------- trying a scale


@pytest.mark.parametrize("factor", ["A", "R", "B"])
def test_try_scale_acts_in_the_forward_pass_only_and_ends(factor):
    layer = _layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    plain, base = layer(_input()), torch.nn.functional.linear(_input(), layer.weight, layer.bias)
    layer.try_scale(factor, 0.25)
    torch.testing.assert_close(layer(_input()), base + 0.25 * (plain - base))
    layer.try_scale(factor, 3.0)  # replaces, does not multiply up
    torch.testing.assert_close(layer(_input()), base + 3.0 * (plain - base))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.try_scale(None)
    assert torch.equal(layer(_input()), plain)


# ---------------------------------------------------------------------- the tap


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_tap_shows_the_full_gradient_of_the_bare_layer(checkpointed):
    layer = _layer()
    x = _input()
    weight = layer.weight.detach().clone().requires_grad_()
    torch.nn.functional.linear(x, weight, layer.bias).square().sum().backward()

    seen, anchor = [], torch.zeros((), requires_grad=True)
    layer.tap(anchor, lambda dy, x: seen.append(dy.T @ x))
    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    y.square().sum().backward(inputs=[anchor])
    torch.testing.assert_close(sum(seen), weight.grad)
    assert len(seen) == 1
    assert all(p.grad is None for p in layer.parameters())


def test_a_tapped_layer_leaves_the_adapter_out_and_untapping_brings_it_back():
    layer = _layer()
    plain, base = layer(_input()), torch.nn.functional.linear(_input(), layer.weight, layer.bias)
    seen = []
    layer.tap(torch.zeros((), requires_grad=True), lambda dy, x: seen.append(dy))
    assert torch.equal(layer(_input()), base)
    layer.tap(None, None)
    assert torch.equal(layer(_input()), plain)
    layer(_input()).sum().backward()
    assert seen == [] and layer.R.grad is not None


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "method", [LoRASB(rank=RANK, alpha=6.0), LoRA(rank=RANK, dropout=0.5)], ids=lambda m: m.name
)
def test_tapped_with_its_adapter_it_shows_the_gradient_of_the_adapted_weight(method, checkpointed):
    layer, x = _layer(method).eval(), _input()
    pair = method.delta({name: factor.detach() for name, factor in layer.factors().items()})
    weight = (layer.weight + pair.left @ pair.right).detach().requires_grad_()
    torch.nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    plain = layer(x).detach()

    seen, anchor = [], torch.zeros((), requires_grad=True, dtype=torch.float64)
    layer.tap(anchor, lambda dy, x: seen.append(dy.T @ x), adapted=True)
    layer.train()  # its own mode must not bring dropout back
    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    torch.testing.assert_close(y.detach(), plain)
    y.square().sum().backward()  # of everything, not of the anchor alone
    torch.testing.assert_close(sum(seen), weight.grad)
    assert len(seen) == 1
    assert all(p.grad is None for p in layer.parameters())


def test_tapping_with_the_adapter_reaches_the_layers_below_through_it():
    """dL/dx is that of the adapted layer,
    or gradients of earlier layers would leave this one's adapter out.
    """
    layer, x = _layer(), _input().requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.tap(torch.zeros((), requires_grad=True, dtype=torch.float64), lambda dy, x: None, adapted=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)
    layer.tap(torch.zeros((), requires_grad=True, dtype=torch.float64), lambda dy, x: None)
    (bare,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert not torch.allclose(bare, wanted)


# ---------------------------------------------------------------------- gradient maps


def _maps(seed, dtype=torch.float64):
    return {
        "R": tuple(
            torch.randn(RANK, RANK, generator=_generator(seed + i), dtype=torch.float64).to(dtype)
            for i in (0, 1)
        )
    }


def _apply(maps, gradient):
    p, q = maps["R"]
    return (p.float() @ gradient.float() @ q.float()).to(gradient.dtype)


def test_a_map_replaces_the_gradient_and_new_ones_replace_earlier_ones():
    layer = _layer(dtype=torch.float32)
    plain = _core_gradient(layer)
    for seed in (1, 2):
        maps = _maps(seed, torch.float32)
        layer.map_gradients(maps)
        torch.testing.assert_close(_core_gradient(layer), _apply(maps, plain))
    layer.map_gradients({})
    assert torch.equal(_core_gradient(layer), plain)


def test_a_map_acts_on_every_micro_batch():
    layer, maps = _layer(dtype=torch.float32), _maps(1, torch.float32)
    plain = _core_gradient(layer)
    layer.map_gradients(maps)
    once = _core_gradient(layer)
    layer(_input(torch.float32)).square().sum().backward()  # accumulates
    torch.testing.assert_close(layer.R.grad, 2 * once)
    torch.testing.assert_close(layer.R.grad, 2 * _apply(maps, plain))


def test_a_map_acts_once_under_checkpointing():
    layer, maps = _layer(dtype=torch.float32), _maps(1, torch.float32)
    layer.map_gradients(maps)
    once = _core_gradient(layer)
    layer.R.grad = None
    checkpoint(layer, _input(torch.float32).requires_grad_(), use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(layer.R.grad, once)


def test_a_map_is_multiplied_in_float32():
    """P and Q of wide range: rounding them, or the first product, to bfloat16 would show."""
    layer = _layer(dtype=torch.bfloat16)
    p = torch.eye(RANK) + 1e-3 * torch.randn(RANK, RANK, generator=_generator(1))
    layer.map_gradients({})
    plain = _core_gradient(layer)
    layer.map_gradients({"R": (p * 1e-4, torch.linalg.inv(p) * 1e4)})
    got = _core_gradient(layer)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ((p * 1e-4) @ plain.float() @ (torch.linalg.inv(p) * 1e4)).bfloat16())


@pytest.mark.parametrize("method", [LoRASB(rank=RANK), DoRA(rank=RANK)], ids=lambda method: method.name)
def test_a_bare_layer_is_what_it_was(method):
    layer, x = _layer(method), _input()
    with layer.bare():
        bare = layer(x)
    torch.testing.assert_close(bare, torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(layer(x), bare)


# ---------------------------------------------------------------------- passes


def test_forward_is_what_the_present_pass_makes_of_the_layer_and_its_input():
    layer, x = _layer(), _input()
    assert layer.present_pass == Adapted()
    layer.present_pass = lambda asked, given: (asked, given)
    found, given = layer(x)
    assert found is layer and given is x


def test_a_layer_that_was_bare_for_a_while_is_in_its_earlier_pass_again():
    layer, x = _layer(), _input()
    layer.try_scale("R", 3.0)
    tried = layer(x)
    with pytest.raises(RuntimeError), layer.bare():
        assert layer.present_pass == Bare()
        raise RuntimeError
    assert layer.present_pass == Tried("R", 3.0) and torch.equal(layer(x), tried)
    layer.try_scale(None)
    assert layer.present_pass == Adapted()


def test_only_a_method_with_a_magnitude_is_asked_to_prepare():
    layer = _layer(LoRA(rank=RANK))
    assert layer(_input()).shape == (2, 9, OUT)
    with pytest.raises(AttributeError):
        layer.prepared(layer.factors())
