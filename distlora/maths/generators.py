"""Generators of random numbers that depend only on a seed and a name."""

import hashlib

import torch


def layer_generator(seed: int | str, name: str) -> torch.Generator:
    """A generator for one layer. What it draws does not depend on the other layers, or on the rank."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def seed_of(seed: int | str, name: str) -> int:
    """A seed of 56 bits that depends on these alone, for a generator on any device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
