"""The linear map: F.linear's values and gradients, without keeping alive what its backward does not need."""

import gc
import itertools
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from distlora.maths.functional import linear, rows_rescaled, tapped_linear

OUT, IN = 7, 5


def _tensors(shape=(3, 4, IN), dtype=torch.float64, seed=0):
    """x of the given shape, weight (OUT, IN), bias (OUT,)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (OUT, IN), (OUT,)))


# ---------------------------------------------------------------------- linear


@pytest.mark.parametrize("shape", [(6, IN), (3, 4, IN), (2, 0, IN), (2, 3, 4, IN)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)), ids=str)
def test_values_and_gradients_are_those_of_torch(shape, with_bias, trained):
    results = []
    for function in (linear, torch.nn.functional.linear):
        leaves = [t.requires_grad_(on) for t, on in zip(_tensors(shape), trained, strict=True)]
        y = function(leaves[0], leaves[1], leaves[2] if with_bias else None)
        assert y.requires_grad == any(trained[: 2 + with_bias])
        if y.requires_grad:
            (y.sin() * torch.arange(1.0, OUT + 1, dtype=y.dtype)).sum().backward()
        results.append((y.detach(), [leaf.grad for leaf in leaves]))
    (mine, my_grads), (theirs, their_grads) = results
    torch.testing.assert_close(mine, theirs)
    for my_grad, their_grad in zip(my_grads, their_grads, strict=True):
        assert (my_grad is None) == (their_grad is None)
        if my_grad is not None:
            torch.testing.assert_close(my_grad, their_grad)


def test_a_single_vector_is_taken_as_by_torch():
    x, weight, bias = (t.requires_grad_() for t in _tensors((IN,)))
    expected = torch.nn.functional.linear(x, weight, bias)
    got = linear(x, weight, bias)
    torch.testing.assert_close(got, expected)
    leaves = (x, weight, bias)
    theirs = torch.autograd.grad(expected.sin().sum(), leaves)
    for mine, reference in zip(torch.autograd.grad(got.sin().sum(), leaves), theirs, strict=True):
        torch.testing.assert_close(mine, reference)


def test_gradcheck():
    x, weight, bias = (t.requires_grad_() for t in _tensors((4, IN)))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: linear(x, weight.detach(), bias.detach()), (x,))
    assert torch.autograd.gradcheck(lambda weight: linear(x.detach(), weight), (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_keep_their_dtype(dtype):
    x, weight, bias = (t.requires_grad_() for t in _tensors(dtype=dtype))
    y = linear(x, weight, bias)
    y.sum().backward()
    assert {t.dtype for t in (y, x.grad, weight.grad, bias.grad)} == {dtype}


@pytest.mark.parametrize("trained", [False, True])
def test_the_input_is_kept_only_for_a_trained_weight(trained):
    x, weight, bias = _tensors()
    inner = x.requires_grad_() + 1  # an activation: nobody but the linear map could hold it
    alive = weakref.ref(inner)
    y = linear(inner, weight.requires_grad_(trained), bias)
    del inner
    gc.collect()
    assert y.requires_grad
    assert (alive() is not None) == trained


def test_the_weight_is_never_saved():
    """Under ZeRO-3 a saved alias would keep the gathered weight in memory from forward to backward."""
    x, weight, bias = _tensors()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        linear(x.requires_grad_(), weight.requires_grad_(), bias)
    assert saved == [x.shape]


def test_works_under_checkpointing():
    x, weight, bias = (t.requires_grad_() for t in _tensors())
    plain = torch.autograd.grad(linear(x, weight, bias).sin().sum(), (x, weight, bias))
    y = checkpoint(linear, x, weight, bias, use_reentrant=False)
    for mine, expected in zip(torch.autograd.grad(y.sin().sum(), (x, weight, bias)), plain, strict=True):
        torch.testing.assert_close(mine, expected)


# ---------------------------------------------------------------------- tapped_linear


class _Sums:
    """Adds up dyᵀ x by name, as the probe does."""

    def __init__(self):
        self.sums, self.calls = {}, 0

    def tap(self, name):
        def look(dy, x):
            assert dy.dim() == x.dim() == 2
            self.calls += 1
            self.sums[name] = self.sums.get(name, 0) + dy.T @ x

        return look


def _anchor():
    return torch.zeros((), requires_grad=True)


def _chain(x, weights, sums, anchor, checkpointed=False):
    """A three-layer net of tapped layers with a residual and a parameter of its own between them."""
    for i, weight in enumerate(weights):

        def block(x, weight=weight, name=i):
            return torch.tanh(tapped_linear(x, weight, None, anchor, sums.tap(name))) + x

        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_tap_gives_the_weight_gradient(checkpointed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, IN, generator=generator, dtype=torch.float64)
    weights = [torch.randn(IN, IN, generator=generator, dtype=torch.float64) for _ in range(3)]

    trained = [w.clone().requires_grad_() for w in weights]
    h = x
    for w in trained:
        h = torch.tanh(torch.nn.functional.linear(h, w)) + h
    expected = torch.autograd.grad(h.square().sum(), trained)

    sums, anchor = _Sums(), _anchor()
    # x requires no gradient (frozen embeddings), the weights neither: only the anchor makes the backward pass
    # happen.
    loss = _chain(x, weights, sums, anchor, checkpointed).square().sum()
    loss.backward(inputs=[anchor])
    assert sums.calls == 3
    for name, gradient in enumerate(expected):
        torch.testing.assert_close(sums.sums[name], gradient)


def test_the_input_gradient_is_that_of_torch():
    x, weight, bias = _tensors()
    x.requires_grad_()
    mine = torch.autograd.grad(tapped_linear(x, weight, bias, _anchor(), lambda dy, x: None).sin().sum(), x)[
        0
    ]
    theirs = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias).sin().sum(), x)[0]
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_backward_to_the_anchor_leaves_every_parameter_without_gradient(checkpointed):
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Parameter(torch.randn(IN, generator=generator))
    weights = [torch.nn.Parameter(torch.randn(IN, IN, generator=generator)) for _ in range(3)]
    x = torch.randn(4, IN, generator=generator)
    sums, anchor = _Sums(), _anchor()
    (_chain(x, weights, sums, anchor, checkpointed) * head).sum().backward(inputs=[anchor])
    assert sums.calls == 3
    assert head.grad is None and all(w.grad is None for w in weights)


# ---------------------------------------------------------------------- rescaled rows


def test_rescaled_rows_and_their_gradients():
    generator = torch.Generator().manual_seed(3)
    base, update = (torch.randn(2, 3, OUT, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.linspace(0.5, 2.0, OUT, dtype=torch.float64)
    torch.testing.assert_close(rows_rescaled(base, update, scale), (base + update) * scale - base)
    leaves = (base.requires_grad_(), update.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(rows_rescaled, leaves)


def test_where_no_row_is_rescaled_the_update_keeps_every_bit():
    base, update = torch.full((2, OUT), 1e8), torch.rand(2, OUT)
    assert torch.equal(rows_rescaled(base, update, torch.ones(OUT)), update)
