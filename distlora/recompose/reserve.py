"""The reserve: components for later, in the order of their use, in the host memory of each layer's owner."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.owners import broadcast_pair
from distlora.maths.low_rank import LowRank


class Reserve:
    """Every rank knows how many components a layer has left; only the layer's owner has the components.

    owners: the rank of each layer. dtype: of the components. pairs: of the layers that this rank owns; column
    i of left (out, n) and row i of right (n, in) form one component; in a stack of experts, one of each, and
    all have equally many. Creating a reserve is collective.
    """

    def __init__(
        self,
        comm: Comm,
        layers: dict[str, AdapterLinear],
        owners: dict[str, int],
        dtype: torch.dtype,
        pairs: dict[str, LowRank],
    ):
        self._comm, self._layers, self._owners, self._dtype = comm, layers, owners, dtype
        self._pairs = dict(pairs)
        self._left = self._count()

    def _count(self) -> dict[str, int]:
        counts = [self._pairs[name].columns if name in self._pairs else 0 for name in self._layers]
        return dict(zip(self._layers, map(int, self._comm.sum(*counts)))) if counts else {}

    def left(self, layer: str) -> int:
        """Unused components of a layer, or of each expert in it."""
        return self._left[layer]

    def bytes_at_most(self) -> int:
        """Host memory of the rank that holds most. Collective."""
        own = sum(pair.left.nbytes + pair.right.nbytes for pair in self._pairs.values())
        return int(self._comm.all_gather(torch.tensor(own, device=self._comm.device)).max())

    def take(self, layer: str, count: int) -> LowRank | None:
        """Removes the next `count` components and returns them; None on ranks that do not own the layer. All
        ranks call it.
        """
        self._left[layer] -= count
        if layer not in self._pairs:
            return None
        pair = self._pairs[layer]
        # What is left is copied, so that the memory of the used part is freed.
        rest = pair.part(slice(count, None))
        self._pairs[layer] = LowRank(
            *(side.clone(memory_format=torch.contiguous_format) for side in (rest.left, rest.right))
        )
        return pair.part(slice(count))

    # ------------------------------------------------------------------ to a checkpoint and back

    def state(self) -> dict[str, int]:
        """Unused components by layer, the same on all ranks."""
        return dict(self._left)

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`<layer>/reserve/left` and `/right` of what is unused, on rank 0's CPU. Collective."""
        for name, layer in self._layers.items():
            if self._left[name]:
                for side, tensor in zip(("left", "right"), self._brought(layer)):
                    yield f"{name}/reserve/{side}", tensor.cpu() if self._comm.is_main else None

    def _brought(self, layer: AdapterLinear) -> tuple[Tensor, Tensor]:
        """A layer's components from its owner to rank 0."""
        device, count = self._comm.device, self._left[layer.name]
        pair = self._pairs.get(layer.name)
        if pair is None:
            shapes = layer.pair_shapes(count)
            pair = LowRank(*(torch.empty(shape, dtype=self._dtype, device=device) for shape in shapes))
        # A broadcast, though only rank 0 needs it: sending from one rank to another would open a communicator
        # for every pair of ranks.
        return tuple(
            self._comm.broadcast(side.to(device), self._owners[layer.name])
            for side in (pair.left, pair.right)
        )

    def restore(self, left: dict[str, int], read: Callable[[str], Tensor | None]) -> None:
        """Takes back what `state` and `tensors` gave, at the present owners. read: the tensor of a name, on
        rank 0; collective.
        """
        self._left = dict(left)
        for name, layer in self._layers.items():
            if not self._left[name]:
                continue
            sides = [read(f"{name}/reserve/{side}") for side in ("left", "right")]
            whole = broadcast_pair(
                self._comm, layer.whole_shape, 0, LowRank(*sides) if self._comm.is_main else None
            )
            if self._owners[name] == self._comm.rank:
                self._pairs[name] = LowRank(
                    *(side.to("cpu", self._dtype, copy=True) for side in (whole.left, whole.right))
                )
