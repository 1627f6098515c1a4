"""LoRA-GA as published: arXiv 2407.05000, and the authors' own code for its initialisation."""

import math

import pytest
import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.maths.low_rank import LowRank
from distlora.methods import LayerInit, recomposing
from distlora.methods.lora_ga import LoRAGA
from distlora.recipe.combination import problem_with_decay

OUT, IN, RANK = 60, 131, 8
SHAPES = [(OUT, IN), (IN, OUT)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_alpha = pytest.mark.parametrize("alpha", [None, 5.0])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _gradient(shape=(OUT, IN), seed=0) -> Tensor:
    """σ_i = 0.8^i between random orthonormal vectors: no two alike, so that every direction is known up to
    its sign.
    """
    generator = torch.Generator().manual_seed(seed)
    least = min(shape)
    u, v = (
        torch.linalg.qr(torch.randn(side, least, generator=generator, dtype=torch.float64)).Q
        for side in shape
    )
    return (0.03 * (u * 0.8 ** torch.arange(least)) @ v.T).float()


def _init(gradient, dtype=torch.float32, seed=0, **fields):
    method = LoRAGA(**{"rank": RANK, **fields})
    return method, method.initialise(
        LayerInit(tuple(gradient.shape), gradient, torch.Generator().manual_seed(seed), dtype)
    )


def _official(grad: Tensor, lora_r: int, stable_gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """A and B as the authors' `lora_ga_init` makes them with `direction="ArB2r"` and `scale="stable"`, in its
    own terms.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        U, S, V = torch.svd_lowrank(grad.float(), q=min(4 * lora_r, min(grad.shape)), niter=4)
    V = V.T
    B = U[:, lora_r : 2 * lora_r]
    A = V[:lora_r, :]
    m, n = grad.shape  # out_features, in_features
    B = B * m**0.25 / stable_gamma**0.5
    A = A * m**0.25 / stable_gamma**0.5
    return A, B


def _product(pair: LowRank) -> Tensor:
    return pair.left.double() @ pair.right.double()


# ---------------------------------------------------------------------- the official formula


@every_shape
@pytest.mark.parametrize("gamma", [16.0, 64.0])
@pytest.mark.parametrize("rank", [1, RANK, 20])  # 4r = 80 directions are more than there are
def test_the_factors_are_the_official_ones(shape, gamma, rank):
    """Up to the signs of singular vectors, which the authors' code leaves to chance."""
    gradient = _gradient(shape)
    _, init = _init(gradient, rank=rank, gamma=gamma)
    a, b = _official(gradient, rank, gamma)
    tolerance = {"rtol": 0, "atol": 1e-3 * shape[0] ** 0.25 / gamma**0.5}
    sign_a = torch.sign((a * init.factors["A"]).sum(1, keepdim=True))
    sign_b = torch.sign((b * init.factors["B"]).sum(0, keepdim=True))
    torch.testing.assert_close(init.factors["A"], sign_a * a, **tolerance)
    torch.testing.assert_close(init.factors["B"], sign_b * b, **tolerance)


@every_shape
def test_the_size_is_that_of_the_outputs_and_gamma(shape):
    """AAᵀ = BᵀB = √out/γ, on the output side for both, whichever side is longer."""
    _, init = _init(_gradient(shape), gamma=9.0)
    expected = torch.eye(RANK) * shape[0] ** 0.5 / 9
    torch.testing.assert_close(init.factors["A"] @ init.factors["A"].T, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(init.factors["B"].T @ init.factors["B"], expected, rtol=0, atol=1e-5)


def test_scaling_is_rank_stabilised():
    assert LoRAGA(rank=8).scaling == 16 / math.sqrt(8)
    assert LoRAGA(rank=9, alpha=6.0).scaling == 2.0
    assert LoRAGA().gamma == 16


def test_a_gradient_of_zero_gives_finite_factors():
    _, init = _init(torch.zeros(OUT, IN))
    assert all(value.isfinite().all() and value.any() for value in init.factors.values())


# ---------------------------------------------------------------------- the function is preserved


@every_alpha
@every_dtype
def test_what_is_taken_from_the_weight_is_what_the_cast_factors_add(alpha, dtype):
    method, init = _init(_gradient(), dtype, alpha=alpha)
    assert all(value.dtype == torch.float32 for value in init.factors.values())
    assert all(torch.equal(value, value.to(dtype).float()) for value in init.factors.values())
    added = _product(method.delta({name: value.to(dtype).float() for name, value in init.factors.items()}))
    assert added.norm() > 1
    assert (added + _product(init.base_update)).abs().max() <= 1e-6 * added.abs().max()


@every_shape
def test_the_layer_answers_as_the_plain_one_does(shape):
    layer, x = _layer(_gradient(shape))
    plain = torch.nn.functional.linear(x, _weight(shape))
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-4)
    assert (layer.weight - _weight(shape)).norm() > 1


def test_the_factors_share_no_memory_with_the_update_of_the_weight():
    """The factors are trained in place; what was subtracted stays."""
    _, init = _init(_gradient())
    kept = _product(init.base_update)
    for value in init.factors.values():
        value.zero_()
    assert torch.equal(_product(init.base_update), kept)


def test_the_gradient_is_asked_for_and_left_alone():
    gradient = _gradient()
    before = gradient.clone()
    _, init = _init(gradient)
    assert LoRAGA().source_matrix() == "gradient" and LoRAGA().probe_settings() is LoRAGA().probe
    assert torch.equal(gradient, before) and init.reserve is None


# ---------------------------------------------------------------------- what it is for: the first step


def _weight(shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) / shape[1] ** 0.5


def _layer(gradient: Tensor, start: LowRank | None = None) -> tuple[AdapterLinear, Tensor]:
    """A layer that starts as the method says, or from another pair taken out of the weight; and inputs."""
    shape = tuple(gradient.shape)
    method, init = _init(gradient)
    b, a = (init.factors["B"], init.factors["A"]) if start is None else (start.left, start.right)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer = AdapterLinear(linear, method, "layer")
    with torch.no_grad():
        layer.weight.copy_(_weight(shape) - method.scaling * b @ a)
        layer.A.copy_(a)
        layer.B.copy_(b)
    layer.weight.requires_grad_(False)
    return layer, torch.randn(17, shape[1], generator=torch.Generator().manual_seed(8))


def _loss(y: Tensor) -> Tensor:
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return (y - target).square().mean()


def _full_gradient(shape) -> Tensor:
    weight = _weight(shape).requires_grad_()
    x = torch.randn(17, shape[1], generator=torch.Generator().manual_seed(8))
    _loss(torch.nn.functional.linear(x, weight)).backward()
    return weight.grad


def _first_update(gradient: Tensor, start: LowRank | None = None) -> Tensor:
    """s·(dB A + B dA) of one step of SGD at rate 1, from the layer's own gradients."""
    layer, x = _layer(gradient, start)
    _loss(layer(x)).backward()
    with torch.no_grad():
        return -layer.method.scaling * (layer.B.grad @ layer.A + layer.B @ layer.A.grad)


def _alignment(update: Tensor, gradient: Tensor) -> float:
    """Cosine between an update and the direction of descent."""
    return float(-(update * gradient).sum() / (update.norm() * gradient.norm()))


def _random_pair(shape, seed: int) -> LowRank:
    """Orthonormal columns and rows, at the method's own size."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[0] ** 0.25 / 4
    b, a = (torch.linalg.qr(torch.randn(side, RANK, generator=generator)).Q for side in shape)
    return LowRank(size * b, size * a.T)


@every_shape
def test_the_first_step_follows_the_gradient_better_than_from_random_factors(shape):
    gradient = _full_gradient(shape)
    mine = _alignment(_first_update(gradient), gradient)
    random = [_alignment(_first_update(gradient, _random_pair(shape, seed)), gradient) for seed in range(10)]
    assert 0.3 < max(random) < 0.8 < 0.99 < mine


@every_shape
def test_the_first_step_is_the_best_copy_of_the_gradient_of_rank_2r(shape):
    """Theorem 3.1: −s²·(√out/γ) times the leading 2r triplets of g. Hence its alignment, which is reported as
    captured energy.
    """
    gradient = _full_gradient(shape)
    method, init = _init(gradient)
    u, s, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    best = (u[:, : 2 * RANK] * s[: 2 * RANK]) @ vt[: 2 * RANK]
    update = _first_update(gradient)
    factor = method.scaling**2 * shape[0] ** 0.5 / 16
    torch.testing.assert_close(
        update.double(), -factor * best, rtol=0, atol=1e-4 * float(factor * best.abs().max())
    )
    assert _alignment(update, gradient) ** 2 == pytest.approx(init.report["captured_energy"], rel=1e-4)


# ---------------------------------------------------------------------- settings


def test_a_rank_above_half_the_smaller_side_is_refused():
    for shape in SHAPES:
        assert LoRAGA(rank=30).problem_with(*shape) is None
        assert LoRAGA(rank=31).problem_with(*shape) == (
            "rank 31 takes 2·rank = 62 singular directions of the gradient, above min(out, in) = 60; "
            "lower method.rank"
        )


def test_weight_decay_is_refused_unless_asked_for_by_name():
    problem = problem_with_decay(LoRAGA(), 0.01)
    assert problem == (
        "train.weight_decay=0.01 shrinks factors whose start was taken out of the weight under lora_ga: "
        "set it to 0, or method.decay_pretrained to true"
    )
    assert problem_with_decay(LoRAGA(), 0.0) is None
    assert problem_with_decay(LoRAGA(decay_pretrained=True), 0.01) is None


def test_the_probe_has_no_first_step():
    assert LoRAGA().probe_settings().eta is None
    assert LoRAGA(probe={"samples": 12}).probe.samples == 12
    with pytest.raises(ValueError, match="eta"):
        LoRAGA(probe={"eta": 1e-3})


def test_nothing_is_replaced():
    assert recomposing(LoRAGA()) is None and LoRAGA().proportional_to_eta() is None
