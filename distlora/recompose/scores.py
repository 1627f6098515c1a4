"""Importance scores of all layers between two recompositions. Every rank keeps those of the elements that it
trains.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine, Part
from distlora.maths.importance import ElementScores, ScoreState, component_sums
from distlora.methods import Recomposes
from distlora.recompose.shards import assembled, own_values
from distlora.recompose.stacks import matrices_of, rows_of

KEYS = ("mean", "uncertainty")


class Scores:
    """elements: how a single element is followed."""

    def __init__(
        self,
        engine: Engine,
        layers: dict[str, AdapterLinear],
        method: Recomposes,
        elements: ElementScores,
    ):
        self._engine, self._comm, self._layers = engine, engine.comm, layers
        self._method, self._elements = method, elements
        self._states: dict[str, dict[str, ScoreState]] = {}
        self.start()

    def start(self) -> None:
        """Resets every score to its value before the first step."""
        for name, layer in self._layers.items():
            parts = self._engine.parts(layer)
            self._states[name] = {factor: self._elements.start(part.master) for factor, part in parts.items()}

    def drop(self) -> None:
        """Frees the memory of scores that are not needed any more."""
        self._states.clear()

    def update(self, layer: str, factor: str, part: Part) -> None:
        """Counts one optimizer step. part: with its averaged gradient."""
        self._elements.update(self._states[layer][factor], part.master, part.gradient)

    def table(self) -> Tensor:
        """Importance of all components: (matrices, r) float64 on the CPU, the same everywhere. Collective."""
        size = sum(map(matrices_of, self._layers.values())), self._method.rank
        table = torch.zeros(size, dtype=torch.float64, device=self._comm.device)
        for name, rows in rows_of(self._layers, table).items():
            layer = self._layers[name]
            shapes = layer.factor_shapes()
            for factor, part in self._engine.parts(layer).items():
                if part.counted:
                    axis = self._method.component_axis(factor)
                    scores = self._elements.scores(self._states[name][factor])
                    sums = component_sums(axis, scores, part.start, shapes[factor])
                    rows += sums.view(rows.shape).to(rows.device)
        return self._comm.all_reduce(table).cpu()

    # ------------------------------------------------------------------ to a checkpoint and back

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`<layer>/<factor>/<score>`, whole, on rank 0's CPU. Collective."""
        for layer, factor, shape, part in self._factors():
            for key in KEYS:
                values = None if part is None else self._states[layer.name][factor][key]
                whole = assembled(self._comm, shape, part, values, 0)
                yield f"{layer.name}/{factor}/{key}", whole.cpu() if self._comm.is_main else None

    def restore(self, read: Callable[[str], Tensor | None]) -> None:
        """Takes back what `tensors` gave. read: the tensor of a name, on rank 0; collective."""
        for layer, factor, shape, part in self._factors():
            for key in KEYS:
                values = own_values(self._comm, shape, part, read(f"{layer.name}/{factor}/{key}"))
                if part is not None:
                    self._states[layer.name][factor][key].copy_(values)

    def _factors(self) -> Iterator[tuple[AdapterLinear, str, tuple[int, ...], Part | None]]:
        """Every trained factor with its shape and this rank's part of it."""
        for layer in self._layers.values():
            parts, shapes = self._engine.parts(layer), layer.factor_shapes()
            for factor in self._method.trains:
                yield layer, factor, shapes[factor], parts.get(factor)
