"""The initial values of components: what they were when they were put in place, and what they learn counts
from there.

Both classes answer the same calls.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine
from distlora.maths.low_rank import LowRank
from distlora.methods import Factors, Recomposition
from distlora.recompose.shards import assembled, own_values


class InitialValuesInLedger:
    """Initial values of components that are replaced one by one. Each was taken out of W when it was put in
    place, so the ledger has it.

    Only its place is kept: (entry, column) for every component of every layer. The first entry of the ledger
    has those of the start.
    """

    def __init__(self, engine: Engine, attached: Attached, owners: dict[str, int]):
        self._comm, self._engine, self._owners = engine.comm, engine, owners
        start = [(0, column) for column in range(attached.method.rank)]
        self._places = {name: list(start) for name in attached.layers}

    def start(self) -> None:
        """Does nothing: the first entry of the ledger has all values."""

    def negated(self, layer: AdapterLinear, components: tuple[int, ...], used: Factors) -> list[LowRank]:
        """Pairs whose sum is −s·B·A of these components as they were put in place. On the layer's owner;
        other ranks get none.
        """
        if self._owners[layer.name] != self._comm.rank:
            return []
        pairs = []
        for component in components:
            entry, column = self._places[layer.name][component]
            then = self._engine.ledger.pair(layer.name, entry)  # negated already
            pairs.append(LowRank(then.left[:, column : column + 1], then.right[column : column + 1]))
        return pairs

    def put(self, layer: AdapterLinear, answer: Recomposition) -> None:
        """After a recomposition: the newest ledger entry has the new components, after what was fused."""
        entry = len(self._engine.ledger.entries[layer.name]) - 1
        first = answer.base_update.right.shape[0] - len(answer.replaced)
        for i, component in enumerate(answer.replaced):
            self._places[layer.name][component] = (entry, first + i)

    def state(self) -> dict[str, list]:
        """As JSON, the same on all ranks."""
        return self._places

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """None: the ledger has them."""
        return iter(())

    def restore(self, state: dict[str, list], read: Callable[[str], Tensor | None]) -> None:
        self._places = {name: [tuple(place) for place in places] for name, places in state.items()}


class InitialValuesInStart:
    """Initial values of an adapter that starts anew as a whole: its trained factors at that moment. Each rank
    keeps its own parts of them.
    """

    def __init__(self, engine: Engine, attached: Attached, owners: dict[str, int]):
        self._engine, self._comm, self._owners = engine, engine.comm, owners
        self._method, self._layers = attached.method, attached.layers
        self._values: dict[str, dict[str, Tensor]] = {}

    def start(self) -> None:
        """The adapter has just been given new factors."""
        for name, layer in self._layers.items():
            self._values[name] = {
                factor: part.master.clone() for factor, part in self._engine.parts(layer).items()
            }

    def negated(self, layer: AdapterLinear, components: tuple[int, ...], used: Factors) -> list[LowRank]:
        """A pair that is −s·B·R·A of the last start. On the layer's owner; other ranks get none. used: the
        factors of now. Collective.
        """
        owner, then = self._owners[layer.name], dict(used)
        for factor, shape, part in self._factors(layer):
            values = self._values[layer.name].get(factor)
            whole = assembled(self._comm, shape, part, values, owner)
            then[factor] = whole.to(self._engine.dtype).float()  # as the forward pass used it
        if owner != self._comm.rank:
            return []
        pair = self._method.delta(then)
        return [LowRank(-pair.left, pair.right)]

    def put(self, layer: AdapterLinear, answer: Recomposition) -> None:
        """Does nothing: `start` follows when all layers have their new factors."""

    def state(self) -> dict[str, list]:
        return {}

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`<layer>/<factor>/start`, whole, on rank 0's CPU. Collective."""
        for name, layer in self._layers.items():
            for factor, shape, part in self._factors(layer):
                whole = assembled(self._comm, shape, part, self._values[name].get(factor), 0)
                yield f"{name}/{factor}/start", whole.cpu() if self._comm.is_main else None

    def restore(self, state: dict[str, list], read: Callable[[str], Tensor | None]) -> None:
        for name, layer in self._layers.items():
            for factor, shape, part in self._factors(layer):
                values = own_values(self._comm, shape, part, read(f"{name}/{factor}/start"))
                if part is not None:
                    self._values.setdefault(name, {})[factor] = values.to(
                        part.master.device, torch.float32, copy=True
                    )

    def _factors(self, layer: AdapterLinear):
        parts, shapes = self._engine.parts(layer), self._method.shapes(*layer.shape)
        return [(factor, shapes[factor], parts.get(factor)) for factor in self._method.trains]
