"""LoRA-XS as published: arXiv 2405.17604."""

import pytest
import torch

from distlora.adapter.layer import AdapterLinear
from distlora.maths.linalg import captured_energy
from distlora.methods import CorrectsGradients, LayerInit, probe_of
from distlora.methods.lora_xs import LoRAXS

OUT, IN, RANK = 60, 131, 8


def _weight(out=OUT, inner=IN, seed=0):
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(seed)) / inner**0.5


def _init(weight, rank=RANK, seed=0):
    return LoRAXS(rank=rank).initialise(
        LayerInit(tuple(weight.shape), weight, torch.Generator().manual_seed(seed))
    )


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=str)
def test_the_frozen_factors_are_the_best_rank_r_copy_of_the_weight(shape):
    weight = _weight(*shape)
    factors = _init(weight).factors
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    torch.testing.assert_close(factors["B"] @ factors["A"], best.float(), rtol=0, atol=1e-5)


def test_the_singular_values_stand_on_the_input_side():
    weight = _weight()
    factors = _init(weight).factors
    s = torch.linalg.svdvals(weight)[:RANK]
    torch.testing.assert_close(factors["B"].T @ factors["B"], torch.eye(RANK), rtol=0, atol=1e-5)
    torch.testing.assert_close(factors["A"] @ factors["A"].T, torch.diag(s.square()), rtol=1e-4, atol=1e-5)


def test_the_core_starts_as_noise_of_1e_minus_5():
    core = _init(_weight(), rank=60).factors["R"]
    assert core.std() == pytest.approx(1e-5, rel=0.05)
    assert abs(core.mean()) < 1e-6
    assert not torch.equal(core, _init(_weight(), rank=60, seed=1).factors["R"])


def test_captured_energy_is_reported():
    weight = _weight()
    reported = _init(weight).report["captured_energy"]
    assert reported == pytest.approx(captured_energy(weight, torch.linalg.svdvals(weight)[:RANK]), rel=1e-5)
    assert 0 < reported < 1


def test_the_weight_is_asked_for_and_no_probe():
    assert LoRAXS().source_matrix() == "weight"
    assert probe_of(LoRAXS()) is None


@pytest.mark.parametrize("alpha", [None, 20.0])
def test_the_core_gets_the_plain_gradient(alpha):
    """g_R = s·Bᵀ g Aᵀ, uncorrected: the correction is LoRA-SB's."""
    method = LoRAXS(rank=RANK, alpha=alpha)
    layer = AdapterLinear(torch.nn.Linear(IN, OUT), method, "layer")
    factors = _init(layer.weight.detach()).factors
    with torch.no_grad():
        for name, value in factors.items():
            getattr(layer, name).copy_(value)
    assert not isinstance(method, CorrectsGradients)
    generator = torch.Generator().manual_seed(5)
    x, dy = torch.randn(9, IN, generator=generator), torch.randn(9, OUT, generator=generator)
    layer(x).backward(dy)
    torch.testing.assert_close(
        layer.R.grad, method.scaling * factors["B"].T @ (dy.T @ x) @ factors["A"].T, rtol=1e-3, atol=1e-3
    )
