"""What a method does to a layer at the start, found by initialising a small layer of random numbers."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.maths.low_rank import LowRank
from distlora.methods import Init, LayerInit, Method

#: Parts of the names of torch's decompositions.
DECOMPOSITIONS = ("linalg_svd", "linalg_qr", "linalg_eigh")


@dataclass(frozen=True)
class Trial:
    """taken, reserved: columns of `Init.base_update` and of `Init.reserve`. exported: rank of the layer as an
    ordinary LoRA. decomposes: whether `initialise` decomposes a matrix. moved: ‖W' − W‖/‖W‖ of the adapted
    weight W' (Frobenius), before the first step.
    """

    taken: int
    reserved: int
    exported: int
    decomposes: bool
    moved: float


@functools.lru_cache
def trial(method: Method) -> Trial:
    """Of a method that has factors. The layer is square, and as small as the method's rank allows."""
    side = 2 * method.rank
    while method.problem_with(side, side) is not None:
        side *= 2
    weight, gradient = (_matrix(side, seed) for seed in (0, 1))
    source = {"weight": weight, "gradient": gradient}.get(method.source_matrix())
    with _Decompositions() as seen:
        init = method.initialise(LayerInit((side, side), source, torch.Generator().manual_seed(2)))
    taken = _columns(init.base_update)
    exported = method.export_low_rank(init.factors).right.shape[0] + taken
    return Trial(taken, _columns(init.reserve), exported, seen.any, _moved(method, weight, init))


def _matrix(side: int, seed: int) -> Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed)) / side**0.5


def _columns(pair: LowRank | None) -> int:
    return 0 if pair is None else pair.right.shape[0]


@torch.no_grad()
def _moved(method: Method, weight: Tensor, init: Init) -> float:
    left = weight if init.base_update is None else weight + init.base_update.left @ init.base_update.right
    adapted = method.forward(torch.eye(len(weight)), left, None, init.factors, training=False).T
    return float((adapted - weight).norm() / weight.norm())


class _Decompositions(TorchDispatchMode):
    """any: whether anything was decomposed inside."""

    any = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.any |= any(name in str(function) for name in DECOMPOSITIONS)
        return function(*arguments, **(keywords or {}))
