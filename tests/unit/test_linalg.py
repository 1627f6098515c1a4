"""Singular values of matrices and of low-rank pairs, norms and Gram inverse, on the matrices that training
produces.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.maths import linalg
from distlora.maths.linalg import (
    captured_energy,
    effective_rank,
    factorised,
    gram_inverse,
    gram_spectrum,
    low_rank_norm,
    product_singular_values,
    row_norms,
    solve_sylvester,
    truncated_svd,
    with_row_norms,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=_generator(seed))


def _low_rank(out, inner, rank, seed=0):
    return _normal(out, rank, seed=seed) @ _normal(rank, inner, seed=seed + 1)


def _assert_triplets(matrix, rank, u, s, vt, tolerance=1e-4):
    """Orthonormal factors, descending values, and `M v = σ u`."""
    identity = torch.eye(rank)
    assert (u.shape, s.shape, vt.shape) == ((matrix.shape[0], rank), (rank,), (rank, matrix.shape[1]))
    assert {u.dtype, s.dtype, vt.dtype} == {torch.float32}
    assert (u.T @ u - identity).abs().max() < 1e-5
    assert (vt @ vt.T - identity).abs().max() < 1e-5
    assert (s.diff() <= 0).all() and (s >= 0).all()
    if s[0] > 0:
        assert (matrix @ vt.T - u * s).norm() <= tolerance * s[0] * rank**0.5


@pytest.fixture
def always_iterate(monkeypatch):
    """Takes the iterative path for small matrices too."""
    monkeypatch.setattr(linalg, "EXACT_SIDE", 0)


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("shape", [(60, 131), (131, 60), (64, 64)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 60])
def test_exact_path(shape, rank):
    matrix = _normal(*shape)
    u, s, vt = truncated_svd(matrix, rank, _generator())
    _assert_triplets(matrix, rank, u, s, vt)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix.double())[:rank].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("iterate", [False, True])
def test_signs_are_fixed_by_the_largest_entry_of_u(iterate, monkeypatch):
    if iterate:
        monkeypatch.setattr(linalg, "EXACT_SIDE", 0)
    matrix = _low_rank(60, 131, rank=8)
    for candidate in (matrix, -matrix):
        u, s, vt = truncated_svd(candidate, 8, _generator())
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
        torch.testing.assert_close((u * s) @ vt, _best(candidate, 8), rtol=0, atol=1e-3)


def _best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).float()


def test_bfloat16_input_is_factorised_in_float32():
    matrix = _normal(60, 131).bfloat16()
    u, s, vt = truncated_svd(matrix, 8, _generator())
    _assert_triplets(matrix.float(), 8, u, s, vt)


# ---------------------------------------------------------------------- iterative


def test_the_iterative_path_captures_the_energy_of_a_flat_spectrum():
    """sign(G) is the hard case: two or four passes of the customary randomised SVD lose about 1 %."""
    matrix = torch.sign(_normal(1100, 1200) + 0.05 * _low_rank(1100, 1200, 4))
    u, s, vt = truncated_svd(matrix, 16, _generator())
    _assert_triplets(
        matrix, 16, u, s, vt, tolerance=0.2
    )  # single directions of a flat spectrum are ill-defined ...
    exact = torch.linalg.svdvals(matrix)[:16].square().sum()
    captured = ((u.T @ matrix) @ vt.T).diagonal().square().sum()
    for energy in (s.square().sum(), captured):  # ... but not their energy
        assert 1 - 1e-4 < energy / exact < 1 + 1e-5


def test_large_matrices_take_the_iterative_path_and_small_ones_do_not(monkeypatch):
    taken = []
    original = linalg._subspace_svd
    monkeypatch.setattr(linalg, "_subspace_svd", lambda *args: taken.append(args[0].shape) or original(*args))
    truncated_svd(_normal(60, 131), 4, _generator())
    assert taken == []
    truncated_svd(_low_rank(1100, 1030, 6), 4, _generator())
    assert taken == [(1100, 1030)]


@pytest.mark.parametrize("shape", [(60, 131), (131, 60)], ids=str)
def test_iterative_equals_exact_where_the_spectrum_has_gaps(shape, always_iterate):
    matrix = _low_rank(*shape, rank=8) + 1e-3 * _normal(*shape, seed=5)
    u, s, vt = truncated_svd(matrix, 8, _generator())
    _assert_triplets(matrix, 8, u, s, vt)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix)[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close((u * s) @ vt, _best(matrix, 8), rtol=0, atol=1e-3)


def test_iteration_is_deterministic_by_its_generator_and_touches_no_other(always_iterate):
    matrix = torch.sign(_normal(90, 131))
    before = torch.get_rng_state()
    first, again = truncated_svd(matrix, 8, _generator(3)), truncated_svd(matrix, 8, _generator(3))
    other = truncated_svd(matrix, 8, _generator(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])  # the start is really drawn from the generator


@pytest.mark.parametrize("iterate", [False, True])
class TestDegenerate:
    @pytest.fixture(autouse=True)
    def _path(self, iterate, monkeypatch):
        if iterate:
            monkeypatch.setattr(linalg, "EXACT_SIDE", 0)

    def test_rank_deficient(self):
        matrix = _low_rank(60, 131, rank=3)
        u, s, vt = truncated_svd(matrix, 8, _generator())
        _assert_triplets(matrix, 8, u, s, vt)
        assert s[3:].max() < 1e-5 * s[0]

    def test_zero(self):
        u, s, vt = truncated_svd(torch.zeros(60, 131), 8, _generator())
        _assert_triplets(torch.zeros(60, 131), 8, u, s, vt)
        assert not s.any()

    @pytest.mark.parametrize("scale", [1e-8, 1e-12, 1e6])
    def test_scale_does_not_matter(self, scale):
        """Gradients of a converged model are tiny; their first step is −η·mean g under SGD."""
        matrix = _low_rank(60, 131, rank=5) + 0.01 * _normal(60, 131, seed=9)
        u, s, vt = truncated_svd(matrix, 5, _generator())
        u2, s2, vt2 = truncated_svd(matrix * scale, 5, _generator())
        torch.testing.assert_close(s2, s * scale, rtol=1e-4, atol=0)
        torch.testing.assert_close((u2 * s2) @ vt2 / scale, (u * s) @ vt, rtol=0, atol=1e-3)
        assert captured_energy(matrix * scale, s2) == pytest.approx(captured_energy(matrix, s), abs=1e-4)


# ---------------------------------------------------------------------- low-rank pairs


def _cancelling(size=1e-4, out=60, inner=131, rank=8):
    """A stack `[B | −B₀] [A; A₀]` whose halves differ by `size` of themselves, and its exact product."""
    b, a = _normal(out, rank), _normal(rank, inner, seed=1)
    left = torch.cat([b + size * _normal(out, rank, seed=2), -b], 1)
    right = torch.cat([a + size * _normal(rank, inner, seed=3), a], 0)
    return left, right, left.double() @ right.double()


@pytest.mark.parametrize(
    ("out", "width", "inner"),
    [(60, 8, 131), (131, 8, 60), (60, 90, 131), (131, 200, 60), (7, 7, 7), (5, 1, 9)],
)
def test_factorised_is_the_svd_of_the_product(out, width, inner):
    left, right = _normal(out, width), _normal(width, inner, seed=1)
    u, s, vt = factorised(left, right)
    rank, product = min(out, width, inner), left.double() @ right.double()
    _assert_triplets(product.float(), rank, u, s, vt)
    torch.testing.assert_close(s, torch.linalg.svdvals(product)[:rank].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((u * s) @ vt, product.float(), rtol=0, atol=1e-5 * float(s[0]))
    assert all(part.is_contiguous() for part in (u, s, vt))


def test_factorised_keeps_what_nearly_cancels():
    """Relative to the small difference, not to the large halves:
    float32 inside would be wrong by percents.
    """
    left, right, product = _cancelling()
    u, s, vt = factorised(left, right)
    assert ((u.double() * s.double()) @ vt.double() - product).norm() < 1e-6 * product.norm()


def test_cutting_a_factorised_pair_leaves_the_remaining_singular_values():
    """Eckart–Young, which the stated errors of compressed exports rest on."""
    left, right = _normal(60, 16), _normal(16, 131, seed=1)
    u, s, vt = factorised(left, right)
    for rank in (1, 7, 15):
        error = (left @ right - (u[:, :rank] * s[:rank]) @ vt[:rank]).norm()
        assert float(error) == pytest.approx(float(s[rank:].norm()), rel=1e-4)


def test_factorised_has_fixed_signs_and_is_deterministic():
    left, right = _normal(60, 8), _normal(8, 131, seed=1)
    u, s, vt = factorised(left, right)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    mixing = torch.linalg.qr(_normal(8, 8, seed=5).double()).Q
    again = factorised((left.double() @ mixing).float(), (mixing.T @ right.double()).float())
    for a, b in zip((u, s, vt), again):  # another pair of the same product
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [0, 3])
def test_factorised_of_nothing(width):
    u, s, vt = factorised(torch.zeros(5, width), torch.zeros(width, 7))
    assert (u.shape, s.shape, vt.shape) == ((5, width), (width,), (width, 7))
    assert not s.any()


@pytest.mark.parametrize(("out", "width", "inner"), [(60, 8, 131), (131, 200, 60), (5, 0, 7)])
def test_low_rank_norm_is_the_norm_of_the_product(out, width, inner):
    left, right = _normal(out, width), _normal(width, inner, seed=1)
    norm = low_rank_norm(left, right)
    assert isinstance(norm, float)
    assert norm == pytest.approx(float((left.double() @ right.double()).norm()), rel=1e-12)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_low_rank_norm_of_pairs_that_nearly_cancel(size):
    """At 1e-6 the trace of the Gram matrices is off by a percent, in float64."""
    left, right, product = _cancelling(size)
    assert low_rank_norm(left, right) == pytest.approx(float(product.norm()), rel=1e-6)


def test_low_rank_norm_of_pairs_that_cancel():
    b, a = _normal(60, 8), _normal(8, 131, seed=1)
    assert low_rank_norm(torch.cat([b, -b], 1), torch.cat([a, a])) < 1e-12 * float((b @ a).norm())


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0], 1),
        ([2.0, 2.0, 2.0], 3),
        ([5.0, 0.0, 0.0], 1),
        ([0.0, 0.0], 0),
        ([], 0),
        ([0.5, 0.25, 0.25], 2**1.5),
    ],
    ids=str,
)
def test_effective_rank(values, rank):
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_effective_rank_does_not_depend_on_the_scale(scale):
    values = torch.tensor([4.0, 2.0, 1.0, 0.1])
    assert effective_rank(values * scale) == pytest.approx(effective_rank(values), rel=1e-6)
    assert 1 < effective_rank(values) < 4


# ---------------------------------------------------------------------- energy and Gram


def test_captured_energy_is_the_share_of_the_squared_norm():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0]))
    assert captured_energy(matrix, torch.tensor([4.0])) == pytest.approx(16 / 25)
    assert captured_energy(matrix, torch.tensor([4.0, 2.0, 2.0, 1.0])) == pytest.approx(1.0)
    assert captured_energy(torch.zeros(3, 4), torch.zeros(2)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_gram_inverse_of_a_full_rank_factor(dtype, scale):
    factor = _normal(60, 8).to(dtype) * scale
    gram = factor.T @ factor
    inverse = gram_inverse(gram)
    assert inverse.dtype == dtype
    torch.testing.assert_close(inverse @ gram, torch.eye(8, dtype=dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        inverse, torch.linalg.pinv(gram.double(), hermitian=True).to(dtype), rtol=1e-4, atol=0
    )


def test_gram_inverse_of_a_rank_deficient_factor_is_the_pseudo_inverse():
    factor = _low_rank(60, 8, rank=5).double()
    gram = factor.T @ factor
    expected = torch.linalg.pinv(gram, hermitian=True, rtol=1e-7)
    torch.testing.assert_close(gram_inverse(gram), expected, rtol=1e-6, atol=1e-9)


def test_gram_inverse_of_zero_is_zero():
    assert torch.equal(gram_inverse(torch.zeros(4, 4)), torch.zeros(4, 4))


def test_gram_inverse_keeps_an_ill_conditioned_direction():
    """No damping: a component a thousand times smaller than the largest is inverted exactly, not smeared."""
    gram = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    torch.testing.assert_close(gram_inverse(gram), torch.diag(torch.tensor([1.0, 1e6], dtype=torch.float64)))


def test_gram_inverse_of_an_ill_conditioned_float32_matrix_is_computed_in_float64():
    basis = torch.linalg.qr(_normal(8, 8).double()).Q
    gram = (basis * torch.logspace(0, -5, 8, dtype=torch.float64)) @ basis.T
    gram = ((gram + gram.T) / 2).float()
    expected = torch.linalg.inv(gram.double())
    assert (gram_inverse(gram) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_sylvester(rank):
    """With a left side of lower rank there are fewer solutions than unknowns only where the right side is
    singular too.
    """
    left, right = _low_rank(9, 4, rank).double(), _normal(3, 9, seed=5).double()
    left, right = left.T @ left, right @ right.T
    target = _normal(4, 3, seed=6)
    x = solve_sylvester(gram_spectrum(left), gram_spectrum(right), target)
    assert x.dtype == torch.float64
    torch.testing.assert_close(left @ x + x @ right, target.double(), rtol=1e-6, atol=1e-6)


def test_sylvester_where_both_sides_are_singular_has_the_solution_of_least_norm():
    side = gram_spectrum(torch.diag(torch.tensor([1.0, 0.0])))
    target = torch.tensor([[4.0, 3.0], [5.0, 0.0]])
    assert torch.equal(solve_sylvester(side, side, target).float(), torch.tensor([[2.0, 3.0], [5.0, 0.0]]))


def test_the_singular_values_of_a_product_are_those_of_its_factorisation():
    left, right = torch.randn(50, 9, generator=_generator(1)), torch.randn(9, 31, generator=_generator(2))
    torch.testing.assert_close(product_singular_values(left, right), factorised(left, right)[1])


# ---------------------------------------------------------------------- row norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_row_norms_are_those_of_the_sum_however_it_is_cut(monkeypatch, rows, dtype):
    monkeypatch.setattr(linalg, "NORM_ELEMENTS", rows * 23)
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (
        torch.randn(s, generator=generator).to(dtype) for s in ((31, 23), (31, 4), (4, 23))
    )
    exact = (weight.double() + left.double() @ right.double()).norm(dim=1)
    found = row_norms(weight, left, right)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(row_norms(weight).double(), weight.double().norm(dim=1), rtol=1e-6, atol=0)


def test_row_norms_hold_where_the_sum_nearly_cancels():
    """Where W + left @ right is a thousandth of W, the square of the norm expanded is mostly error."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(64, 4, generator=generator), torch.randn(4, 128, generator=generator)
    weight = -(left @ right) + 1e-3 * torch.randn(64, 128, generator=generator)
    exact = (weight.double() + left.double() @ right.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, left, right).double(), exact, rtol=1e-4, atol=0)


def test_row_norms_make_no_copy_of_the_whole(monkeypatch):
    monkeypatch.setattr(linalg, "NORM_ELEMENTS", 4 * 23)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            answer = function(*arguments, **(keywords or {}))
            if isinstance(answer, torch.Tensor) and answer._base is None:
                made.append(answer.numel())
            return answer

    weight, left, right = torch.randn(64, 23).bfloat16(), torch.randn(64, 2), torch.randn(2, 23)
    with Watch():
        row_norms(weight, left, right)
    assert made and max(made) <= 4 * 23


def test_rows_of_given_norms():
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    weight[3] = 0
    norms = torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5])
    scaled = with_row_norms(weight, norms)
    assert not scaled[3].any() and not scaled[2].any()
    torch.testing.assert_close(scaled.norm(dim=1), torch.tensor([1.0, 2.0, 0.0, 0.0, 0.5]))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(scaled, weight), torch.tensor([1.0, -1.0, 0, 0, 1.0])
    )
