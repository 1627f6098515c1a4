"""Rounding to a stored dtype: unbiased where it is stochastic, and the same bits on every shard."""

import pytest
import torch

from distlora.maths import rounding
from distlora.maths.rounding import rounded, rounding_key

KEY = rounding_key(42, "layers.0.q", 1)
WORD = (1 << 64) - 1


def _normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def _stochastic(exact, key=KEY, first=0):
    return rounded(exact, torch.bfloat16, "stochastic", key, first)


def _splitmix64(key: int, position: int) -> int:
    """Number `position` (from 0) of the sequence that starts from `key`, in Python's integers (Steele, Lea &
    Flood, Fig. 13).
    """
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def _neighbours(exact):
    """The bfloat16 values next to each number, towards zero and away from it, as float32."""
    bits = exact.view(torch.int32) & -65536
    return bits.view(torch.float32), (bits + 65536).view(torch.float32)


# ---------------------------------------------------------------------- the drawn bits


@pytest.mark.parametrize("key", [0, 1, KEY, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 12345, 2**40])
def test_the_bits_are_splitmix64s(key, first):
    expected = [_splitmix64(key, first + i) >> 48 for i in range(20)]
    assert rounding._random_bits(key, first, 20, torch.device("cpu")).tolist() == expected


def test_the_bits_are_uniform_in_every_position_and_independent_of_their_neighbours():
    count = 1 << 18
    drawn = rounding._random_bits(KEY, 0, count, torch.device("cpu"))
    assert drawn.min() >= 0 and drawn.max() < 1 << 16
    bits = (drawn[:, None] >> torch.arange(16)) & 1
    five_sigma = 2.5 / count**0.5
    assert (bits.double().mean(0) - 0.5).abs().max() < five_sigma
    for lag in (1, 2, 64, 576):  # along a row, and down a column
        assert ((bits[lag:] == bits[:-lag]).double().mean(0) - 0.5).abs().max() < five_sigma * 1.01


# ---------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-39], ids=["1", "1e-30", "1e30", "subnormal"])
def test_the_result_is_one_of_the_two_neighbours(scale):
    exact = _normal(10_000) * scale
    result = _stochastic(exact)
    inner, outer = _neighbours(exact)
    up = result.float() == outer
    assert result.dtype == torch.bfloat16
    assert (up | (result.float() == inner)).all()
    assert 0.4 < up.double().mean() < 0.6


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_right_on_average(fraction, sign):
    """1 + f/128 lies between 1 and 1 + 1/128, the next number of bfloat16."""
    count = 1 << 18
    exact = torch.full((count,), sign * (1 + fraction / 128))
    ups = ((_stochastic(exact).double() * sign - 1) * 128).mean()
    assert abs(ups - fraction) < 5 * (fraction * (1 - fraction) / count) ** 0.5 + 2**-16


def test_small_updates_add_up_where_nearest_loses_them_all():
    weight = torch.ones(4096)
    nearest, stochastic = weight.bfloat16(), weight.bfloat16()
    for number in range(100):
        nearest = rounded(nearest.float() + 1e-4, torch.bfloat16, "nearest", 0, 0)
        stochastic = _stochastic(stochastic.float() + 1e-4, rounding_key(0, "layer", number))
    assert torch.equal(nearest.float(), weight)
    assert stochastic.double().mean() == pytest.approx(1.01, abs=5e-4)


def test_its_error_is_root_two_times_that_of_nearest():
    exact = _normal(100_000)
    errors = [
        (rounded(exact, torch.bfloat16, how, KEY, 0).float() - exact).norm()
        for how in ("stochastic", "nearest")
    ]
    assert errors[0] / errors[1] == pytest.approx(2**0.5, rel=0.01)


@pytest.mark.parametrize("cuts", [[1], [7, 7, 500], [131, 999], [1000], [0, 1000]])
@pytest.mark.parametrize("block", [1 << 20, 64])
def test_it_does_not_depend_on_how_the_matrix_is_cut(cuts, block, monkeypatch):
    exact = _normal(1000)
    whole = _stochastic(exact, first=70)
    monkeypatch.setattr(rounding, "ROUNDING_ELEMENTS", block)
    edges = [0, *cuts, 1000]
    pieces = [_stochastic(exact[a:b], first=70 + a) for a, b in zip(edges, edges[1:])]
    assert torch.equal(torch.cat(pieces), whole)


def test_the_position_in_the_matrix_matters():
    assert not torch.equal(_stochastic(_normal(1000), first=0), _stochastic(_normal(1000), first=1))


def test_it_draws_the_same_again_and_touches_neither_the_input_nor_global_state():
    exact = _normal(1000)
    before, state = exact.clone(), torch.get_rng_state()
    assert torch.equal(_stochastic(exact), _stochastic(exact))
    assert torch.equal(exact, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "other", [(43, "layers.0.q", 1), (42, "layers.0.k", 1), (42, "layers.0.q", 2)], ids=str
)
def test_another_seed_layer_or_write_draws_other_bits(other):
    assert rounding_key(*other) != KEY
    exact = torch.full((4096,), 1 + 0.5 / 128)
    same = (_stochastic(exact) == _stochastic(exact, rounding_key(*other))).double().mean()
    assert same == pytest.approx(0.5, abs=0.04)  # independent coins agree half of the time


def test_keys_are_of_63_bits_and_their_parts_do_not_run_together():
    keys = {
        rounding_key(seed, layer, number)
        for seed in (1, 11)
        for layer in ("a", "a1", "1a")
        for number in range(1, 112)
    }
    assert len(keys) == 2 * 3 * 111
    assert all(0 <= key < 1 << 63 for key in keys) and max(keys) > 1 << 62
    assert rounding_key(42, "a", 1) == rounding_key(42, "a", 1)


# ---------------------------------------------------------------------- both roundings


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_what_bfloat16_can_hold_stays_what_it_is(how):
    exact = torch.cat(
        [_normal(5000).bfloat16().float(), torch.tensor([0.0, -0.0, 3.38e38]).bfloat16().float()]
    )
    result = rounded(exact, torch.bfloat16, how, KEY, 0)
    assert torch.equal(result.float().view(torch.int32), exact.view(torch.int32))


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_infinities_and_nan_stay_what_they_are(how):
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(
        torch.float32
    )  # NaNs in the bits that are cut
    exact = torch.cat([torch.tensor([float("inf"), -float("inf"), float("nan")]), payloads]).repeat(100)
    result = rounded(exact, torch.bfloat16, how, KEY, 0).float()
    torch.testing.assert_close(result, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_float32_is_returned_as_it_is(how):
    exact = _normal(10)
    assert rounded(exact, torch.float32, how, KEY, 0) is exact


def test_nearest_is_torchs_cast():
    exact = _normal(1000)
    assert torch.equal(rounded(exact, torch.bfloat16, "nearest", KEY, 3), exact.bfloat16())
    assert torch.equal(rounded(exact, torch.float16, "nearest", KEY, 3), exact.half())


def test_stochastic_rounding_to_another_dtype_is_refused():
    with pytest.raises(ValueError, match="float16"):
        rounded(_normal(4), torch.float16, "stochastic", KEY, 0)
