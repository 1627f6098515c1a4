"""Which layers a forward pass calls, and which of them its result depends on.

Some layers are never called although they have weights: their parent multiplies with the weight itself
(Mamba's `dt_proj`), or no input of the task reaches them (the vision tower of a model that is trained on
texts). Others are called for nothing (the pooler of a classifier that reads the first token itself). An
adapter would train in none of them. One pass of the model without weights, on the meta device, tells.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distlora.adapter.linears import is_linear
from distlora.maths.known_values import KnownValues


@dataclass(frozen=True)
class Reach:
    """called: names of the linear layers whose forward pass ran. used: of those whose weight the result
    depends on, called or not; None where that could not be found out.
    """

    called: frozenset[str]
    used: frozenset[str] | None = None

    def read_by_others(self, name: str) -> bool:
        """Whether the model may multiply with the layer's weight without calling the layer."""
        return name not in self.called and (self.used is None or name in self.used)

    def obstacle(self, name: str, trains_weight: bool = False) -> str | None:
        """Why this layer would not train, as the end of a sentence about it; None where it would.

        trains_weight: whether the weight itself is to be trained, and not an adapter in the layer's place.
        """
        used = self.used is None or name in self.used
        if name in self.called:
            return None if used else "is called, but no output depends on it"
        if self.used is None or not used:
            return (
                None if self.used is None and trains_weight else "is never reached by an input of this task"
            )
        return None if trains_weight else "is never called: the model multiplies with its weight by itself"


def reach_of(model: nn.Module, run: Callable[[], Tensor]) -> Reach | None:
    """Of a model on the meta device. run: a forward pass; returns a number that every trained part of the
    model is to change. None where the pass cannot be made without values: nothing is known then.

    Where the course of the pass depends on values, both courses are tried, and what either reaches counts.
    The inputs of the pass are made before this is called, and so have no values: all inputs are meant.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    passes = [_observe(linears, run, False)]
    if passes[0].asked:
        passes.append(_observe(linears, run, True))
    complete = [found for found in passes if not found.failed]
    if not complete:
        return None
    called = set().union(*(found.called for found in complete))
    used = None
    if all(found.used is not None for found in complete):
        used = set().union(*(found.used for found in complete))
    if passes[0].asked:  # other values lead to other members of a group, such as the experts of a mixture
        called, used = _with_siblings(called, linears), used and _with_siblings(used, linears)
    return Reach(frozenset(called), None if used is None else frozenset(used))


def pattern_of(name: str) -> str:
    """The name of a layer with * in the place of every number: what repeated blocks have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def _with_siblings(names: set[str], linears: dict[str, nn.Module]) -> set[str]:
    patterns = {pattern_of(name) for name in names}
    return {name for name in linears if pattern_of(name) in patterns}


# ---------------------------------------------------------------------- one pass


@dataclass
class _Pass:
    """asked: whether the pass depended on values. failed: whether it broke off."""

    called: set[str] = field(default_factory=set)
    used: set[str] | None = None
    asked: bool = False
    failed: bool = True


def _observe(linears: dict[str, nn.Module], run: Callable[[], Tensor], truth: bool) -> _Pass:
    """truth: the answer to every question about values."""
    found, values = _Pass(), KnownValues(truth)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: found.called.add(name))
        for name, module in linears.items()
    ]
    weights = {name: linear.weight for name, linear in linears.items()}
    trained = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(weight.is_floating_point())
        with values, torch.enable_grad():
            result = run()
            found.failed = False
            found.used = _used(result, weights)
    except Exception:  # a model's own code may raise anything where its tensors have no values
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            weight.requires_grad_(trained[name])
    found.asked = values.lacking
    return found


def _used(result: Tensor, weights: dict[str, Tensor]) -> set[str]:
    floating = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    gradients = torch.autograd.grad(result, list(floating.values()), allow_unused=True)
    used = {name for name, gradient in zip(floating, gradients) if gradient is not None}
    return used | (weights.keys() - floating.keys())
