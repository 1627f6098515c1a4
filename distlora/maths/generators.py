"""Generators of random numbers that depend on nothing but a seed and a name."""

import hashlib

import torch


def layer_generator(seed: int | str, name: str) -> torch.Generator:
    """A generator of the layer's own, so that no layer's draw depends on which rank drew before it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
