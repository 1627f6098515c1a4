"""Pairs of a stack of experts: left (E, out, r) and right (E, r, in), and their form in PEFT's files.

PEFT holds an adapter of a 3-D parameter as two matrices, see `ParamWrapper` there, under the name of the
parameter's module. Where both projections of the module are adapted, the second one encloses the first.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from distlora.maths.low_rank import LowRank, compress, compress_within, pair_norm, stacked_pairs

#: The projections of a module of experts, in the order in which PEFT finds them.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def peft_module(layer: str, layers: Collection[str]) -> str:
    """The name under which PEFT's files hold the pair of a layer of experts. layers: all that are adapted."""
    module, _, attribute = layer.rpartition(".")
    later = PROJECTIONS[PROJECTIONS.index(attribute) + 1 :]
    return module + ".base_layer" * sum(f"{module}.{other}" in layers for other in later)


@dataclass(frozen=True)
class ExpertEntry:
    """module: the name under which PEFT's files hold the pair of a stack. count: of the experts."""

    module: str
    count: int


def expert_layer(config: dict[str, Any], module: str) -> str | None:
    """The layer of experts whose pair PEFT's files hold under this name; None where it is none. config: of
    the adapter; its `target_parameters` are names, or the ends of names.
    """
    inner, depth = module, 0
    while inner.endswith(".base_layer"):
        inner, depth = inner.removesuffix(".base_layer"), depth + 1
    asked = config.get("target_parameters") or []
    if not isinstance(asked, list):
        return None
    names = [f"{inner}.{attribute}" for attribute in reversed(PROJECTIONS)]
    adapted = [name for name in names if any(f".{name}".endswith(f".{target}") for target in asked)]
    return adapted[depth] if depth < len(adapted) else None


def to_peft(pair: LowRank) -> LowRank:
    """right: lora_A (E·r, in), one expert after the other. left: lora_B (out, r·E), in which the expert
    is the index that changes first.
    """
    experts, out, rank = pair.left.shape
    return LowRank(
        pair.left.permute(1, 2, 0).reshape(out, rank * experts),
        pair.right.reshape(experts * rank, pair.right.shape[-1]),
    )


def from_peft(pair: LowRank, experts: int) -> LowRank:
    """The way back from `to_peft`."""
    left, right = pair.left, pair.right
    return LowRank(
        left.reshape(left.shape[0], -1, experts).permute(2, 0, 1),
        right.reshape(experts, -1, right.shape[1]),
    )


def compress_stack(pair: LowRank, rank: int, dtype: torch.dtype) -> tuple[LowRank, float]:
    """As `compress`, of every expert; the error is relative to the update of all of them."""
    experts = pair.single()
    found = [compress(own, rank, dtype) for own in experts]
    total = pair_norm(pair)
    error = math.hypot(*(error * pair_norm(own) for (_, error), own in zip(found, experts)))
    return stacked_pairs(own for own, _ in found), error / total if total else 0.0


def rank_within(pair: LowRank, max_error: float, dtype: torch.dtype) -> tuple[int, float]:
    """The rank at which the update of every expert has at most this error, and the largest error."""
    found = [compress_within(own, max_error, dtype) for own in pair.single()]
    return max(own.right.shape[0] for own, _ in found), max(error for _, error in found)
