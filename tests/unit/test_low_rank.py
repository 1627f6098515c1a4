"""W ← round(W + left @ right) on any piece of W: against float64, and on every cut."""

import pytest
import torch

from distlora.maths import low_rank
from distlora.maths.low_rank import LowRank, add_low_rank
from distlora.maths.rounding import rounding_key

OUT, IN, RANK = 29, 23, 5
KEY = rounding_key(3, "layer", 1)
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
BOTH = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
#: Pieces that begin and end inside rows, at their ends, hold several rows, a part of one, one element, and
#: nothing.
CUTS = [0, 7, 23, 23, 24, 100, 345, 346, 600, OUT * IN]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _weight(dtype=FP32, seed=0):
    return (torch.randn(OUT, IN, generator=_generator(seed)) / 4).to(dtype)


def _update(seed=1, scale=0.3):
    left, right = (
        torch.randn(OUT, RANK, generator=_generator(seed)),
        torch.randn(RANK, IN, generator=_generator(seed + 50)),
    )
    return LowRank(scale * left, right)


def _exact_numbers(dtype):
    """W and an update of which every sum is a float32 number, in whatever order it is formed; bfloat16 holds
    few of them.
    """
    left, right = (
        torch.randint(-9, 10, shape, generator=_generator(7)).float() for shape in ((OUT, RANK), (RANK, IN))
    )
    weight = torch.randint(-99, 100, (OUT, IN), generator=_generator(8)) / 64
    return weight.to(dtype), LowRank(left / 1024, right)


def _added(weight, update, rounding="nearest", key=KEY, cuts=(0, OUT * IN)):
    """(W after, squared error) where W is changed a piece at a time."""
    flat, error = weight.clone().view(-1), 0.0
    for start, end in zip(cuts, cuts[1:]):
        error += add_low_rank(flat[start:end], start, update, rounding, key, CPU)
    return flat.view(OUT, IN), error


@BOTH
@ROUNDINGS
@pytest.mark.parametrize("cuts", [(0, OUT * IN), CUTS], ids=["whole", "pieces"])
def test_the_sum_is_that_of_float64(cuts, rounding, dtype):
    """In float32 to its precision, in bfloat16 to half a unit in the last place, or a whole one where draws
    decide.
    """
    weight, update = _weight(dtype), _update()
    found, _ = _added(weight, update, rounding, cuts=cuts)
    wanted = weight.double() + update.left.double() @ update.right.double()
    ulp = 2.0**-23 if dtype == FP32 else 2.0**-8 if rounding == "nearest" else 2.0**-7
    assert found.dtype == dtype
    assert ((found.double() - wanted).abs() <= ulp * wanted.abs() * 1.001 + 1e-6).all()
    assert not torch.equal(found, weight)


@BOTH
@ROUNDINGS
def test_every_cut_gives_the_same_bits(rounding, dtype):
    weight, update = _exact_numbers(dtype)
    whole, _ = _added(weight, update, rounding)
    for cuts in (CUTS, range(OUT * IN + 1), range(0, OUT * IN + 1, IN)):
        assert torch.equal(_added(weight, update, rounding, cuts=cuts)[0], whole)
    if dtype == BF16:  # or all of this would only be about sums that need no rounding
        assert (weight.float() + update.left @ update.right != whole.float()).float().mean() > 0.5


@pytest.mark.parametrize("elements", [1, 2 * IN, 5 * IN + 3, 1 << 22])
@pytest.mark.parametrize("cuts", [(0, OUT * IN), CUTS], ids=["whole", "pieces"])
def test_blocks_change_nothing(cuts, elements, monkeypatch):
    weight, update = _exact_numbers(BF16)
    wanted = (weight.float() + update.left @ update.right).bfloat16()
    monkeypatch.setattr(low_rank, "SUM_ELEMENTS", elements)
    assert torch.equal(_added(weight, update, cuts=cuts)[0], wanted)


def test_no_block_is_larger_than_its_limit(monkeypatch):
    sizes = []

    def spy(exact, *rest):
        sizes.append(exact.numel())
        return rounded(exact, *rest)

    rounded = low_rank.rounded
    monkeypatch.setattr(low_rank, "rounded", spy)
    monkeypatch.setattr(low_rank, "SUM_ELEMENTS", 3 * IN)
    _added(_weight(), _update(), cuts=(5, OUT * IN))
    assert sum(sizes) == OUT * IN - 5 and max(sizes) <= 3 * IN


def test_only_the_part_is_changed():
    weight, update = _weight(), _update()
    flat = weight.clone().view(-1)
    add_low_rank(flat[30:100], 30, update, "nearest", KEY, CPU)
    changed = flat != weight.view(-1)
    assert changed[30:100].all() and not changed[:30].any() and not changed[100:].any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_error_is_what_rounding_took(rounding):
    weight, update = _weight(BF16), _update()
    found, error = _added(weight, update, rounding)
    wanted = weight.double() + update.left.double() @ update.right.double()
    assert error == pytest.approx(float((found.double() - wanted).square().sum()), rel=1e-3)
    assert error > 0
    assert _added(weight, update, rounding, cuts=CUTS)[1] == pytest.approx(error, rel=1e-3)


def test_in_float32_nothing_is_lost():
    assert _added(_weight(), _update())[1] == 0.0


def test_stochastic_rounding_draws_by_key_and_is_right_on_average():
    weight, update = _weight(BF16), _update(scale=0.001)
    wanted = weight.double() + update.left.double() @ update.right.double()
    tries = [_added(weight, update, "stochastic", key=rounding_key(3, "layer", n))[0] for n in range(300)]
    assert not torch.equal(tries[0], tries[1])
    assert torch.equal(tries[0], _added(weight, update, "stochastic", key=rounding_key(3, "layer", 0))[0])
    nearest, _ = _added(weight, update)
    mean = torch.stack(tries).double().mean(0)
    assert (mean - wanted).norm() < 0.2 * (nearest.double() - wanted).norm()


def test_a_pair_of_lower_dtype_is_added_in_float32():
    update = _update()
    low = LowRank(update.left.bfloat16(), update.right.bfloat16())
    high = LowRank(low.left.float(), low.right.float())
    assert torch.equal(_added(_weight(), low)[0], _added(_weight(), high)[0])


def test_no_gradient_is_recorded():
    weight = torch.nn.Parameter(_weight(), requires_grad=False)
    update = _update()
    update.left.requires_grad_()
    add_low_rank(weight.view(-1), 0, update, "nearest", KEY, CPU)
    assert weight.grad_fn is None and not weight.requires_grad
