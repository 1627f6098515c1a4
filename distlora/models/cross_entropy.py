"""Cross-entropy over a large vocabulary. The logits of all positions are never in memory at once, in any
precision.

The output head computes the loss itself, a block of positions at a time, and computes each block's logits
again in the backward pass. It does so within one call: under ZeRO-3 its weight is gathered once for each
pass, and all ranks make the same number of calls, however many positions they have. (One call for each block,
under `torch.utils.checkpoint`, fails there: a frozen weight is released between the recomputation of the
logits and its use.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distlora.maths.blocks import LOGIT_ELEMENTS, row_blocks
from distlora.models.targets import IGNORE


class OutputHead(nn.Linear):
    """A model's output layer that can also compute the loss. It takes the parameters of the layer that it
    replaces.
    """

    def __init__(self, head: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's own __init__ would allocate parameters
        self.in_features, self.out_features = head.in_features, head.out_features
        self.register_parameter("weight", head.weight)
        self.register_parameter("bias", head.bias)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        softcap: float | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """The logits (…, vocab) of hidden (…, h). With targets: their loss, as `cross_entropy` defines it."""
        if targets is None:
            return super().forward(hidden)
        return _HeadCrossEntropy.apply(hidden, self.weight, self.bias, targets, weights, softcap, smoothing)


def cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    softcap: float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The weighted sum of the cross-entropies at n positions: a float32 scalar (float64 for a model in
    float64).

    head: an `OutputHead`; or another module that gives logits (an adapted head), all of which are then in
    memory at once. It is called once. hidden: (n, h); n = 0 is allowed. targets: (n,) int64. weights: (n,)
    float32; they get no gradient. softcap: c in c·tanh(logits / c). smoothing: the share of each target that
    is spread over all tokens, torch's `label_smoothing`.
    """
    if isinstance(head, OutputHead):
        return head(hidden, targets, weights, softcap, smoothing)
    logits = _capped(head(hidden), softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return (losses * weights).sum()


def label_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """The weighted sum of the cross-entropies of n classified rows: a float32 scalar (float64 for a model in
    float64).

    logits: (n, labels). labels: (n,) int64; IGNORE for a row without a loss. weights: (n,) float32.
    smoothing: as for `cross_entropy`.
    """
    exact = logits.to(_exact(logits.dtype))
    losses = F.cross_entropy(exact, labels, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
    return (losses if weights is None else losses * weights).sum()


class _HeadCrossEntropy(torch.autograd.Function):
    """Σ_i weights[i] · (logsumexp(z[i]) - (1 - ε)·z[i, targets[i]] - ε·mean(z[i])) with the smoothing ε and
    z = capped(hidden Wᵀ + b), block by block.

    The weight is held by reference and not saved: under ZeRO-3 its storage comes and goes.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, softcap,
        smoothing: float,
    ):  # fmt: skip
        normaliser = hidden.new_empty(len(hidden), dtype=_exact(hidden.dtype))
        chosen = torch.empty_like(normaliser)
        for rows in row_blocks(len(hidden), len(weight), LOGIT_ELEMENTS):
            z = _capped(_linear(hidden[rows], weight, bias), softcap)
            normaliser[rows] = z.logsumexp(-1)
            chosen[rows] = z.gather(1, targets[rows, None]).squeeze(1)
            if smoothing:
                chosen[rows] = (1 - smoothing) * chosen[rows] + smoothing * z.mean(-1)
        ctx.save_for_backward(hidden, targets, weights, normaliser)
        ctx.weight, ctx.bias, ctx.softcap, ctx.smoothing = weight, bias, softcap, smoothing
        return ((normaliser - chosen) * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        hidden, targets, weights, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(ctx.weight) if needs_weight else None
        dbias = torch.zeros_like(ctx.bias) if needs_bias else None
        scale = gradient * weights
        for rows in row_blocks(len(hidden), len(ctx.weight), LOGIT_ELEMENTS):
            z = _capped(_linear(hidden[rows], ctx.weight, ctx.bias), ctx.softcap)
            slope = _slope(z, normaliser[rows], targets[rows], scale[rows], ctx.softcap, ctx.smoothing)
            slope = slope.to(hidden.dtype)
            if needs_hidden:
                dhidden[rows] = slope @ ctx.weight
            if needs_weight:
                dweight.addmm_(slope.T, hidden[rows])
            if needs_bias:
                dbias += slope.sum(0)
        return dhidden, dweight, dbias, None, None, None, None


def _slope(
    z: Tensor, normaliser: Tensor, targets: Tensor, scale: Tensor, softcap: float | None, smoothing: float
) -> Tensor:
    """The loss's derivative with respect to the uncapped logits, (rows, vocab):
    scale · (softmax(z) - (1 - ε)·onehot(targets) - ε / vocab) · dz/dlogits.
    """
    slope = (z - normaliser[:, None]).exp_()
    slope.scatter_add_(1, targets[:, None], slope.new_full((len(slope), 1), smoothing - 1.0))
    if smoothing:
        slope.sub_(smoothing / slope.shape[1])
    slope.mul_(scale[:, None])
    if softcap is not None:  # tanh' = 1 - tanh²
        slope.mul_(1 - (z / softcap).square_())
    return slope


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits in float32 (or float64), soft-capped."""
    z = logits.to(_exact(logits.dtype))
    return z if softcap is None else (z / softcap).tanh() * softcap


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the loss is computed for logits of this one."""
    return torch.promote_types(dtype, torch.float32)
