"""Adam after a recomposition: replaced components get the bias correction of their own age.

The optimizer counts the steps of a whole tensor. A component whose moments begin at zero when this count t is
large would be corrected by 1 − β₂^t ≈ 1, and its updates would be 2 to 6.6 times the learning rate.
"""

import functools

import torch
from torch import Tensor

#: Steps after a recomposition in which `own_age` acts. Then the optimizer's own correction is good enough.
AGE_LIMIT = 100


@torch.no_grad()
def own_age(exp_avg_sq: Tensor, gradient: Tensor, ages: Tensor, step: int, beta2: float) -> None:
    """Changes Adam's second moments v in place, just before step t, so that the optimizer's own step divides
    by what a new Adam would: `v_k/(1−β₂^k)` for an element of age k.

    exp_avg_sq, gradient: (n,) float32, any part of a factor; the gradient as the optimizer will use it
    (averaged, clipped). ages: (n,) int64; k = 1 if the element's next step is its first one after it was
    replaced, 0 if it was never replaced. step: t ≥ 2, the number of the next step. Elements with k = 0 or
    k > AGE_LIMIT do not change, bit for bit.

        a = (1−β₂)/(1−β₂^k),  C_t = 1 − β₂^t
        v ← [C_t·(1−a)/C_{t−1}·v + (C_t·a − (1−β₂))·g²] / β₂            (k = 1: v ← C_{t−1}·g²)

    Adam then makes of it `β₂v + (1−β₂)g² = C_t·[(1−a)·v_old/C_{t−1} + a·g²]` and divides by C_t. This is a
    running mean whose first value is the first g².
    """
    if step < 2:
        raise ValueError(f"step {step} cannot come after a recomposition: the first possible one is 2")
    if beta2 == 0:
        return  # v is g² at every age
    device = exp_avg_sq.device  # the host, where the optimizer is offloaded
    # Each element looks up its age in a table; age 0 stands for "no change".
    index = ages.where(ages <= AGE_LIMIT, 0).to(device)
    keep, gain = (
        torch.tensor(table, dtype=exp_avg_sq.dtype, device=device)[index]
        for table in _coefficients(step, beta2)
    )
    squared = gradient.to(device, exp_avg_sq.dtype).square()
    exp_avg_sq.copy_(keep.mul_(exp_avg_sq).addcmul_(gain, squared).where(index > 0, exp_avg_sq))


@functools.lru_cache(maxsize=1)  # the same for all factors of a step
def _coefficients(step: int, beta2: float) -> tuple[list[float], list[float]]:
    """The factors of v and of g² for ages 0 … AGE_LIMIT.

    They are differences of nearly equal numbers, so they are computed in double precision.
    """
    now, last = 1 - beta2**step, 1 - beta2 ** (step - 1)
    keep, gain = [1.0], [0.0]
    for age in range(1, AGE_LIMIT + 1):
        share = (1 - beta2) / (1 - beta2**age)
        keep.append(now * (1 - share) / (last * beta2))
        gain.append((now * share - (1 - beta2)) / beta2)
    return keep, gain
