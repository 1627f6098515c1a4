"""Linear algebra of the methods: seeded, in float32 or better, on one matrix at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Up to this smaller side the whole SVD is computed (0.1 s for 1536 × 576 on one core); above, the leading
#: part is iterated.
EXACT_SIDE = 1024

#: Elements of a matrix that are worked on at once where a copy of all would be in the way: 2 MiB in float64.
BLOCK_ELEMENTS = 1 << 18

#: Elements of a weight whose row norms are taken at once: 16 MiB in float32, and a few kernel launches a
#: layer.
NORM_BLOCK_ELEMENTS = 1 << 22


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of `matrix` (m, n): U (m, rank), S (rank,) descending, Vᵀ (rank,
    n), float32.

    Signs are fixed (the entry of largest magnitude in every column of U is positive), so that equal matrices
    give equal factors. generator: where the random start of the iteration for large matrices is drawn from.
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
    """Block subspace iteration until the captured energy no longer grows.

    The sign of a gradient has a flat spectrum, on which the customary two or four passes lose 1 % of the
    leading energy (measured on 1536 × 576, rank 32: 1.1 % after two, 0.004 % after sixteen). So the number of
    passes is not fixed.
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
    """The SVD of `left @ right` (m, k) @ (k, n), without the product: U (m, p), S (p,) descending, Vᵀ (p, n),
    p = min(m, k, n).

    QR of both sides and the SVD of the small core `R_l R_rᵀ`. Computed in float64, because pairs that nearly
    cancel lose half their digits in float32; float32 out. Signs are fixed as by `truncated_svd`.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, s, vt = _with_fixed_signs(q_left @ u, s, vt @ q_right.T)
    return u.float(), s.float(), vt.float()


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of `left @ right`, (out, k) and (k, in), descending: what `factorised` finds, without
    the vectors.
    """
    r_left = torch.linalg.qr(left.double(), mode="r").R
    r_right = torch.linalg.qr(right.double().T, mode="r").R
    return torch.linalg.svdvals(r_left @ r_right.T).float()


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of σ/Σσ (Roy & Vetterli, EUSIPCO 2007): 1 … the number of equal ones; 0 for a zero
    matrix.
    """
    total = singular_values.double().sum()
    if total <= 0:
        return 0.0
    shares = singular_values.double() / total
    return float(torch.special.entr(shares).sum().exp())


def low_rank_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖_F of (m, k) @ (k, n), without the product, in float64.

    With `rightᵀ = Q R` it is ‖left Rᵀ‖. The trace of the two Gram matrices would be cheaper, but where pairs
    nearly cancel it is only known to 1e-8 of a single pair's norm; this is to 1e-16.
    """
    triangle = torch.linalg.qr(right.double().T, mode="r").R
    return float((left.double() @ triangle.T).norm())


def captured_energy(matrix: Tensor, singular_values: Tensor) -> float:
    """Share of ‖matrix‖²_F that the given singular values carry, 0 … 1 (1 for a zero matrix)."""
    total = squared_norm(matrix)
    return float(singular_values.square().sum()) / total if total > 0 else 1.0


def squared_norm(matrix: Tensor) -> float:
    """‖matrix‖²_F in float64, a block of rows at a time: its squares all at once would take as much memory
    again.
    """
    rows = max(1, BLOCK_ELEMENTS // matrix.shape[1])
    return float(torch.stack([block.double().square().sum() for block in matrix.split(rows)]).sum())


def row_norms(weight: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """‖W + left @ right‖ of every row: (out, in), (out, r), (r, in) to (out,), in float32 (float64 for a
    float64 weight).

    The sum is formed in blocks of rows. Expanding the square, ‖W‖² + 2·rowsum((W rightᵀ) ⊙ left) +
    rowsum((left (right rightᵀ)) ⊙ left), would need no block, but cancels: measured on 1024 × 2048, rank 16,
    where the sum is 1 % of W it is off by 5e-3 (blocks: 7e-7), with W rightᵀ in bfloat16 by 6. Blocks cost r
    multiplications an element of W, a small part of any forward pass.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, NORM_BLOCK_ELEMENTS // weight.shape[1])
    right = None if right is None else right.to(dtype)
    norms = []
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows].to(dtype)
        if left is not None:
            block = torch.addmm(block, left[start : start + rows].to(dtype), right)
        norms.append(torch.linalg.vector_norm(block, dim=1))
    return torch.cat(norms)


def with_row_norms(weight: Tensor, norms: Tensor) -> Tensor:
    """`weight` (out, in) with every row scaled to the norm in `norms` (out,); a zero row stays zero."""
    return weight * (norms / one_for_zero(row_norms(weight)))[:, None]


def one_for_zero(norms: Tensor) -> Tensor:
    """Divisors: what is not positive becomes 1."""
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def gram_inverse(gram: Tensor) -> Tensor:
    """Pseudo-inverse of a symmetric positive semi-definite matrix (r, r), by `gram_spectrum`; in the matrix's
    dtype.
    """
    return gram_spectrum(gram).inverse().to(gram.dtype)


@dataclass(frozen=True)
class Spectrum:
    """`V diag(λ) Vᵀ`, a symmetric positive semi-definite matrix (r, r), in float64. λ (r,): 0 or well above
    it. V: columns.
    """

    values: Tensor
    vectors: Tensor

    def inverse(self) -> Tensor:
        """The pseudo-inverse (r, r)."""
        return (self.vectors * _inverse_or_zero(self.values)) @ self.vectors.T


def gram_spectrum(gram: Tensor, cutoff: float = 1e-7) -> Spectrum:
    """Eigen-decomposition of a Gram matrix (r, r); eigenvalues up to `cutoff`·λ_max count as zero.

    A relative cutoff and no absolute damping: damping changes an inverse by tens of percent while a factor is
    small.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > cutoff * values[-1].clamp(min=0)
    return Spectrum(torch.where(kept, values, torch.zeros_like(values)), vectors)


def solve_sylvester(left: Spectrum, right: Spectrum, target: Tensor) -> Tensor:
    """The X (m, n) of least norm with `left @ X + X @ right = target`, (m, n), as far as it has a solution;
    in float64.

    In the eigenvectors of both sides the equation is one division an element, by λ_i + μ_j.
    """
    rotated = left.vectors.T @ target.double() @ right.vectors
    x = rotated * _inverse_or_zero(left.values[:, None] + right.values)
    return left.vectors @ x @ right.vectors.T


def _inverse_or_zero(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
