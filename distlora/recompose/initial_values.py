"""The initial values of components: what they were when they were put in place, and what they learn counts
from there.

Both classes answer the same calls.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine
from distlora.maths.low_rank import LowRank
from distlora.methods import Factors
from distlora.recompose.shards import assembled, own_values
from distlora.recompose.stacks import Chosen, matrices_of, numbered, single_factors


class InitialValuesInLedger:
    """Initial values of components that are replaced one by one. Each was taken out of W when it was put in
    place, so the ledger has it.

    Only its place is kept: (entry, column) for every component of every layer, those of all experts of a
    stack one after the other. The first entry of the ledger has those of the start.
    """

    def __init__(self, engine: Engine, attached: Attached, owners: dict[str, int]):
        self._comm, self._engine, self._owners = engine.comm, engine, owners
        self._rank = attached.method.rank
        start = [(0, column) for column in range(self._rank)]
        self._places = {name: start * matrices_of(layer) for name, layer in attached.layers.items()}

    def start(self) -> None:
        """Does nothing: the first entry of the ledger has all values."""

    def negated(self, layer: AdapterLinear, chosen: Chosen, used: Factors) -> list[list[LowRank]]:
        """For every matrix of the layer, pairs whose sum is −s·B·A of its chosen components as they were put
        in place. On the layer's owner; other ranks get none.
        """
        if self._owners[layer.name] != self._comm.rank:
            return []
        return [
            [self._put_in_place(layer, number, component) for component in own]
            for number, own in enumerate(chosen)
        ]

    def _put_in_place(self, layer: AdapterLinear, number: int, component: int) -> LowRank:
        entry, column = self._places[layer.name][number * self._rank + component]
        then = self._engine.ledger.pair(layer.name, entry)  # negated already
        return then.part(slice(column, column + 1)).single()[number]

    def put(self, layer: AdapterLinear, chosen: Chosen) -> None:
        """After a recomposition: the newest ledger entry has the new components, after what was fused."""
        newest, places = self._engine.ledger.entries[layer.name], self._places[layer.name]
        count = len(chosen[0])
        for i, component in enumerate(numbered(chosen, self._rank)):
            places[component] = (len(newest) - 1, newest[-1].columns - count + i % count)

    def state(self) -> dict[str, list[Any]]:
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

    def negated(self, layer: AdapterLinear, chosen: Chosen, used: Factors) -> list[list[LowRank]]:
        """For every matrix of the layer, a pair that is −s·B·R·A of the last start. On the layer's owner;
        other ranks get none. used: the factors of now. Collective.
        """
        owner, then = self._owners[layer.name], dict(used)
        for factor, shape, part in self._factors(layer):
            values = self._values[layer.name].get(factor)
            whole = assembled(self._comm, shape, part, values, owner)
            then[factor] = whole.to(self._engine.dtype).float()  # as the forward pass used it
        if owner != self._comm.rank:
            return []
        pairs = map(self._method.delta, single_factors(layer, then))
        return [[LowRank(-pair.left, pair.right)] for pair in pairs]

    def put(self, layer: AdapterLinear, chosen: Chosen) -> None:
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
        parts, shapes = self._engine.parts(layer), layer.factor_shapes()
        return [(factor, shapes[factor], parts.get(factor)) for factor in self._method.trains]
