"""DoRA: rows of the norms in m, and the norm of what is trained taken once a step and layer."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from distlora.adapter.attach import attach
from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.maths.linalg import row_norms
from distlora.maths.low_rank import LowRank
from distlora.methods import LayerInit
from distlora.methods.dora import DoRA
from distlora.recipe.combination import problem_with_decay
from tests.stepping import take_step

FP32, BF16 = torch.float32, torch.bfloat16
OUT, IN, RANK = 31, 23, 3
BOTH = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _layer(dtype=FP32, bias=True, zero_row=None, start="initial", **settings) -> AdapterLinear:
    """start: "initial" as the method begins, "random" with factors of which none is zero."""
    linear = torch.nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = AdapterLinear(linear, DoRA(rank=RANK, alpha=6.0, **settings), "layer")
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=_generator(seed)))
        if zero_row is not None:
            linear.weight[zero_row] = 0
        init = layer.method.initialise(LayerInit((OUT, IN), linear.weight.float(), _generator(7), dtype))
        for number, (name, value) in enumerate(init.factors.items()):
            noise = torch.randn(value.shape, generator=_generator(10 + number))
            getattr(layer, name).copy_(value if start == "initial" else value + 0.3 * noise)
    return layer


def _input(dtype=FP32, seed=5, tokens=6):
    return torch.randn(tokens, IN, generator=_generator(seed)).to(dtype)


def _adapted(layer) -> torch.Tensor:
    """W' in float64, straight from the definition."""
    w, a, b, m = (getattr(layer, name).detach().double() for name in ("weight", "A", "B", "m"))
    total = w + layer.method.scaling * b @ a
    return m[:, None] * total / total.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------- mathematics


@BOTH
def test_at_the_start_no_row_is_scaled_at_all(dtype):
    """m and the norm are the same numbers, rounded alike: their ratio is 1 to the last bit."""
    layer, x = _layer(dtype, bias=False), _input(dtype)
    assert torch.equal(layer.m, row_norms(layer.weight).to(dtype))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_linear_layer_of_the_definition(bias):
    layer, x = _layer(bias=bias, start="random"), _input()
    expected = torch.nn.functional.linear(x.double(), _adapted(layer), layer.bias.double() if bias else None)
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-5)


def test_the_norm_is_a_constant_to_the_gradient():
    """dL/dB = s·(c ⊙ g)Aᵀ and dL/dA = s·Bᵀ(c ⊙ g) with c = m/norm; dL/dm_i = <g_i, (W + sBA)_i>/norm_i; g =
    dL/dW'.
    """
    layer, x = _layer(start="random"), _input()
    weight = _adapted(layer).requires_grad_()
    torch.nn.functional.linear(x.double(), weight, layer.bias.double()).square().sum().backward()
    layer(x).square().sum().backward()
    a, b, m = (getattr(layer, name).detach().double() for name in ("A", "B", "m"))
    direction = weight.detach() / m[:, None]
    norm = (layer.weight.double() + 2 * b @ a).norm(dim=1)
    scaled = weight.grad * (m / norm)[:, None]
    for found, expected in (
        (layer.A.grad, 2 * b.T @ scaled),
        (layer.B.grad, 2 * scaled @ a.T),
        (layer.m.grad, (weight.grad * direction).sum(1)),
    ):
        torch.testing.assert_close(
            found, expected.float(), rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@BOTH
def test_a_zero_row_stays_zero_and_disturbs_nothing(dtype):
    layer, x = _layer(dtype, zero_row=4), _input(dtype)
    with torch.no_grad():
        layer.B.add_(torch.randn(OUT, RANK, generator=_generator(3)).to(dtype))
        layer.B[4] = 0
    y = layer(x)
    assert y.isfinite().all() and torch.equal(y[:, 4], layer.bias[4].expand(len(x)))
    y.float().square().sum().backward()
    for name in ("A", "B", "m"):
        assert getattr(layer, name).grad.isfinite().all() and getattr(layer, name).grad.any()
    assert not layer.B.grad[4].any() and not layer.m.grad[4].any()


@BOTH
def test_dropout_is_on_the_input_of_all_that_differs_from_the_pretrained_layer(dtype):
    """y = x Wᵀ + b + (x̃ Wᵀ) ⊙ (c − 1) + s·x̃ AᵀBᵀ ⊙ c with the dropped input x̃; and its gradients."""
    layer, x = _layer(dtype, start="random", dropout=0.5).train(), _input(dtype).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        y = layer(x)
        torch.manual_seed(1)
        kept = torch.nn.functional.dropout(torch.ones(x.shape, dtype=dtype), 0.5).double()
    assert 0 < kept.count_nonzero() < kept.numel()
    w, a, b, m, bias = (
        getattr(layer, name).detach().double().requires_grad_() for name in ("weight", "A", "B", "m", "bias")
    )
    s = layer.method.scaling
    c = m / (w + s * b @ a).norm(dim=1).detach()
    exact = x.detach().double().requires_grad_()
    dropped = exact * kept
    expected = exact @ w.T + bias + dropped @ w.T * (c - 1) + s * dropped @ a.T @ b.T * c
    y.double().square().sum().backward()
    expected.square().sum().backward()
    tolerance = 1e-5 if dtype == FP32 else 2e-2
    found = {"y": y, "x": x.grad, "A": layer.A.grad, "B": layer.B.grad, "m": layer.m.grad}
    wanted = {"y": expected, "x": exact.grad, "A": a.grad, "B": b.grad, "m": m.grad}
    for name in found:
        assert (found[name].double() - wanted[name]).norm() < tolerance * wanted[name].norm(), name


def _saved(layer) -> int:
    """Elements of the wide tensors that a forward pass of 64 tokens keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        if tensor.numel() >= 64 * IN:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = _input(tokens=64).requires_grad_()
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


def test_with_dropout_no_second_wide_output_is_kept():
    """Beside the input of the pair and the sum: the mask of the dropout."""
    without, with_dropout = (_layer(start="random", dropout=p).train() for p in (0.0, 0.5))
    assert _saved(with_dropout) - _saved(without) == 64 * IN
    assert _saved(without) == 64 * (IN + OUT)


def test_weight_decay_must_be_wanted():
    assert "decay_pretrained" in problem_with_decay(DoRA(), 0.1)
    assert problem_with_decay(DoRA(), 0.0) is None
    assert problem_with_decay(DoRA(decay_pretrained=True), 0.1) is None


# ---------------------------------------------------------------------- in the layer


@pytest.mark.parametrize("factor", ["A", "B", "m"])
def test_a_trial_scale_has_norms_of_its_own(factor):
    layer, x = _layer(start="random"), _input()
    before = layer(x)
    layer.try_scale(factor, 3.0)
    tried = layer(x)
    layer.try_scale(None)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        getattr(layer, factor).mul_(3.0)
    layer.changed()
    torch.testing.assert_close(tried, layer(x))
    assert (tried - before).abs().max() > 0.1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tapped_it_shows_the_gradient_of_the_frozen_weight(checkpointed):
    """Bare: of the pretrained layer. Adapted: dL/dW = c ⊙ dL/dW', the norm a constant as everywhere."""
    layer, x = _layer(start="random"), _input()
    adapted = _adapted(layer).requires_grad_()
    torch.nn.functional.linear(x.double(), adapted, layer.bias.double()).square().sum().backward()
    c = layer.m.double() / row_norms(layer.weight, layer.method.scaling * layer.B, layer.A).double()
    bare = layer.weight.double().detach().requires_grad_()
    torch.nn.functional.linear(x.double(), bare, layer.bias.double()).square().sum().backward()
    for with_adapter, expected in ((False, bare.grad), (True, (adapted.grad * c[:, None]).detach())):
        seen, anchor = [], torch.zeros((), requires_grad=True)
        layer.tap(anchor, lambda dy, x, seen=seen: seen.append(dy.T @ x), with_adapter)
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        y.square().sum().backward(inputs=[anchor])
        torch.testing.assert_close(seen[0], expected.float(), rtol=1e-4, atol=1e-3)
        assert len(seen) == 1 and all(p.grad is None for p in layer.parameters())
        layer.tap(None, None)


# ---------------------------------------------------------------------- how often the norms are taken


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(IN, OUT), torch.nn.Linear(OUT, 7, bias=False)
        self.checkpointing = False

    def forward(self, x):
        for layer in (self.first, self.second):
            x = (
                checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
                if self.checkpointing
                else layer(x)
            )
        return x


@pytest.fixture
def counted(monkeypatch):
    """Shapes of the weights of which norms were taken since the list was last emptied."""
    calls, prepare = [], DoRA.prepare

    def count(self, weight, factors):
        calls.append(tuple(weight.shape))
        assert not torch.is_grad_enabled()
        return prepare(self, weight, factors)

    monkeypatch.setattr(DoRA, "prepare", count)
    return calls


def _engine(dtype=FP32) -> tuple[LocalEngine, dict[str, AdapterLinear]]:
    net = Net().to(dtype)
    attached = attach(net, DoRA(rank=RANK), "all-linear")
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(
                torch.randn(parameter.shape, generator=_generator(seed)) * 0.3 + 1.0 * (parameter.ndim == 1)
            )
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), dtype)
    engine.start(net, OptimizerSpec(lr=1e-2))
    return engine, attached.layers


def _backward(engine, seed):
    engine.backward(
        engine.run(lambda net, x: net(x).float().square().mean(), _input(engine.dtype, seed).requires_grad_())
    )


ONCE = [(OUT, IN), (7, OUT)]


@BOTH
@pytest.mark.parametrize("checkpointing", [False, "plain", "reentrant"])
def test_once_a_step_and_layer(counted, checkpointing, dtype):
    """Micro-batches, recomputation in the backward pass,
    and evaluations before and after them all share one.
    """
    engine, _ = _engine(dtype)
    engine.module.checkpointing = checkpointing
    for step in range(3):
        for micro_batch in range(4):
            _backward(engine, micro_batch)
            assert counted == ONCE
        with torch.no_grad():
            engine.module(_input(dtype))
        assert counted == ONCE
        take_step(engine)
        counted.clear()
        if step == 1:  # an evaluation between two steps takes them for the next one
            with torch.no_grad():
                engine.module(_input(dtype))
            assert counted == ONCE


def _writes(engine, layers):
    """Everything that changes the first layer, by name; each as a call."""
    first = layers["first"]
    pair = LowRank(torch.ones(OUT, 1), torch.randn(1, IN, generator=_generator(2)))
    trained = {"master": torch.full((OUT, RANK), 0.7)}
    return {
        "write": lambda: engine.write(first, {"B": torch.full((OUT, RANK), 0.5)}),
        "write of m": lambda: engine.write(first, {"m": torch.full((OUT,), 0.5)}),
        "write_trained": lambda: engine.write_trained("first.B", trained, 0),
        "write_parameter": lambda: engine.write_parameter(
            "first.weight", torch.randn(OUT, IN, generator=_generator(4))
        ),
        "add_low_rank": lambda: engine.add_low_rank(first, pair, "nearest", 0),
    }


@BOTH
@pytest.mark.parametrize("change", list(_writes(None, {"first": None})))
def test_every_change_is_seen_by_the_next_forward_pass(counted, change, dtype):
    engine, layers = _engine(dtype)
    x = _input(dtype)
    engine.module(x)
    counted.clear()
    _writes(engine, layers)[change]()
    y = layers["first"](x)
    assert counted == ONCE[:1], "of the layer that has changed, and of no other"
    expected = x.double() @ _adapted(layers["first"]).T + layers["first"].bias.double()
    assert (y.double() - expected).norm() < (1e-6 if dtype == FP32 else 1e-2) * expected.norm()
    engine.module(x)
    assert counted == ONCE[:1]


def test_training_sees_the_norms_of_every_step():
    """Five steps are those of a loop that takes them anew at every pass."""
    engine, layers = _engine()
    other, others = _engine()
    for seed in range(5):
        for running in (engine, other):
            _backward(running, seed)
            take_step(running)
        for layer in others.values():
            layer.changed()
    for name, layer in layers.items():
        x = torch.ones(1, layer.in_features)
        assert torch.equal(layer(x), others[name](x))
        y = (x.double() @ _adapted(layer).T).float() + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def test_what_is_kept_is_a_number_a_row():
    engine, layers = _engine()
    engine.module(_input())
    assert sum(tensor.numel() for tensor in layers["first"]._prepared.values()) == OUT
