"""The blockwise cross-entropy against PyTorch's own on whole float32 logits."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.models import cross_entropy as loss_module
from distlora.models.cross_entropy import OutputHead, cross_entropy

N, HIDDEN, VOCAB = 37, 12, 131


class LiveFloats(TorchDispatchMode):
    """Peak bytes of the floating-point storages alive that were made inside, those that autograd keeps
    included.
    """

    def __init__(self):
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def problem(dtype=torch.float32, n=N, vocab=VOCAB):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(HIDDEN, vocab, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab, HIDDEN, generator=generator))
        head.bias.copy_(torch.randn(vocab, generator=generator))
    targets = torch.randint(vocab, (n,), generator=generator)
    weights = torch.rand(n, generator=generator) + 0.1
    return hidden, head, targets, weights


def reference(hidden, head, targets, weights, softcap):
    logits = head(hidden).to(torch.promote_types(hidden.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, head.weight, head.bias])


def plain(head):
    """A head that is no OutputHead, with the same parameters: what an adapted head falls back to."""
    return nn.Sequential(head)


@pytest.mark.parametrize("kind", [OutputHead, plain])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block_rows", [1, 5, 1000])  # 5: does not divide the rows
def test_value_and_gradients_equal_the_plain_loss(monkeypatch, kind, softcap, block_rows):
    monkeypatch.setattr(loss_module, "LOGIT_ELEMENTS", block_rows * VOCAB)
    hidden, head, targets, weights = problem(torch.float64)
    loss = cross_entropy(kind(head), hidden, targets, weights, softcap)
    expected = reference(hidden, head, targets, weights, softcap)
    torch.testing.assert_close(loss, expected)
    # A factor on the loss must reach the gradients: training scales every micro-batch.
    pairs = zip(gradients(0.3 * loss, hidden, head), gradients(0.3 * expected, hidden, head), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    hidden, head, targets, weights = problem()
    head = OutputHead(head)
    tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    tensors[frozen].requires_grad_(False)
    cross_entropy(head, hidden, targets, weights).backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name == frozen)


def test_a_head_without_bias():
    hidden, _, targets, weights = problem()
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    loss = cross_entropy(OutputHead(head), hidden, targets, weights)
    torch.testing.assert_close(loss, reference(hidden, head, targets, weights, None))


def test_the_output_head_gives_logits_from_the_same_parameters():
    hidden, head, *_ = problem()
    replacement = OutputHead(head)
    assert replacement.weight is head.weight and replacement.bias is head.bias
    assert torch.equal(replacement(hidden), head(hidden))


@pytest.mark.parametrize("kind", [OutputHead, plain])
def test_bfloat16_logits_are_summed_in_float32(kind):
    hidden, head, targets, weights = problem(torch.bfloat16)
    loss = cross_entropy(kind(head), hidden, targets, weights, 2.0)
    assert loss.dtype == torch.float32
    expected = reference(hidden, head, targets, weights, 2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradient, *_ = torch.autograd.grad(loss, [hidden])
    wanted, *_ = torch.autograd.grad(expected, [hidden])
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_huge_logits_stay_finite():
    hidden, head, targets, weights = problem()
    loss = cross_entropy(OutputHead(head), hidden * 1e4, targets, weights)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, head))


@pytest.mark.parametrize("n", [0, 1, N])
@pytest.mark.parametrize("train", [True, False])
def test_the_head_is_called_once_whatever_the_number_of_rows(monkeypatch, n, train):
    monkeypatch.setattr(loss_module, "LOGIT_ELEMENTS", 5 * VOCAB)
    hidden, head, targets, weights = problem(n=n)
    head = OutputHead(head)
    calls = []
    head.register_forward_hook(lambda *_: calls.append("forward"))
    head.register_full_backward_hook(lambda *_: calls.append("backward"))
    with torch.set_grad_enabled(train):
        loss = cross_entropy(head, hidden, targets, weights)
    if train:
        loss.backward()
    assert calls == (["forward", "backward"] if train else ["forward"])


def test_no_rows_give_a_zero_loss_with_zero_gradients():
    hidden, head, targets, weights = problem(n=0)
    loss = cross_entropy(OutputHead(head), hidden, targets, weights)
    assert loss.item() == 0
    hidden_gradient, weight_gradient, bias_gradient = gradients(loss, hidden, head)
    assert hidden_gradient.shape == (0, HIDDEN)
    assert not weight_gradient.any() and not bias_gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_logits_are_never_alive_whole(monkeypatch, dtype):
    n, vocab = 256, 2000
    monkeypatch.setattr(loss_module, "LOGIT_ELEMENTS", 4 * vocab)
    whole = n * vocab * 4
    peaks = {}
    for kind in (plain, OutputHead):
        hidden, head, targets, weights = problem(dtype, n, vocab)
        head.requires_grad_(False)
        with LiveFloats() as live:
            cross_entropy(kind(head), hidden, targets, weights).backward()
        peaks[kind] = live.peak
    assert peaks[plain] >= 2 * whole  # the measurement sees what it should
    assert peaks[OutputHead] < 0.2 * whole
