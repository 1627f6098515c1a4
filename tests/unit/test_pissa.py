"""PiSSA as published: arXiv 2404.02948."""

import pytest
import torch

from distlora.maths.linalg import captured_energy
from distlora.methods import LayerInit, Recomposes, probe_of, recomposing
from distlora.methods.pissa import PiSSA
from distlora.recipe.combination import problem_with_decay

OUT, IN, RANK = 60, 131, 8
SHAPES = [(OUT, IN), (IN, OUT)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_alpha = pytest.mark.parametrize("alpha", [None, 20.0])


def _weight(shape=(OUT, IN), seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def _init(weight, dtype=torch.float32, seed=0, **fields):
    method = PiSSA(**{"rank": RANK, **fields})
    return method, method.initialise(
        LayerInit(tuple(weight.shape), weight, torch.Generator().manual_seed(seed), dtype)
    )


def _svd(weight):
    return torch.linalg.svd(weight.double(), full_matrices=False)


def _product(pair):
    return pair.left.double() @ pair.right.double()


@every_shape
@every_alpha
def test_the_adapter_is_the_best_rank_r_copy_of_the_weight(shape, alpha):
    """Eckart–Young: the frozen residual has the norm of the remaining singular values."""
    weight = _weight(shape)
    method, init = _init(weight, alpha=alpha)
    u, s, vt = _svd(weight)
    update = _product(method.delta(init.factors))
    torch.testing.assert_close(update, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], rtol=0, atol=1e-5)
    residual = weight.double() + _product(init.base_update)
    assert residual.norm() == pytest.approx(float(s[RANK:].norm()), rel=1e-6)


@every_shape
@every_alpha
def test_each_factor_carries_half_of_the_singular_values(shape, alpha):
    """BᵀB = AAᵀ = diag(σ/s)."""
    weight = _weight(shape)
    method, init = _init(weight, alpha=alpha)
    expected = torch.diag(_svd(weight)[1][:RANK].float() / method.scaling)
    torch.testing.assert_close(init.factors["B"].T @ init.factors["B"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(init.factors["A"] @ init.factors["A"].T, expected, rtol=1e-4, atol=1e-5)


@every_alpha
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_taken_from_the_weight_is_what_the_cast_factors_add(alpha, dtype):
    """Cast first: the pairs cancel to float32, not to bfloat16's 1e-2."""
    weight = _weight()
    method, init = _init(weight, dtype, alpha=alpha)
    assert all(value.dtype == torch.float32 for value in init.factors.values())
    assert all(torch.equal(value, value.to(dtype).float()) for value in init.factors.values())
    assert init.base_update.left.dtype == init.base_update.right.dtype == torch.float32
    added = _product(method.delta({name: value.to(dtype).float() for name, value in init.factors.items()}))
    assert (added + _product(init.base_update)).abs().max() <= 1e-7 * weight.abs().max()
    assert added.norm() > 0.1 * weight.norm()


def test_alpha_is_the_rank_by_default():
    assert PiSSA(rank=7).scaling == 1.0
    assert PiSSA(rank=8, alpha=20.0).scaling == 2.5


def test_the_weight_is_asked_for_and_left_alone():
    weight = _weight()
    before = weight.clone()
    _, init = _init(weight)
    assert PiSSA().source_matrix() == "weight" and probe_of(PiSSA()) is None
    assert torch.equal(weight, before) and init.reserve is None


def test_the_factors_share_no_memory_with_the_update_of_the_weight():
    """The factors are trained in place; what was subtracted stays."""
    method, init = _init(_weight())
    kept = _product(init.base_update)
    for value in init.factors.values():
        value.zero_()
    assert torch.equal(_product(init.base_update), kept)


def test_captured_energy_is_reported():
    weight = _weight()
    _, init = _init(weight)
    assert init.report == {
        "captured_energy": pytest.approx(
            captured_energy(weight, torch.linalg.svdvals(weight)[:RANK]), rel=1e-5
        )
    }


def test_nothing_is_replaced():
    assert recomposing(PiSSA()) is None and not isinstance(PiSSA(), Recomposes)


# ---------------------------------------------------------------------- weight decay


def test_weight_decay_is_refused_unless_asked_for_by_name():
    problem = problem_with_decay(PiSSA(), 0.01)
    assert problem == (
        "train.weight_decay=0.01 decays pretrained directions under pissa: set it to 0, "
        "or method.decay_pretrained to true"
    )
    assert problem_with_decay(PiSSA(), 0.0) is None
    assert problem_with_decay(PiSSA(decay_pretrained=True), 0.01) is None


def test_the_initial_factors_equal_pefts():
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    weight = net[0].weight.detach().clone()
    method, init = _init(weight, alpha=12.0)
    config = peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(net, config).base_model.model[0]
    mine = _product(method.delta(init.factors)).float()
    torch.testing.assert_close(theirs.get_delta_weight("default").detach(), mine, rtol=0, atol=1e-5)
    residual = weight + init.base_update.left @ init.base_update.right
    torch.testing.assert_close(theirs.base_layer.weight.detach(), residual, rtol=0, atol=1e-5)
    b = theirs.lora_B.default.weight.detach()
    torch.testing.assert_close(b.T @ b, init.factors["B"].T @ init.factors["B"], rtol=1e-4, atol=1e-5)
