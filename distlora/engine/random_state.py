"""Random numbers of a run, without touching those of the program around it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's default generators (dropout, new heads) start from `seed`; afterwards the caller's
    states are back.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed, device)
        yield


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The default generators' states as they are now, for `restore_random_states`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Only for use inside `own_random_state`. States of an accelerator that is not there are left out."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def reseed(seed: int, device: torch.device) -> None:
    """Sets the default generators' states; only for use inside `own_random_state`."""
    states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    restore_random_states(states, device)
