"""Random numbers of a run, without touching those of the program around it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's default generators (dropout, new heads) start from `seed`; afterwards the caller's states are back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed, device)
        yield


def reseed(seed: int, device: torch.device) -> None:
    """Sets the default generators' states; only for use inside `own_random_state`."""
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
