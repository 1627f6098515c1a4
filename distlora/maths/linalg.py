"""Linear algebra for the methods: seeded, in float32 or better, on one matrix at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.maths.blocks import NORM_ELEMENTS, SQUARES_ELEMENTS, row_blocks, rows_of_block

#: The whole SVD is computed of matrices whose smaller side is at most this (0.1 s for 1536 × 576 on one
#: core). For larger ones an iteration finds the leading part.
EXACT_SIDE = 1024


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of `matrix` (m, n), float32.

    They are U (m, rank), S (rank,) descending and Vᵀ (rank, n). Signs are fixed: the entry of largest
    magnitude in each column of U is positive, so that equal matrices give equal factors. generator: draws the
    start of the iteration for large matrices.
    """
    matrix = matrix.float()
    if min(matrix.shape) <= EXACT_SIDE or 3 * rank > min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = _subspace_svd(matrix, rank, generator)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    return _with_fixed_signs(u, s, vt)


def _with_fixed_signs(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    return (u * sign).contiguous(), s.contiguous(), (vt * sign.T).contiguous()


def _subspace_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, tolerance: float = 1e-6, most: int = 50
):
    """Block subspace iteration, until the captured energy no longer grows. At most `most` passes.

    The sign of a gradient has a flat spectrum. On it the usual two or four passes lose 1 % of the leading
    energy (measured on 1536 × 576, rank 32: 1.1 % after two, 0.004 % after sixteen). So the number of passes
    is not fixed.
    """
    width = min(2 * rank + 8, min(matrix.shape))
    q = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    q = torch.linalg.qr(matrix @ q).Q
    energy = torch.zeros((), device=matrix.device)
    for _ in range(most):
        q, triangle = torch.linalg.qr(matrix.T @ q)
        now = torch.linalg.svdvals(triangle)[:rank].square().sum()
        q = torch.linalg.qr(matrix @ q).Q
        if now - energy <= tolerance * now:
            break
        energy = now
    u, s, vt = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, vt


def factorised(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `left @ right`, (m, k) @ (k, n), without the product.

    Returns U (m, p), S (p,) descending and Vᵀ (p, n) with p = min(m, k, n), float32. They come from QR of
    both sides and the SVD of the small core `R_l R_rᵀ`, in float64, because pairs that nearly cancel lose
    half their digits in float32. Signs are fixed as by `truncated_svd`.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, s, vt = _with_fixed_signs(q_left @ u, s, vt @ q_right.T)
    return u.float(), s.float(), vt.float()


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """The singular values of `left @ right`, (out, k) @ (k, in), descending: those that `factorised`
    finds.
    """
    r_left = torch.linalg.qr(left.double(), mode="r").R
    r_right = torch.linalg.qr(right.double().T, mode="r").R
    return torch.linalg.svdvals(r_left @ r_right.T).float()


def effective_rank(singular_values: Tensor) -> float:
    """The exponential of the entropy of σ/Σσ (Roy & Vetterli, EUSIPCO 2007).

    It is between 1 and the number of singular values, which it reaches if all are equal; 0 for a zero matrix.
    """
    total = singular_values.double().sum()
    if total <= 0:
        return 0.0
    shares = singular_values.double() / total
    return float(torch.special.entr(shares).sum().exp())


def low_rank_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖_F of (m, k) @ (k, n), without the product, in float64.

    With `rightᵀ = Q R` it is ‖left Rᵀ‖. The trace of the two Gram matrices would be cheaper. But if pairs
    nearly cancel, its error is 1e-8 of a single pair's norm, while the error here is 1e-16 of it.
    """
    triangle = torch.linalg.qr(right.double().T, mode="r").R
    return float((left.double() @ triangle.T).norm())


def captured_energy(matrix: Tensor, singular_values: Tensor) -> float:
    """The share (0 … 1) of ‖matrix‖²_F that is in these singular values; 1 for a zero matrix."""
    total = squared_norm(matrix)
    return float(singular_values.square().sum()) / total if total > 0 else 1.0


def squared_norm(matrix: Tensor) -> float:
    """‖matrix‖²_F in float64. Only a block of rows is squared at a time, so that no copy is in memory."""
    rows = rows_of_block(matrix.shape[1], SQUARES_ELEMENTS)
    return float(torch.stack([block.double().square().sum() for block in matrix.split(rows)]).sum())


def row_norms(weight: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """The norm of every row of `W + left @ right`: (out,), in float32 (float64 for a float64 weight).

    weight: W (out, in). left: (out, r). right: (r, in). Without the last two, the norms of W's rows. Of a
    stack, with E before each of these shapes, the norms are (E, out).

    The sum is formed in blocks of rows. The expanded square,

        ‖W‖² + 2·rowsum((W rightᵀ) ⊙ left) + rowsum((left (right rightᵀ)) ⊙ left),

    would need no blocks, but it cancels. On 1024 × 2048 with rank 16, where the sum is 1 % of W, its measured
    error is 5e-3, and 6 with W rightᵀ in bfloat16; with blocks it is 7e-7. Blocks cost r multiplications for
    each element of W, a small part of any forward pass.
    """
    if weight.dim() == 3:
        pairs = zip(*((None,) * len(weight) if side is None else side for side in (left, right)))
        return torch.stack([row_norms(own, *pair) for own, pair in zip(weight, pairs)])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    right = None if right is None else right.to(dtype)
    norms = []
    for rows in row_blocks(*weight.shape, NORM_ELEMENTS):
        block = weight[rows].to(dtype)
        if left is not None:
            block = torch.addmm(block, left[rows].to(dtype), right)
        norms.append(torch.linalg.vector_norm(block, dim=1))
    return torch.cat(norms)


def with_row_norms(weight: Tensor, norms: Tensor) -> Tensor:
    """`weight` (out, in) with every row scaled to its norm in `norms` (out,); a zero row stays zero. Of a
    stack both have E before their shapes.
    """
    return weight * (norms / one_for_zero(row_norms(weight))).unsqueeze(-1)


def one_for_zero(norms: Tensor) -> Tensor:
    """The norms as divisors: those that are not positive become 1."""
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def gram_inverse(gram: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric positive semi-definite matrix (r, r), in the matrix's dtype.

    It inverts the eigenvalues that `gram_spectrum` does not count as zero.
    """
    return gram_spectrum(gram).inverse().to(gram.dtype)


@dataclass(frozen=True)
class Spectrum:
    """`V diag(λ) Vᵀ`, a symmetric positive semi-definite matrix (r, r), in float64.

    values: λ (r,), each 0 or well above it. vectors: V (r, r), in columns.
    """

    values: Tensor
    vectors: Tensor

    def inverse(self) -> Tensor:
        """The pseudo-inverse (r, r)."""
        return (self.vectors * _inverse_or_zero(self.values)) @ self.vectors.T


def gram_spectrum(gram: Tensor, cutoff: float = 1e-7) -> Spectrum:
    """The eigenvalues and eigenvectors of a Gram matrix (r, r). Values up to `cutoff`·λ_max count as zero.

    The cutoff is relative and there is no absolute damping, because damping changes an inverse by tens of
    percent while a factor is small.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > cutoff * values[-1].clamp(min=0)
    return Spectrum(torch.where(kept, values, torch.zeros_like(values)), vectors)


def solve_sylvester(left: Spectrum, right: Spectrum, target: Tensor) -> Tensor:
    """The X (m, n) of least norm with `left @ X + X @ right = target`, in float64.

    left: (m, m). right: (n, n). target: (m, n). In the eigenvectors of both sides the equation is one
    division for each element, by λ_i + μ_j. An element for which this sum is zero has no solution and becomes
    zero.
    """
    rotated = left.vectors.T @ target.double() @ right.vectors
    x = rotated * _inverse_or_zero(left.values[:, None] + right.values)
    return left.vectors @ x @ right.vectors.T


def _inverse_or_zero(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
