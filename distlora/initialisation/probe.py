"""Gradients of the full weights of the target layers, while every weight stays frozen.

LoRA-SB and LoRA-GA start from the gradient that full fine-tuning would see. For a linear layer it is `g = dyᵀ
x`, and a backward pass has both at hand: the input x and the gradient dy of the output. As soon as dy is
there, g is formed block by block. Each block is reduced to the rank that owns the layer, added to that rank's
sum, and forgotten. Beside what the pass itself needs, no rank holds more than one block on its device.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.protocol import Engine
from distlora.maths.blocks import GRADIENT_COLUMNS, GRADIENT_ELEMENTS

#: Fewest samples that a fraction of the training set stands for (LoRA-SB's Table 5: quality is flat above).
FEWEST_SAMPLES = 25

#: (model, batch) to a scalar: the sum over the batch's samples of each one's own loss.
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Probe:
    """The samples from which the first step of full fine-tuning is approximated.

    batches: this rank's, for backward passes; equally many on every rank. forward_batches: the same samples
    in larger batches, for passes without gradients. samples: their number over all ranks, by which the sum of
    their losses is divided. passes: how many there are in `batches`; None where nobody has counted them.
    """

    batches: Callable[[], Iterator[Any]]
    forward_batches: Callable[[], Iterator[Any]]
    samples: int
    loss: Loss
    passes: int | None = None


def probe_samples(setting: float, available: int | None) -> int:
    """How many samples `samples` stands for: itself, or below 1 that share of the training set, of which at
    least 25. available: the size of that; None where it is not known yet."""
    wanted = max(FEWEST_SAMPLES, round(setting * (available or 0))) if setting < 1 else int(setting)
    return min(wanted, available or wanted)


def mean_gradients(
    engine: Engine,
    layers: dict[str, AdapterLinear],
    owners: dict[str, int],
    batches: Iterable[Any],
    samples: int,
    loss: Loss,
    sums: Literal["host", "device"] = "host",
    block_elements: int = GRADIENT_ELEMENTS,
    adapted: bool = False,
) -> dict[str, Tensor]:
    """`(1/n) Σ_i g_i` of every layer that this rank owns, (out, in) float32; g_i is the gradient of the loss
    of sample i. Of a stack of experts (E, out, in); zero for an expert that no token of the samples reached.

    batches: this rank's, equally many on every rank; a batch without targets adds nothing. samples: n, over
    all ranks. adapted: whether the adapters are part of the passes. No parameter collects a gradient, and no
    counter of the engine moves.
    """
    store = _HostSums(engine.comm.device) if sums == "host" else _DeviceSums()
    anchor = torch.zeros((), device=engine.comm.device, requires_grad=True)
    for name, layer in layers.items():
        mine = owners[name] == engine.comm.rank
        if mine:
            store.open(name, (prod(layer.whole_shape[:-1]), layer.in_features))
        tap = _tap(engine.comm, owners[name], store.add if mine else None, name, block_elements)
        layer.tap(anchor, _tap_of_stack(tap, layer.out_features) if layer.stack else tap, adapted)
    try:
        with engine.probe_pass(), _checkpointed(engine.module):
            for batch in batches:
                torch.autograd.backward(engine.run_probe(loss, batch), inputs=[anchor])
    finally:
        for layer in layers.values():
            layer.tap(None, None)
    return {name: total.div_(samples).view(layers[name].whole_shape) for name, total in store.close().items()}


def _tap(
    comm: Comm, owner: int, add: Callable[..., Any] | None, name: str, block_elements: int
) -> Callable[..., None]:
    """first: the row of the layer's sum that dy's first column belongs to."""

    def tap(dy: Tensor, x: Tensor, first: int = 0) -> None:
        # All ranks must use the same blocks, so these do not depend on the number of tokens.
        columns = min(x.shape[1], GRADIENT_COLUMNS)
        rows = max(1, block_elements // columns)
        for left in range(0, x.shape[1], columns):
            part = x[:, left : left + columns].float()
            for top in range(0, dy.shape[1], rows):
                block = dy[:, top : top + rows].float().T @ part
                comm.reduce_to(block, owner)
                if add is not None:
                    add(name, first + top, left, block)

    return tap


def _tap_of_stack(
    tap: Callable[..., Any], out_features: int
) -> Callable[[Tensor, Tensor, Sequence[int]], None]:
    """Every expert in turn, also one without tokens, because the other ranks may have tokens for it."""

    def tap_all(dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
        for expert, (own_dy, own_x) in enumerate(zip(dy.split(list(counts)), x.split(list(counts)))):
            tap(own_dy, own_x, expert * out_features)

    return tap_all


class _DeviceSums:
    """Sums on the device of the blocks."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    def open(self, name: str, shape: tuple[int, int]) -> None:
        self._shapes[name] = shape

    def add(self, name: str, top: int, left: int, block: Tensor) -> None:
        """Adds a block whose first element belongs to row `top` and column `left` of the layer's sum."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(self._shapes[name], device=self._device(block))
        rows, columns = block.shape
        self._sums[name][top : top + rows, left : left + columns] += block

    def _device(self, block: Tensor) -> torch.device:
        return block.device

    def close(self) -> dict[str, Tensor]:
        return self._sums


class _HostSums(_DeviceSums):
    """Sums in host memory. From an accelerator, blocks are copied through pinned memory while the backward
    pass continues.

    Two staging buffers alternate: a block is added on the host when its buffer is needed again.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staged: list[tuple[str, int, int, Tensor, torch.cuda.Event]] = []

    def add(self, name: str, top: int, left: int, block: Tensor) -> None:
        if self._stream is None:
            super().add(name, top, left, block)
            return
        if len(self._staged) == 2:
            self._land()
        staging = torch.empty(block.shape, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            staging.copy_(block, non_blocking=True)
            block.record_stream(self._stream)
            self._staged.append((name, top, left, staging, self._stream.record_event()))

    def _land(self) -> None:
        name, top, left, staging, copied = self._staged.pop(0)
        copied.synchronize()
        super().add(name, top, left, staging)

    def close(self) -> dict[str, Tensor]:
        while self._staged:
            self._land()
        return super().close()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in training or evaluation mode as it was before."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with activation checkpointing in every block that knows it, as the model
    had it afterwards.

    Blocks checkpoint in training mode only, so that flag alone is set on them, and their children stay in
    evaluation mode.
    """
    able = getattr(model, "supports_gradient_checkpointing", False)
    was_on = able and model.is_activation_checkpointing
    if able and not was_on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        with modes_kept(model):
            model.eval()
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
            yield
    finally:
        if able and not was_on:
            model.activation_checkpointing_disable()
