"""Compression of a pair: the best of its rank, with the very error that its numbers have."""

import pytest
import torch

from distlora.maths import low_rank
from distlora.maths.low_rank import LowRank, compress, compress_within

DTYPES = [torch.float32, torch.bfloat16]


def pair_of(rank=9, out=31, in_features=23, decay=0.6, seed=0):
    """A pair whose components fall off by `decay`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = decay ** torch.arange(rank)
    return LowRank(
        torch.randn(out, rank, generator=generator) * sizes,
        torch.randn(rank, in_features, generator=generator),
    )


def stack(change):
    """A pair and the same less `change` of it, side by side: what training leaves of factors that began as a
    part of W.
    """
    old, step = pair_of(), pair_of(seed=1)
    new = LowRank(old.left + change * step.left, old.right + change * step.right)
    return LowRank(torch.cat([new.left, -old.left], 1), torch.cat([new.right, old.right], 0))


def matrix(pair):
    return pair.left.double() @ pair.right.double()


def true_error(found, pair):
    return float((matrix(found) - matrix(pair)).norm() / matrix(pair).norm())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_best_of_its_rank(rank):
    pair = pair_of()
    found, error = compress(pair, rank)
    assert found.left.shape == (31, rank) and found.right.shape == (rank, 23)
    sigma = torch.linalg.svdvals(matrix(pair))
    assert error == pytest.approx(float(sigma[rank:9].norm() / sigma.norm()), rel=1e-4, abs=3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("rank", [2, 7, 18])
def test_the_error_is_that_of_the_numbers_returned(rank, change, dtype):
    pair = stack(change)
    found, error = compress(pair, rank, dtype)
    assert found.left.dtype == found.right.dtype == dtype
    assert error == pytest.approx(true_error(found, pair), rel=1e-3, abs=2e-7)


def test_both_sides_carry_the_same(rank=3):
    found, _ = compress(pair_of(decay=0.1), rank)
    assert torch.allclose(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-5)


def test_what_cancels_survives_low_precision_only_when_it_was_summed_first():
    pair = stack(1e-2)
    rounded = LowRank(pair.left.bfloat16(), pair.right.bfloat16())
    assert true_error(rounded, pair) > 0.1
    found, error = compress(pair, 18, torch.bfloat16)
    assert true_error(found, pair) == pytest.approx(error, rel=1e-3) and error < 5e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_error", [0.9, 0.3, 0.05, 0.01])
def test_the_smallest_rank_that_meets_the_bound(max_error, dtype):
    pair = pair_of(rank=14)
    found, error = compress_within(pair, max_error, dtype)
    rank = found.right.shape[0]
    assert error == pytest.approx(true_error(found, pair), rel=1e-3) and error <= max_error
    assert rank == 1 or true_error(compress(pair, rank - 1, dtype)[0], pair) > max_error
    assert compress(pair, rank, dtype)[1] == error


def test_rounding_counts():
    """A bound that the exact numbers of some rank just meet needs one more where rounding spends the rest of
    it.
    """
    pair = pair_of(rank=14, decay=0.8)
    bound = compress(pair, 10)[1] * (1 + 1e-4)
    assert compress_within(pair, bound)[0].right.shape[0] == 10
    assert compress_within(pair, bound, torch.bfloat16)[0].right.shape[0] == 11


@pytest.mark.parametrize("max_error", [1e-5, 2.7e-3, 2.8e-3, 2.9e-3, 3.2e-3, 0.01, 0.5])
def test_few_ranks_are_tried(max_error, monkeypatch):
    """Each costs two decompositions of the stack. Bounds from below what rounding costs at full rank to far
    above it.
    """
    tried, cut = [], low_rank._cut
    monkeypatch.setattr(
        low_rank, "_cut", lambda triplets, rank, dtype: (tried.append(rank), cut(triplets, rank, dtype))[1]
    )
    pair = pair_of(rank=200, out=230, in_features=210, decay=0.97)
    found, error = compress_within(pair, max_error, torch.bfloat16)
    rank, tries = found.right.shape[0], len(tried)
    assert tries <= 2 + 8 and (error <= max_error or rank == 200)
    assert rank == 1 or compress(pair, rank - 1, torch.bfloat16)[1] > max_error


def test_a_bound_below_the_rounding_cannot_be_met():
    found, error = compress_within(pair_of(), 1e-5, torch.bfloat16)
    assert found.right.shape[0] == 9 and 1e-3 < error < 1e-2


def test_a_stack_wider_than_the_matrix():
    pair = pair_of(rank=40, decay=1.0)
    found, error = compress(pair, 40)
    assert found.right.shape == (23, 23) and true_error(found, pair) < 5e-7 and error < 5e-7


def test_an_update_of_zero():
    nothing = LowRank(torch.zeros(7, 3), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    for found, error in (compress(nothing, 2), compress_within(nothing, 0.5)):
        assert error == 0.0 and not matrix(found).any() and found.right.shape[0] in (1, 2)
