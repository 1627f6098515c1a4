"""rsLoRA as published: arXiv 2312.03732."""

import pytest
import torch

from distlora.methods import LayerInit
from distlora.methods.lora import LoRA
from distlora.methods.rslora import RSLoRA


@pytest.mark.parametrize(
    ("rank", "alpha", "scaling"), [(16, 8, 2.0), (4, 8, 4.0), (16, None, 4.0), (64, None, 2.0)]
)
def test_scaling_is_alpha_over_the_root_of_the_rank(rank, alpha, scaling):
    assert RSLoRA(rank=rank, alpha=alpha).scaling == scaling


def test_the_factors_are_loras():
    ours, loras = (
        method.initialise(LayerInit((60, 131), None, torch.Generator().manual_seed(0)))
        for method in (RSLoRA(), LoRA())
    )
    assert all(torch.equal(ours.factors[name], loras.factors[name]) for name in ("A", "B"))
    assert ours.base_update is None and RSLoRA.zero_gradient_at_start == ("A",)


def test_the_first_step_is_of_one_size_at_every_rank():
    """With B = 0 a step of SGD on an input x, g = dy xᵀ, changes the answer to x by s²·‖A x‖²·dy, and ‖A x‖²
    grows as the rank.

    So s ∝ 1/√r keeps it, and s ∝ 1/r lets it shrink as 1/r.
    """
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))

    def change(method):
        a = method.initialise(LayerInit((60, 1000), None, torch.Generator().manual_seed(2))).factors["A"]
        return method.scaling**2 * float((a @ x).square().sum())

    assert change(RSLoRA(rank=512)) == pytest.approx(change(RSLoRA(rank=32)), rel=0.3)
    assert change(LoRA(rank=512, alpha=16)) < change(LoRA(rank=32, alpha=16)) / 10
