"""Generators of random numbers that depend only on a seed and a name."""

import hashlib

import torch


def layer_generator(seed: int | str, name: str) -> torch.Generator:
    """A generator for one layer. What it draws does not depend on the other layers, or on the rank."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
