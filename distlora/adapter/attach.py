"""Putting a method on a model: match the targets, replace the layers, freeze the rest, report."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from distlora.adapter.expert_layers import parameters_of, put_on_experts
from distlora.adapter.layer import AdapterLinear, PackedLinear
from distlora.adapter.linears import computes_otherwise, linears_of, shape_of, uses, without_output
from distlora.adapter.packed import Packing
from distlora.adapter.reach import Reach
from distlora.adapter.targets import ALL_LINEAR, Targets, choose
from distlora.errors import UserError
from distlora.methods import Method, TrainsWeight
from distlora.sentences import nearest

__all__ = ["ALL_LINEAR", "Attached", "attach", "linears_to_pack", "lora_parameters", "pack_linears"]


@dataclass
class Attached:
    """What `attach` did. method: fitted to the layers. layers: by name in the bare model. trained: names of
    all trained parameters, in the model's order. remarks: lines about layers that were left out."""

    method: Method
    layers: dict[str, AdapterLinear] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def pack_linears(
    model: nn.Module,
    make: Callable[[tuple[int, int]], Packing],
    device: torch.device,
    new_parameters: Collection[str] = (),
    whole: Collection[str] = (),
) -> list[Packing]:
    """Packs the weights of all linear layers of `model`, one after the other, and returns how. `attach` goes
    on as without it.

    make: from the shape (out, in). device: where the work is done. whole: names of layers that are left as
    they are.
    """
    packings = []
    for name in linears_to_pack(model, new_parameters, whole):
        linear = model.get_submodule(name)
        packings.append(make(shape_of(linear)))
        _replace(model, name, PackedLinear(linear, packings[-1], device))
    return packings


def linears_to_pack(
    model: nn.Module, new_parameters: Collection[str] = (), whole: Collection[str] = ()
) -> list[str]:
    """Names of the layers that `pack_linears` packs: all but output embeddings, new heads, shared weights,
    those whose weight is read by others, and `whole`.
    """
    linears = linears_of(model, new_parameters)
    return [
        name
        for name in without_output(model, linears)
        if name not in whole
        and uses(model, linears[name].weight) == 1
        and not computes_otherwise(model, name)
    ]


def attach(
    model: nn.Module,
    method: Method,
    targets: str | Iterable[str] | Mapping[str, Any] | Targets,
    new_parameters: Collection[str] = (),
    reach: Reach | None = None,
) -> Attached:
    """Adapt the target layers of `model` in place; afterwards exactly the method's factors and new heads are
    trained.

    targets: see `distlora.adapter.targets`. new_parameters: parameters that the pretrained weights did not
    contain, such as a classification head; they are trained fully, and their layers are no targets whatever
    their names. reach: what a forward pass calls, if that is known. Raises UserError for a target that
    matches no linear layer, and for a layer that was asked for by name and cannot be adapted.
    """
    if any(isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError("the model has adapter layers already; attach to a newly loaded one")
    _refuse_unknown(model, new_parameters)
    choice = choose(model, method, targets, new_parameters, reach)
    method = choice.method
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attached = Attached(method, targets=choice.names, remarks=choice.lines())
    for name, linear in choice.layers.items():
        if isinstance(method, TrainsWeight):
            for parameter in linear.parameters():
                parameter.requires_grad_(True)
        else:
            attached.layers[name] = _replace(model, name, AdapterLinear(linear, method, name))
    if isinstance(method, TrainsWeight):
        for parameter in parameters_of(model, choice.experts):
            parameter.requires_grad_(True)
    else:
        attached.layers |= put_on_experts(model, method, choice.experts)
    for name, parameter in model.named_parameters():
        if name in new_parameters:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            attached.trained.append(name)
    return attached


def _refuse_unknown(model: nn.Module, names: Collection[str]) -> None:
    if isinstance(names, str):
        raise UserError(f"the parameters to be trained whole are one text, {names}; give a list of names")
    known = [name for name, _ in model.named_parameters()]
    for name in names:
        if name not in known:
            hint = nearest(name, known) or "; give the full name of a parameter, such as score.weight"
            raise UserError(f"{type(model).__name__} has no parameter {name} to be trained whole{hint}")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def lora_parameters(attached_to: dict[str, tuple[int, ...]], rank: int) -> int:
    """Trained parameters of an ordinary LoRA of this rank on layers of these shapes, (out, in), or
    (E, out, in) of a stack.
    """
    return sum(prod(stack) * rank * (out + inner) for *stack, out, inner in attached_to.values())
