"""When each component was put in its place, and what that means for the optimizer's moments."""

import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine, Part
from distlora.maths.importance import component_of
from distlora.maths.moments import AGE_LIMIT, own_age
from distlora.methods import Recomposes
from distlora.recompose.stacks import matrices_of

#: The step of a component that is in its place since the start of the run.
NEVER = -1
#: The moments that a new component starts without. Second moments get the bias correction of their own age
#: instead.
FORGOTTEN = ("exp_avg", "momentum_buffer")


class Ages:
    """The components of all layers, by the optimizer step after which each was put in its place. The same on
    all ranks.
    """

    def __init__(self, engine: Engine, layers: dict[str, AdapterLinear], method: Recomposes):
        self._engine, self._method = engine, method
        self._born = {name: [NEVER] * (method.rank * matrices_of(layer)) for name, layer in layers.items()}

    def young(self, step: int) -> set[str]:
        """The layers with components whose second moments must be corrected before optimizer step `step`."""
        if "exp_avg_sq" not in self._engine.optimizer.moments():
            return set()
        newest = {name: max(born) for name, born in self._born.items()}
        return {name for name, born in newest.items() if born != NEVER and step - born <= AGE_LIMIT}

    def correct(self, layer: AdapterLinear, factor: str, part: Part, step: int, clip: float) -> None:
        """Gives this rank's part of a factor the second moments of its components' own ages, before optimizer
        step `step`. clip: what clipping is going to multiply gradients by.
        """
        if "exp_avg_sq" in part.moments:
            ages = self._of(layer.name, step)[self._components(layer, factor, part)]
            beta2 = self._engine.optimizer.betas[1]
            own_age(part.moments["exp_avg_sq"], part.gradient * clip, ages, step, beta2)

    def replace(self, layer: AdapterLinear, components: list[int], done: int) -> None:
        """The components, in the numbers of the whole layer, were replaced after optimizer step `done`: their
        first moments are forgotten.
        """
        born = self._born[layer.name]
        replaced = torch.zeros(len(born), dtype=torch.bool, device=self._engine.comm.device)
        replaced[components] = True
        for factor, part in self._engine.parts(layer).items():
            mask = replaced[self._components(layer, factor, part)]
            for key in FORGOTTEN:
                if key in part.moments:
                    part.moments[key][mask.to(part.moments[key].device)] = 0.0
        for component in components:
            born[component] = done

    def _of(self, name: str, step: int) -> Tensor:
        """(r,) int64, of a stack (E·r,): k for a component whose k-th step is the optimizer step `step`, 0
        for one that is in its place since the start.
        """
        ages = [0 if born == NEVER else step - born for born in self._born[name]]
        return torch.tensor(ages, device=self._engine.comm.device)

    def _components(self, layer: AdapterLinear, factor: str, part: Part) -> Tensor:
        """(n,) int64: the component that each element of a part belongs to."""
        axis, shape = self._method.component_axis(factor), layer.factor_shapes()[factor]
        return component_of(axis, part.start, part.master.numel(), shape, part.master.device)

    # ------------------------------------------------------------------ to a checkpoint and back

    def state(self) -> dict[str, list[int]]:
        """As JSON, the same on all ranks."""
        return self._born

    def restore(self, state: dict[str, list[int]]) -> None:
        self._born = state
