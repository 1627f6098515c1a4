"""Training steps that are taken back: what they change is kept beside, and put back to the bit."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distlora.engine.optimizers import forget_state, has_state
from distlora.engine.random_state import random_states, restore_random_states


class Kept:
    """What this rank has before a step of an optimizer: tensors, copied to the host's memory, states of the
    generators, and attributes of objects.

    device: whose generator belongs to the run. stepped: the parameters that the optimizer steps. amid_run:
    its state of them is kept as well; else it must have none yet.
    """

    def __init__(
        self,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
        stepped: Iterable[Tensor],
        amid_run: bool = False,
    ):
        self._device, self._random, self._optimizer = device, random_states(device), optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._stepped = list(stepped)
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._attributes: list[tuple[object, str, Any]] = []
        self._counts: list[tuple[dict, str, Any]] = []
        self.keep(self._stepped)
        self._known = [parameter for parameter in self._stepped if has_state(optimizer, parameter)]
        if self._known and not amid_run:
            raise ValueError("steps can be rehearsed only before the optimizer's first one")
        for parameter in self._known:
            self._keep_state(optimizer.state[parameter])

    def _keep_state(self, state: dict[str, Any]) -> None:
        """Tensors are changed in place by the optimizer, counts are replaced."""
        self.keep(value for value in state.values() if isinstance(value, Tensor))
        self._counts += [(state, key, value) for key, value in state.items() if not isinstance(value, Tensor)]

    def keep(self, tensors: Iterable[Tensor]) -> None:
        self._tensors += [(tensor.detach(), on_host(tensor)) for tensor in tensors]

    def keep_attributes(self, owner: object, names: Iterable[str]) -> None:
        """Those of the names that the owner has; values that are replaced, not changed."""
        self._attributes += [(owner, name, getattr(owner, name)) for name in names if hasattr(owner, name)]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for owner, name, value in self._attributes:
            setattr(owner, name, value)
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate
        for state, key, value in self._counts:
            state[key] = value
        known = set(map(id, self._known))
        for parameter in self._stepped:
            if id(parameter) not in known:
                forget_state(self._optimizer, parameter)
        restore_random_states(self._random, self._device)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return tensor.detach().to("cpu", copy=True)
