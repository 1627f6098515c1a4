"""LoRA-SB as published (arXiv 2411.19557): the lemma and the theorems as properties, the algorithm as an
oracle.
"""

import numpy as np
import pydantic
import pytest
import torch

from distlora.adapter.attach import attach, lora_parameters
from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.methods import LayerInit
from distlora.methods.lora import LoRA
from distlora.methods.lora_sb import LoRASB
from distlora.methods.lora_xs import LoRAXS
from tests.tiny_runs import BF16, FP32, PROBE_SAMPLES, Run, change, equal, relative, samples

OUT, IN, RANK = 60, 131, 8


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64).to(dtype)


def _gradient(seed=0, out=OUT, inner=IN):
    """A gradient with a decaying spectrum and noise, as real ones have."""
    spectrum = torch.logspace(0, -2, 20, dtype=torch.float64)
    low = (_normal(out, 20, seed=seed, dtype=torch.float64) * spectrum) @ _normal(
        20, inner, seed=seed + 1, dtype=torch.float64
    )
    return (low + 0.1 * _normal(out, inner, seed=seed + 2, dtype=torch.float64)).float()


def _initialise(source=None, rank=RANK, alpha=None, eta=1e-3, dtype=torch.float32, seed=0, **init):
    method = LoRASB(rank=rank, alpha=alpha, init=init)
    shape = (OUT, IN) if source is None else tuple(source.shape)
    return method, method.initialise(LayerInit(shape, source, _generator(seed), dtype, eta))


def _product(method, factors):
    """s·B·R·A in float64."""
    return method.scaling * factors["B"].double() @ factors["R"].double() @ factors["A"].double()


def _skewed_factors(seed=3, dtype=torch.float64):
    """Full-rank factors far from orthonormal: columns and rows of very different length, correlated."""
    lengths = torch.logspace(-1, 1, RANK, dtype=torch.float64)
    mix = torch.eye(RANK, dtype=torch.float64) + 0.3 * _normal(RANK, RANK, seed=seed, dtype=torch.float64)
    b = _normal(OUT, RANK, seed=seed + 1, dtype=torch.float64) @ mix * lengths
    a = lengths[:, None] * (mix @ _normal(RANK, IN, seed=seed + 2, dtype=torch.float64))
    return {"A": a.to(dtype), "R": _normal(RANK, RANK, seed=seed + 3, dtype=dtype), "B": b.to(dtype)}


def _layer(method, factors, dtype=torch.float32):
    layer = AdapterLinear(torch.nn.Linear(IN, OUT, dtype=dtype), method, "layer")
    with torch.no_grad():
        for name, value in factors.items():
            getattr(layer, name).copy_(value)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    return layer


def _core_gradient(layer, seed=4):
    """(gradient that arrives at R, full gradient g = dyᵀ x), float64."""
    x, dy = (_normal(23, n, seed=seed + i, dtype=layer.weight.dtype) for i, n in enumerate((IN, OUT)))
    layer.R.grad = None
    layer(x).backward(dy)
    return layer.R.grad.double(), dy.double().T @ x.double()


def _optimal(factors, g, s):
    """argmin over X of ‖s·B X A − g‖_F by a plain least-squares solve on vec(X)."""
    b, a = factors["B"].double(), factors["A"].double()
    system = s * torch.kron(b, a.T.contiguous())  # row-major vec: vec(B X A) = (B ⊗ Aᵀ) vec(X)
    return torch.linalg.lstsq(system, g.reshape(-1, 1), driver="gelsd").solution.reshape(RANK, RANK)


# ---------------------------------------------------------------------- the initialisation


def _paper_algorithm(gradients, eta, rank, s, step):
    """Algorithm 1 written down from the paper's equations, in numpy and float64; shares nothing with the
    library.
    """
    total = np.zeros(gradients[0].shape)
    for gradient in gradients:
        total += gradient
    step_matrix = -eta * np.sign(total) if step == "adamw" else -eta * total / len(gradients)
    u, sigma, vt = np.linalg.svd(step_matrix)
    return u[:, :rank], np.diag(sigma[:rank]) / s, vt[:rank, :]


@pytest.mark.parametrize("step", ["adamw", "sgd"])
@pytest.mark.parametrize("alpha", [None, 24.0])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=str)
def test_initialisation_equals_the_papers_algorithm(step, alpha, shape):
    samples = [_gradient(seed, *shape) for seed in (10, 20, 30)]
    method, init = _initialise(torch.stack(samples).mean(0), alpha=alpha, eta=2e-3, step=step)
    b, r, a = _paper_algorithm([g.double().numpy() for g in samples], 2e-3, RANK, method.scaling, step)

    got = {name: value.double().numpy() for name, value in init.factors.items()}
    sign = np.sign((got["B"] * b).sum(0))  # singular vectors are defined up to a common sign
    scale = r.max()
    np.testing.assert_allclose(got["B"], b * sign, atol=1e-3)
    np.testing.assert_allclose(got["A"], sign[:, None] * a, atol=1e-3)
    np.testing.assert_allclose(got["R"], r, atol=1e-4 * scale)
    np.testing.assert_allclose(got["B"] @ got["R"] @ got["A"], b @ r @ a, atol=1e-4 * scale)


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("step", ["adamw", "sgd"])
@pytest.mark.parametrize("alpha", [None, 24.0])
def test_theorem_6_the_start_is_the_best_rank_r_copy_of_the_first_step(orthonormal, step, alpha):
    """Eckart–Young: ‖s·B R A − ΔW‖_F = √(Σ_{i>r} σ_i²), and it points downhill."""
    g = _gradient()
    method, init = _initialise(g, alpha=alpha, eta=1e-3, step=step, orthonormal=orthonormal)
    step_matrix = -1e-3 * (torch.sign(g) if step == "adamw" else g).double()
    tail = torch.linalg.svdvals(step_matrix)[RANK:].square().sum().sqrt()
    error = (_product(method, init.factors) - step_matrix).norm()
    torch.testing.assert_close(error, tail, rtol=1e-5, atol=0)
    assert (_product(method, init.factors) * g).sum() < 0


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_the_size_of_the_step_is_reported(step):
    g = _gradient()
    _, init = _initialise(g, step=step, eta=0.5)
    expected = 0.5 * (torch.sign(g) if step == "adamw" else g).square().mean().sqrt()
    assert init.report["step_rms"] == pytest.approx(float(expected), rel=1e-5)


def test_captured_energy_is_reported():
    g = _gradient()
    _, init = _initialise(g)
    sigma = torch.linalg.svdvals(torch.sign(g).double())
    assert init.report["captured_energy"] == pytest.approx(
        float(sigma[:RANK].square().sum() / sigma.square().sum()), rel=1e-5
    )


def test_float32_factors_are_orthonormal_and_the_core_is_diagonal():
    method, init = _initialise(_gradient(), alpha=24.0)
    f = init.factors
    identity = torch.eye(RANK)
    torch.testing.assert_close(f["B"].T @ f["B"], identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(f["A"] @ f["A"].T, identity, rtol=0, atol=1e-5)
    sigma = torch.linalg.svdvals(1e-3 * torch.sign(_gradient()))[:RANK]
    torch.testing.assert_close(
        f["R"], torch.diag(sigma) / method.scaling, rtol=0, atol=1e-5 * float(sigma[0])
    )


def test_bfloat16_factors_get_the_core_that_fits_them_best():
    g = _gradient()
    step = -1e-3 * torch.sign(g).double()
    method, init = _initialise(g, alpha=24.0, dtype=torch.bfloat16)
    f = init.factors
    assert f["A"].dtype == f["B"].dtype == torch.bfloat16 and f["R"].dtype == torch.float32
    b, a = f["B"].double(), f["A"].double()
    assert (b.T @ b - torch.eye(RANK)).abs().max() > 1e-4  # the premise: cast factors are not orthonormal

    def error(core):
        return float((method.scaling * b @ core.double() @ a - step).norm())

    residual = method.scaling * b @ f["R"].double() @ a - step
    assert (b.T @ residual @ a.T).norm() < 1e-5 * (b.T @ step @ a.T).norm()  # the normal equations
    torch.testing.assert_close(
        f["R"].double(), _optimal(f, step, method.scaling), rtol=0, atol=1e-6 * float(f["R"].abs().max())
    )
    sigma = torch.linalg.svdvals(step)[:RANK]
    assert error(f["R"]) < error(torch.diag(sigma) / method.scaling)
    for seed in range(5):
        assert error(f["R"] + 1e-3 * f["R"].norm() * _normal(RANK, RANK, seed=seed)) > error(f["R"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("orthonormal", "scaled"), [(True, "R"), (False, "B")])
def test_one_factor_alone_carries_eta(orthonormal, scaled, dtype):
    """The line search over η rescales that factor and nothing else."""
    g, c = _gradient(), 3.7e-4
    method, unit = _initialise(g, eta=1.0, orthonormal=orthonormal, dtype=dtype)
    _, at_c = _initialise(g, eta=c, orthonormal=orthonormal, dtype=dtype)
    assert method.proportional_to_eta() == scaled
    for name in ("A", "R", "B"):
        factor = c if name == scaled else 1.0
        expected = unit.factors[name].double() * factor
        tolerance = (1e-4 if dtype == torch.float32 or name == scaled else 1e-2) * float(expected.abs().max())
        torch.testing.assert_close(at_c.factors[name].double(), expected, rtol=0, atol=tolerance)


def test_a_layer_without_gradient_starts_at_zero_and_can_still_train():
    method, init = _initialise(torch.zeros(OUT, IN))
    f = init.factors
    assert not f["R"].any() and all(value.isfinite().all() for value in f.values())
    torch.testing.assert_close(f["B"].T @ f["B"], torch.eye(RANK), rtol=0, atol=1e-5)
    assert method.gradient_map(f) == {}


def test_rank_may_be_the_smaller_side():
    g = _gradient()
    method, init = _initialise(g, rank=OUT)
    torch.testing.assert_close(
        _product(method, init.factors), -1e-3 * torch.sign(g).double(), rtol=0, atol=1e-7
    )
    assert init.report["captured_energy"] == pytest.approx(1.0, abs=1e-5)


# ---------------------------------------------------------------------- the gradient of R


@pytest.mark.parametrize("alpha", [None, 24.0])
def test_lemma_2_the_gradient_of_the_core(alpha):
    """g_R = s·Bᵀ g Aᵀ."""
    method = LoRASB(rank=RANK, alpha=alpha)
    factors = _skewed_factors()
    got, g = _core_gradient(_layer(method, factors, torch.float64))
    torch.testing.assert_close(got, method.scaling * factors["B"].T @ g @ factors["A"].T)


@pytest.mark.parametrize("alpha", [None, 2.0, 24.0])
def test_theorem_3_no_other_core_gradient_is_closer_to_the_full_one(alpha):
    """As the optimizer sees it: the map is installed on a layer, and a backward pass is run."""
    method, factors = LoRASB(rank=RANK, alpha=alpha), _skewed_factors()
    layer = _layer(method, factors, torch.float64)
    layer.map_gradients(method.gradient_map(factors))
    got, g = _core_gradient(layer)
    b, a, s = factors["B"], factors["A"], method.scaling

    best = _optimal(factors, g, s)
    torch.testing.assert_close(
        got, best, rtol=0, atol=2e-3 * float(best.abs().max())
    )  # the map is float32, cond(B) is 1e2

    def distance(core):
        return float((s * b @ core @ a - g).norm())

    assert distance(got) == pytest.approx(distance(best), rel=1e-6)
    plain = s * b.T @ g @ a.T
    assert distance(got) < distance(plain)
    assert distance(got) < min(
        distance(c * plain) for c in torch.logspace(-8, 0, 60)
    )  # not a matter of its length
    for seed in range(5):
        other = got + 0.05 * got.norm() * _normal(RANK, RANK, seed=seed, dtype=torch.float64)
        assert distance(other) > distance(got)


@pytest.mark.parametrize("alpha", [None, 2.0, 24.0])
def test_theorem_4_a_step_along_the_optimal_gradient_lowers_the_loss(alpha):
    method, factors = LoRASB(rank=RANK, alpha=alpha), _skewed_factors()
    layer = _layer(method, factors, torch.float64)
    layer.map_gradients(method.gradient_map(factors))
    x, target = _normal(23, IN, seed=6, dtype=torch.float64), _normal(23, OUT, seed=7, dtype=torch.float64)

    def loss():
        return (layer(x) - target).square().mean()

    start = loss()
    start.backward()
    mapped = layer.R.grad.clone()
    layer.map_gradients({})
    layer.R.grad = None
    loss().backward()
    first_order = -(layer.R.grad * mapped).sum()  # dL for ΔR = −lr·g_R*, over lr
    assert first_order < 0
    for rate in (1e-4, 1e-3):
        with torch.no_grad():
            layer.R -= rate * mapped
            assert loss() < start
            if rate == 1e-4:  # the real change is the first-order one
                torch.testing.assert_close(loss() - start, rate * first_order, rtol=0.05, atol=0)
            layer.R += rate * mapped


def test_theorem_5_the_equivalent_gradient_does_not_depend_on_s():
    """s·B g_R* A = P_B g P_A, the projection on the spaces of B and A."""
    factors = _skewed_factors()
    b, a = factors["B"], factors["A"]
    projection_b = b @ torch.linalg.pinv(b)
    projection_a = torch.linalg.pinv(a) @ a
    for alpha in (0.5, RANK, 60.0):
        method = LoRASB(rank=RANK, alpha=alpha)
        layer = _layer(method, factors, torch.float64)
        layer.map_gradients(method.gradient_map(factors))
        got, g = _core_gradient(layer)
        expected = projection_b @ g @ projection_a
        equivalent = method.scaling * b @ got @ a
        assert (equivalent - expected).norm() < 1e-3 * expected.norm()


def test_orthonormal_factors_with_unit_scaling_need_no_map():
    method, init = _initialise(_gradient())
    assert method.gradient_map(init.factors) == {}
    got, g = _core_gradient(_layer(method, init.factors))
    best = _optimal(init.factors, g, 1.0)
    torch.testing.assert_close(got, best, rtol=0, atol=1e-4 * float(best.abs().max()))


def test_orthonormal_factors_with_another_scaling_need_only_one_over_s_squared():
    method, init = _initialise(_gradient(), alpha=24.0)
    p, q = method.gradient_map(init.factors)["R"]
    torch.testing.assert_close(p, torch.eye(RANK) / 9, rtol=0, atol=1e-5)
    torch.testing.assert_close(q, torch.eye(RANK), rtol=0, atol=1e-5)


def test_bfloat16_factors_are_corrected():
    """The optimal gradient for the cast factors, not for the orthonormal ones that they were."""
    method, init = _initialise(_gradient(), dtype=torch.bfloat16)
    cast = {name: value.bfloat16().double() for name, value in init.factors.items()}
    layer = _layer(method, cast, torch.float64)
    plain, g = _core_gradient(layer)
    layer.map_gradients(method.gradient_map({name: value.bfloat16() for name, value in init.factors.items()}))
    corrected, _ = _core_gradient(layer)
    best = _optimal(cast, g, 1.0)
    assert (corrected - best).norm() < 1e-5 * best.norm()
    assert (plain - best).norm() > 1e-4 * best.norm()


def test_the_map_takes_effect_in_a_bfloat16_layer():
    method, factors = LoRASB(rank=RANK, alpha=24.0), _skewed_factors(dtype=torch.bfloat16)
    layer = _layer(method, factors, torch.bfloat16)
    plain, _ = _core_gradient(layer)
    layer.map_gradients(method.gradient_map(factors))
    got, _ = _core_gradient(layer)
    p, q = method.gradient_map(factors)["R"]
    expected = (p.double() @ plain @ q.double()).bfloat16().double()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()))
    assert layer.R.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------------- starting anew

RESTART = {"name": "lora_sb", "rank": 4, "init": {"eta": 1e-2}}
BOTH = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def _restarting(dtype=FP32, alpha=None, init=None, **recompose):
    return Run(
        RESTART | {"alpha": alpha, "recompose": {"times": 3} | recompose} | ({"init": init} if init else {}),
        dtype,
    )


def _gradients_at(weights, run, number):
    """dL/dW of the number-th probe's mean loss for these dense weights, by autograd."""
    weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
    first, head = run.layers["first"], run.engine.module.head
    batch = samples(500 + number, FP32, PROBE_SAMPLES)
    hidden = torch.tanh(
        torch.nn.functional.linear(batch["x"].double(), weights["first"], first.bias.double())
    )
    hidden = torch.tanh(torch.nn.functional.linear(hidden, weights["second"]))
    logits = torch.nn.functional.linear(hidden, head.weight.double(), head.bias.double())
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


@BOTH
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_a_restart_at_zero_keeps_the_function_and_fuses_all_that_was_learned(alpha, rounding, dtype):
    """In bfloat16 up to half a unit in the last place of W, or a whole one where draws decide."""
    run = _restarting(dtype, alpha, start="zero", rounding=rounding)
    unit = 1e-6 if dtype == FP32 else 2.0**-8 if rounding == "nearest" else 2.0**-7
    for _ in range(3):
        run.to_recomposition()
        before = {name: run.adapted(name) for name in run.layers}
        moved, report = change(run, run.decide)
        assert report.recomposed and moved < (1e-5 if dtype == FP32 else 0.02)
        for name, layer in run.layers.items():
            assert not layer.R.any() and not run.engine.read(layer)["R"].any()
            assert relative(layer.weight.double(), before[name]) <= 1.001 * unit
            assert report.layers[name].components == (0, 1, 2, 3)
    assert run.ledger.columns("first") == 3 * 4 and run.probes == [1, 2, 3]
    assert {entry.rounding for entry in run.ledger.entries["first"]} == {rounding}
    assert run.total - run.done == 5 and run.train()[0][-1] < 10


def test_a_restart_takes_its_directions_from_the_gradients_of_then():
    """B and A are the leading singular directions of sign(g) at the fused weights, for the samples of that
    restart.
    """
    run = _restarting(start="zero")
    for number in (1, 2, 3):
        run.to_recomposition()
        gradients = _gradients_at({name: run.adapted(name) for name in run.layers}, run, number)
        run.decide()
        for name, layer in run.layers.items():
            u, _, vt = torch.linalg.svd(-gradients[name].sign())
            b, a = layer.B.detach().double(), layer.A.detach().double()
            torch.testing.assert_close(b @ b.T, u[:, :4] @ u[:, :4].T, rtol=0, atol=1e-4)
            torch.testing.assert_close(a.T @ a, vt[:4].T @ vt[:4], rtol=0, atol=1e-4)


@BOTH
def test_a_restart_with_a_step_makes_the_best_copy_of_it(dtype):
    run = _restarting(dtype)
    for number in (1, 2, 3):
        run.to_recomposition()
        before = {name: run.adapted(name) for name in run.layers}
        moved, report = change(run, run.decide)
        gradients = _gradients_at(
            {name: layer.weight.detach().double() for name, layer in run.layers.items()}, run, number
        )
        assert moved > 1e-3 and report.scalars["init/eta"] == 1e-2
        for name, layer in run.layers.items():
            # What was learned is in W, and the step comes on top.
            assert relative(layer.weight.double(), before[name]) <= (1e-6 if dtype == FP32 else 1.001 * 2**-8)
            step = run.adapted(name) - layer.weight.detach().double()
            if dtype == FP32:
                u, sigma, vt = torch.linalg.svd(-1e-2 * gradients[name].sign())
                assert relative(step, u[:, :4] * sigma[:4] @ vt[:4]) < 1e-3
            assert (step * gradients[name]).sum() < 0
    assert run.probes == [1, 2, 3]


@BOTH
@pytest.mark.parametrize("start", ["step", "zero"])
def test_what_a_core_learned_is_what_it_gained_since_its_start(start, dtype):
    """Neither the first step nor that of a restart was learned: s·B (R − R_start) A, of the numbers that the
    forward pass used.
    """
    run = _restarting(dtype, alpha=10.0, start=start)
    begun = {name: run.used(name)["R"] for name in run.layers}
    for _ in range(3):
        run.to_recomposition()
        before, weights = {name: run.used(name) for name in run.layers}, run.weights()
        report = run.decide()
        for name, layer in report.layers.items():
            now = before[name]
            learned = 2.5 * now["B"] @ (now["R"] - begun[name]) @ now["A"]
            fused = 2.5 * now["B"] @ now["R"] @ now["A"]
            assert layer.learned_norm == pytest.approx(float(learned.norm()), rel=1e-4)
            assert layer.update_norm == pytest.approx(float(fused.norm()), rel=1e-4)
            if dtype == BF16:
                error = (weights[name].double() + fused - run.layers[name].weight.double()).norm()
                assert layer.rounding_loss_of_learned == pytest.approx(
                    float(error / learned.norm()), rel=1e-3
                )
            assert (layer.learned_norm == pytest.approx(layer.update_norm, rel=1e-3)) is not begun[
                name
            ].any().item()
            begun[name] = run.used(name)["R"]


def test_restarts_let_a_core_explore_more_than_its_rank():
    once, thrice = Run(RESTART), _restarting(start="zero")
    once.train()
    reports = [report for report in thrice.train()[1] if report.recomposed]
    assert [report.step for report in reports] == [5, 10, 15]
    for name in thrice.layers:
        total = thrice.adapted(name) - thrice.first_weights[name].double()
        assert torch.linalg.matrix_rank(total, rtol=1e-4) > 8
        assert (
            torch.linalg.matrix_rank(once.adapted(name) - once.first_weights[name].double(), rtol=1e-4) == 4
        )
        ranks = [report.layers[name].effective_rank for report in reports]
        assert ranks == sorted(ranks) and ranks[-1] > ranks[0] + 1
    assert equal(once.weights(), once.first_weights), "without a restart the weight is left alone"


@BOTH
def test_after_a_restart_gradients_are_corrected_for_the_new_factors(dtype):
    """Theorem 3 with the factors of now: the optimizer is given (1/s²)(BᵀB)⁻¹ g_R (AAᵀ)⁻¹."""
    run = _restarting(dtype, alpha=10.0, start="zero")
    run.train(6)
    run.backward()
    found = {name: layer.R.grad.double() for name, layer in run.layers.items()}
    for layer in run.layers.values():
        layer.map_gradients({})
        layer.R.grad = None
    run.backward()
    for name, layer in run.layers.items():
        b, a = run.used(name)["B"], run.used(name)["A"]
        wanted = torch.linalg.inv(b.T @ b) @ layer.R.grad.double() @ torch.linalg.inv(a @ a.T) / 2.5**2
        torch.testing.assert_close(
            found[name], wanted, rtol=0, atol=(1e-4 if dtype == FP32 else 2e-2) * float(wanted.abs().max())
        )


def test_after_a_restart_the_core_trains_as_a_young_one():
    """First moments start at zero, second ones have their own age: no step above one and a half rates, late
    in training too.
    """
    run = _restarting(start="zero", times=None, interval=10)
    run.train(9)
    run.step(decide=False)
    squares = run.moments("exp_avg_sq")
    run.decide()
    for name in run.layers:
        assert not run.moments("exp_avg")[f"{name}.R"].any()
        assert torch.equal(run.moments("exp_avg_sq")[f"{name}.R"], squares[f"{name}.R"])
    gradients = {}

    def look():
        factor = run.engine.clip_factor()
        gradients.update({name: layer.R.grad * factor for name, layer in run.layers.items()})

    run.step(look=look)
    for name, gradient in gradients.items():
        found = run.moments("exp_avg_sq")[f"{name}.R"] / (1 - 0.999**11)
        torch.testing.assert_close(found, gradient.square(), rtol=1e-3, atol=1e-14)


# ---------------------------------------------------------------------- the paper's ablations


def test_without_orthonormal_factors_the_start_is_the_same_point_and_nothing_is_mapped():
    """Eq. 11–12: B = U_rΣ_r, A = V_rᵀ, R = I/s."""
    g = _gradient()
    method, init = _initialise(g, alpha=24.0, orthonormal=False)
    other, reference = _initialise(g, alpha=24.0)
    torch.testing.assert_close(
        _product(method, init.factors), _product(other, reference.factors), rtol=0, atol=1e-7
    )
    assert torch.equal(init.factors["R"], torch.eye(RANK) / method.scaling)
    sigma = torch.linalg.svdvals(1e-3 * torch.sign(g))[:RANK]
    torch.testing.assert_close(
        init.factors["B"].T @ init.factors["B"], torch.diag(sigma.square()), rtol=1e-4, atol=1e-8
    )
    assert method.gradient_map(init.factors) == {}


def test_the_optimal_gradient_is_an_ablation_of_its_own():
    """Theorem 3 without orthonormal factors, and none of it with them."""
    method, init = _initialise(_gradient(), alpha=24.0, orthonormal=False, optimal_gradient=True)
    factors = {name: value.double() for name, value in init.factors.items()}
    layer = _layer(method, factors, torch.float64)
    plain, g = _core_gradient(layer)
    p, q = (side.double() for side in method.gradient_map(layer.factors())["R"])
    optimal = _optimal(factors, g, method.scaling)
    torch.testing.assert_close(p @ plain @ q, optimal, rtol=1e-4, atol=1e-5 * float(optimal.abs().max()))
    assert (plain - optimal).abs().max() > 0.1 * optimal.abs().max()  # the premise: they differ

    without, init = _initialise(_gradient(), alpha=24.0, optimal_gradient=False)
    assert without.gradient_map(init.factors) == {}


def test_sgd_keeps_the_size_of_the_gradient_and_adamw_only_its_sign():
    g = _gradient()
    products = {}
    for step in ("sgd", "adamw"):
        for scale in (1.0, 5.0):
            method, init = _initialise(scale * g, step=step)
            products[step, scale] = _product(method, init.factors)
    torch.testing.assert_close(products["sgd", 5.0], 5 * products["sgd", 1.0], rtol=0, atol=1e-6)
    torch.testing.assert_close(products["adamw", 5.0], products["adamw", 1.0])
    cosine = torch.nn.functional.cosine_similarity(
        products["sgd", 1.0].flatten(), products["adamw", 1.0].flatten(), 0
    )
    assert cosine < 0.99


def test_kaiming_factorises_a_random_matrix_and_wants_no_gradient():
    method, init = _initialise(None, rank=OUT, matrix="kaiming")
    assert method.source_matrix() is None and method.probe_settings() is None
    matrix, bound = _product(method, init.factors), IN**-0.5
    assert bound * 0.99 < matrix.abs().max() < bound * 1.0001
    assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert method.proportional_to_eta() is None
    _, other = _initialise(None, rank=OUT, matrix="kaiming", seed=1)
    assert not torch.allclose(init.factors["R"], other.factors["R"])
    _, other_eta = _initialise(None, rank=OUT, matrix="kaiming", eta=7.0)
    assert torch.equal(init.factors["R"], other_eta.factors["R"])


@pytest.mark.parametrize("std", [1e-5, 1e-2])
def test_noise_changes_the_step_by_its_standard_deviation(std):
    """At full rank nothing is cut off, so the difference is the noise itself."""
    g = _gradient()
    method, init = _noisy(g, std)
    assert method.proportional_to_eta() is None  # the noise does not scale with η
    difference = _product(method, init.factors) + 1e-3 * torch.sign(g).double()
    assert difference.std() == pytest.approx(std, rel=0.03)
    assert abs(difference.mean()) < 0.05 * std
    assert torch.equal(_noisy(g, std)[1].factors["R"], init.factors["R"])
    assert not torch.equal(_noisy(g, std, seed=1)[1].factors["R"], init.factors["R"])


def _noisy(g, std, seed=0):
    method = LoRASB(rank=OUT, init={"noise_std": std, "eta": 1e-3})
    return method, method.initialise(LayerInit((OUT, IN), g, _generator(seed), torch.float32, 1e-3))


def test_defaults_are_the_papers():
    method = LoRASB()
    assert method.scaling == 1.0 and LoRASB(rank=96).scaling == 1.0
    assert (method.init.step, method.init.matrix, method.init.orthonormal, method.init.noise_std) == (
        "adamw",
        "gradient",
        True,
        0,
    )
    assert method.init.samples == 0.001
    assert method.source_matrix() == "gradient" and method.probe_settings() is method.init


@pytest.mark.parametrize(
    "wrong",
    [
        {"eta": 0},
        {"eta": -1e-3},
        {"eta": 0.0},
        {"eta": "find"},
        {"noise_std": 1e-3},  # the default, eta: search, would scale the noise with the step
        {"noise_std": -1.0},
        {"samples": 0},
        {"step": "lion"},
        {"matrix": "weight"},
        {"orthonrmal": True},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(pydantic.ValidationError):
        LoRASB(init=wrong)


@pytest.mark.parametrize(
    "right", [{"eta": "schedule"}, {"eta": 1}, {"eta": 1e-4, "noise_std": 1e-3}, {"samples": 25}], ids=str
)
def test_right_settings_are_taken(right):
    init = LoRASB(init=right).init
    assert {key: getattr(init, key) for key in right} == right


# ---------------------------------------------------------------------- training and size


@pytest.mark.parametrize("alpha", [None, 24.0])
def test_training_equals_a_plain_transcription(alpha):
    """Initialisation and five AdamW steps through the library, and the same in a dozen lines of plain torch,
    float64.
    """
    rate, eta = 1e-3, 1e-3
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT)).double()
    w, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    x, target = _normal(40, IN, seed=8, dtype=torch.float64), _normal(40, OUT, seed=9, dtype=torch.float64)
    probe = w.clone().requires_grad_()
    (torch.nn.functional.linear(x, probe, bias) - target).square().mean().backward()

    # the library
    method = LoRASB(rank=RANK, alpha=alpha)
    init = method.initialise(LayerInit((OUT, IN), probe.grad.float(), _generator(), torch.float32, eta))
    attached = attach(net, method, ["0"])
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False))
    engine.start(net, OptimizerSpec("adamw", rate))
    engine.write(attached.layers["0"], init.factors)
    attached.layers["0"].map_gradients(method.gradient_map(init.factors))
    losses = []
    for _ in range(5):
        loss = (net(x) - target).square().mean()
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()

    # the paper
    s = method.scaling
    u, sigma, vt = torch.linalg.svd(-eta * torch.sign(probe.grad))
    b, a = u[:, :RANK], vt[:RANK]
    core = (torch.diag(sigma[:RANK]) / s).requires_grad_()
    optimizer = torch.optim.AdamW([core], rate, weight_decay=0)
    for expected in losses:
        loss = ((x @ (w + s * b @ core @ a).T + bias) - target).square().mean()
        assert expected == pytest.approx(loss.item(), rel=2e-5)
        (g_r,) = torch.autograd.grad(loss, core)
        core.grad = torch.linalg.inv(b.T @ b) @ g_r @ torch.linalg.inv(a @ a.T) / s**2
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


MISTRAL = {  # (out, in) of one block of Mistral-7B, which has 32
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def _trained_parameters(method, shapes):
    """As the method declares them: the sizes of the factors that train."""
    return sum(
        rows * columns
        for shape in shapes
        for name, (rows, columns) in method.shapes(*shape).items()
        if name in method.trains
    )


@pytest.mark.parametrize(
    ("rank", "millions", "times"), [(64, 0.92, 91.4), (96, 2.06, 40.6), (120, 3.23, 26.0)]
)
def test_far_fewer_trained_parameters_than_lora(rank, millions, times):
    """The paper's Table: LoRA of rank 32 trains 83.88 M parameters of Mistral-7B, LoRA-SB 27 to 90 times
    fewer.
    """
    lora = 32 * _trained_parameters(LoRA(rank=32), MISTRAL.values())
    lora_sb = 32 * _trained_parameters(LoRASB(rank=rank), MISTRAL.values())
    assert lora == 83_886_080 == 32 * lora_parameters(MISTRAL, 32)
    assert lora_sb == 32 * 7 * rank**2 == 32 * _trained_parameters(LoRAXS(rank=rank), MISTRAL.values())
    assert round(lora_sb / 1e6, 2) == millions and round(lora / lora_sb, 1) == times


def test_the_attached_layer_trains_r_squared_parameters():
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.Linear(OUT, IN))
    attach(net, LoRASB(rank=RANK), "all-linear")
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 * RANK**2


@pytest.mark.parametrize(
    "init, start",
    [
        ({"matrix": "kaiming"}, "step"),
        ({"eta": 1e-2, "noise_std": 1e-4}, "zero"),
        ({"orthonormal": False}, "zero"),
    ],
    ids=["kaiming", "noise", "skewed"],
)
def test_restarts_that_make_no_sense_are_refused(init, start):
    with pytest.raises(pydantic.ValidationError, match="recompose"):
        LoRASB(init=init, recompose={"times": 1, "start": start})
