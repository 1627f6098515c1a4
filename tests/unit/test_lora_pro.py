"""LoRA-Pro as published, arXiv 2407.18242: the least-squares optimum, found here by solvers that know nothing
of its formulas.
"""

import math

import pytest
import torch
from torch import Tensor

from distlora.adapter.attach import attach
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.methods import LayerInit
from distlora.methods.lora import LoRA
from distlora.methods.lora_pro import LoRAPro
from tests.stepping import take_step

OUT, IN, RANK = 8, 11, 3
METHOD = LoRAPro(rank=RANK, alpha=5.0)

#: What B is made of, such that it has this rank: at the start of training, after one step of a rank-one
#: gradient, and later.
RANKS = pytest.mark.parametrize("rank_of_b", [0, 1, 2, 3])


def _normal(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _factors(rank_of_b: int = RANK, rank_of_a: int = RANK) -> dict[str, Tensor]:
    b = _normal(OUT, rank_of_b, seed=1) @ _normal(rank_of_b, RANK, seed=2)
    a = _normal(RANK, rank_of_a, seed=3) @ _normal(rank_of_a, IN, seed=4)
    return {"A": a, "B": b}


def _gradients(factors, full: Tensor, method=METHOD) -> dict[str, Tensor]:
    """What backward gives for dL/dW = full."""
    return {"A": method.scaling * factors["B"].T @ full, "B": method.scaling * full @ factors["A"].T}


def _effect(factors, gradients, method=METHOD) -> Tensor:
    """`s(B g_A + g_B A)`: what a step along the gradients changes W by, at first order."""
    b, a = factors["B"].double(), factors["A"].double()
    return method.scaling * (b @ gradients["A"].double() + gradients["B"].double() @ a)


def _nearest_effect(factors, full: Tensor, method=METHOD) -> Tensor:
    """The nearest to `full` of all `s(B g_A + g_B A)`, from the matrix of that map and a general
    least-squares solver.
    """
    b, a = factors["B"].double(), factors["A"].double()
    of_a = torch.kron(b, torch.eye(a.shape[1], dtype=torch.float64))
    of_b = torch.kron(torch.eye(b.shape[0], dtype=torch.float64), a.T.contiguous())
    map_ = method.scaling * torch.cat([of_a, of_b], 1)
    solution = torch.linalg.lstsq(map_, full.double().reshape(-1, 1), rcond=1e-6, driver="gelsd").solution
    return (map_ @ solution).view_as(full)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------------- one layer


@pytest.mark.parametrize(("rank", "alpha", "settings", "scaling"), [
    (16, 8, {}, 2.0), (16, None, {}, 4.0), (16, 8, {"scaled_by": "rank"}, 0.5),
    (8, None, {"scaled_by": "rank"}, 2.0),
])  # fmt: skip
def test_scaling(rank, alpha, settings, scaling):
    assert LoRAPro(rank=rank, alpha=alpha, **settings).scaling == scaling


def test_it_starts_as_lora():
    ours, loras = (
        m.initialise(LayerInit((60, 131), None, torch.Generator().manual_seed(0)))
        for m in (LoRAPro(), LoRA())
    )
    assert all(torch.equal(ours.factors[name], loras.factors[name]) for name in ("A", "B"))
    assert ours.base_update is None and LoRAPro.zero_gradient_at_start == ("A",)


@RANKS
@pytest.mark.parametrize("rank_of_a", [2, 3])
@pytest.mark.parametrize("scaled_by", ["rank", "sqrt_rank"])
def test_the_effect_on_the_weight_is_the_least_squares_optimum(rank_of_b, rank_of_a, scaled_by):
    method = LoRAPro(rank=RANK, alpha=5.0, scaled_by=scaled_by)
    factors, full = _factors(rank_of_b, rank_of_a), _normal(OUT, IN, seed=5)
    gradients = _gradients(factors, full, method)
    wanted = _nearest_effect(factors, full, method)
    found = _effect(factors, method.transform_gradients(gradients, factors), method)
    assert _relative(found, wanted) < 1e-5
    assert _relative(_effect(factors, gradients, method), wanted) > 0.1  # LoRA's own is another


@RANKS
def test_x_is_the_one_that_stays_nearest_to_the_plain_gradients_and_does_not_matter_to_the_effect(rank_of_b):
    """(g_A* + Y A, g_B* − B Y) has the same effect for every Y, and the least distance to (g_A, g_B) at Y =
    0.
    """
    factors, full = _factors(rank_of_b), _normal(OUT, IN, seed=5)
    plain = _gradients(factors, full)
    found = METHOD.transform_gradients(plain, factors)

    def moved(y):
        return {"A": found["A"] + y @ factors["A"], "B": found["B"] - factors["B"] @ y}

    def distance(gradients):
        return math.sqrt(
            sum(float((gradients[name] - plain[name]).double().square().sum()) for name in ("A", "B"))
        )

    for seed in range(5):
        y = _normal(RANK, RANK, seed=seed)
        torch.testing.assert_close(_effect(factors, moved(y)), _effect(factors, found), rtol=1e-4, atol=1e-4)
        assert distance(moved(1e-2 * y)) > distance(found)
        assert distance(moved(-1e-2 * y)) > distance(found)


def test_at_zero_b_only_b_gets_a_gradient():
    """`g_B* = (1/s²) g_B (AAᵀ)⁻¹`, which moves W by the part of g in A's row space."""
    factors, full = _factors(0), _normal(OUT, IN, seed=5)
    found = METHOD.transform_gradients(_gradients(factors, full), factors)
    assert not found["A"].any()
    projection = torch.linalg.pinv(factors["A"].double()) @ factors["A"].double()
    assert _relative(_effect(factors, found), full.double() @ projection) < 1e-6


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e3])
def test_the_effect_does_not_depend_on_the_size_of_b(size):
    """So nothing is added to BᵀB: B is small for the whole first part of a run."""
    factors, full = _factors(), _normal(OUT, IN, seed=5)
    factors["B"] = size * factors["B"]
    found = METHOD.transform_gradients(_gradients(factors, full), factors)
    assert _relative(_effect(factors, found), _nearest_effect(_factors(), full)) < 1e-5


def test_an_ill_conditioned_b():
    """Singular values from 1 to 1e-3, so BᵀB's down to 1e-6, above the cutoff: the optimum to 1e-4 of float32
    gradients.
    """
    u, v = torch.linalg.qr(_normal(OUT, RANK, seed=7)).Q, torch.linalg.qr(_normal(RANK, RANK, seed=8)).Q
    factors, full = {"A": _factors()["A"], "B": u * torch.logspace(0, -3, RANK) @ v}, _normal(OUT, IN, seed=5)
    exact = {name: factor.double() for name, factor in factors.items()}
    gradients = {name: gradient.float() for name, gradient in _gradients(exact, full.double()).items()}
    assert (
        _relative(
            _effect(factors, METHOD.transform_gradients(gradients, factors)), _nearest_effect(factors, full)
        )
        < 1e-4
    )


# ---------------------------------------------------------------------- training


class Net(torch.nn.Module):
    """Two adapted layers, and a new head that trains whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (
            torch.nn.Linear(13, 10),
            torch.nn.Linear(10, 9, bias=False),
            torch.nn.Linear(9, 4),
        )

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


LAYERS, HEAD = ("first", "second"), {"head.weight", "head.bias"}
SPECS = {
    "adamw": OptimizerSpec("adamw", 1e-2, (0.9, 0.99), 1e-5, weight_decay=0.1),
    "sgd": OptimizerSpec("sgd", 1e-1),
}


def _net(start: str):
    net = Net()
    attached = attach(net, METHOD, list(LAYERS), HEAD)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(net.named_parameters()):
            parameter.copy_(_normal(*parameter.shape, seed=seed) / 3)
            if start == "initial" and name.endswith(".B"):
                parameter.zero_()
    return net, attached


def _loss(net, seed):
    return 10 * (net(_normal(16, 13, seed=100 + seed)) - _normal(16, 4, seed=200 + seed)).square().mean()


def _by_hand(net, clip: float) -> float:
    """The gradients that LoRA-Pro steps by, put in place of the net's; returns the norm of those that were
    there.

    As the paper writes them down, for a B of full rank or B = 0, the Sylvester equation as one linear system
    of r² unknowns.
    """
    parameters = dict(net.named_parameters())
    norm = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None)
    )
    s = METHOD.scaling
    for name in LAYERS:
        a, b = parameters[f"{name}.A"], parameters[f"{name}.B"]
        A, B, g_a, g_b = (t.detach().double() for t in (a, b, a.grad, b.grad))
        inverse_b = torch.linalg.inv(B.T @ B) if B.any() else torch.zeros(RANK, RANK, dtype=torch.float64)
        eye = torch.eye(RANK, dtype=torch.float64)
        system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)
        x = torch.linalg.solve(system, (-inverse_b @ g_a @ A.T / s**2).reshape(-1)).view(RANK, RANK)
        outside = torch.eye(len(B), dtype=torch.float64) - B @ inverse_b @ B.T
        a.grad.copy_(inverse_b @ g_a / s**2 + x @ A)
        b.grad.copy_(outside @ g_b @ torch.linalg.inv(A @ A.T) / s**2 - B @ x)
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.mul_(min(1.0, clip / norm))
    return norm


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("start", ["initial", "random"])
def test_five_steps_by_hand(spec, start):
    """With a clipping that is always at work: by the norm of the plain gradients, the head's among them, and
    on all of them.
    """
    clip = 0.3
    (net, _), (plain, _) = _net(start), _net(start)
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), clip=clip)
    engine.start(net, spec)
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = spec.build(trained)
    for seed in range(5):
        loss, expected = _loss(net, seed), _loss(plain, seed)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        engine.backward(loss)
        expected.backward()
        norm = _by_hand(plain, clip)
        assert norm > 1.5 * clip
        assert take_step(engine).grad_norm == pytest.approx(norm, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_in_bfloat16_the_factors_are_those_that_the_forward_pass_uses():
    """Not the float32 masters, which here are a step ahead of what bfloat16 can tell apart."""
    net, attached = _net("random")
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), torch.bfloat16)
    engine.start(net.bfloat16(), OptimizerSpec("sgd", 1.0))
    layer = attached.layers["first"]
    with torch.no_grad():
        engine.parts(layer)["B"].master.mul_(1 + 2**-10)
    x = _normal(16, 13, seed=1).bfloat16()
    engine.backward(net(x).float().square().mean())
    factors = {name: factor.detach().float().clone() for name, factor in layer.factors().items()}
    wanted = METHOD.transform_gradients({name: getattr(layer, name).grad.float() for name in "AB"}, factors)
    before = engine.read(layer)
    assert not torch.equal(before["B"], factors["B"])
    take_step(engine)
    for name, value in engine.read(layer).items():
        torch.testing.assert_close(before[name] - value, wanted[name].float(), rtol=1e-5, atol=1e-6)
