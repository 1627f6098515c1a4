"""Putting a method on a model: match the targets, replace the layers, freeze the rest, report."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from distlora.adapter.experts import (
    EXPERTS,
    ExpertWeight,
    asks_for,
    expert_weights,
    matches,
    put_on_experts,
    target_experts,
)
from distlora.adapter.layer import AdapterLinear, PackedLinear
from distlora.adapter.packed import Packing
from distlora.errors import UserError
from distlora.methods import Method, TrainsWeight, problem_with_experts, writes_weight
from distlora.sentences import nearest

ALL_LINEAR = "all-linear"

log = logging.getLogger(__name__)


@dataclass
class Attached:
    """What `attach` did. method: fitted to the layers. layers: by name in the bare model. trained: names of
    all trained parameters, in the model's order."""

    method: Method
    layers: dict[str, AdapterLinear] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)


def pack_linears(
    model: nn.Module,
    make: Callable[[tuple[int, int]], Packing],
    device: torch.device,
    new_parameters: Collection[str] = (),
) -> list[Packing]:
    """Packs the weights of all linear layers of `model`, one after the other, and returns how. `attach` goes
    on as without it.

    make: from the shape (out, in). device: where the work is done.
    """
    packings = []
    for name in linears_to_pack(model, new_parameters):
        linear = model.get_submodule(name)
        packings.append(make((linear.out_features, linear.in_features)))
        _replace(model, name, PackedLinear(linear, packings[-1], device))
    return packings


def linears_to_pack(model: nn.Module, new_parameters: Collection[str] = ()) -> list[str]:
    """Names of the layers that `pack_linears` packs: all but output embeddings, new heads, and shared
    weights.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [
        name
        for name in _all_linear(model, linears)
        if f"{name}.weight" not in new_parameters and _uses(model, linears[name].weight) == 1
    ]


def attach(
    model: nn.Module, method: Method, targets: str | list[str], new_parameters: Collection[str] = ()
) -> Attached:
    """Adapt the target layers of `model` in place; afterwards exactly the method's factors and new heads are
    trained.

    targets: "all-linear" (every `nn.Linear` but output embeddings and new heads), or a list of layer names,
    last parts of names (`q_proj`) and patterns (`*.layers.1?.mlp.*`). new_parameters: parameters that the
    pretrained weights did not contain, such as a classification head; they are trained fully, and their
    layers are no targets whatever their names. Raises UserError for a target that matches no linear layer,
    and for a layer whose shape the method refuses.
    """
    if any(isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError("the model has adapter layers already; attach to a newly loaded one")
    _refuse_unknown(model, new_parameters)
    experts = target_experts(model, [targets] if isinstance(targets, str) else targets)
    linears = target_linears(model, targets, new_parameters)
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    method = method.fitted(shapes + [weight.shape for weight in experts])
    _refuse_experts(method, experts)
    chosen = list(linears)
    for name in chosen:
        problem = method.problem_with(linears[name].out_features, linears[name].in_features)
        if problem:
            raise UserError(f"method {method.name}: layer {name}: {problem} or name other targets")
        if writes_weight(method) and _uses(model, linears[name].weight) > 1:
            raise UserError(
                f"targets: {name} shares its weight with another layer, which would change too under "
                f"{method.name}; leave it out"
            )

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attached = Attached(method, targets=chosen + [weight.name for weight in experts])
    for name in chosen:
        if isinstance(method, TrainsWeight):
            for parameter in linears[name].parameters():
                parameter.requires_grad_(True)
        else:
            attached.layers[name] = _replace(model, name, AdapterLinear(linears[name], method, name))
    if isinstance(method, TrainsWeight):
        for weight in experts:
            for name, parameter in model.get_submodule(weight.module).named_parameters(recurse=False):
                if name.removesuffix("_bias") == weight.attribute:
                    parameter.requires_grad_(True)
    else:
        attached.layers |= put_on_experts(model, method, experts)
    for name, parameter in model.named_parameters():
        if name in new_parameters:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            attached.trained.append(name)
    return attached


def target_linears(
    model: nn.Module, targets: str | list[str], new_parameters: Collection[str] = ()
) -> dict[str, nn.Linear]:
    """The layers that `attach` adapts, in the model's order. Raises UserError where there is none, or a
    target is no layer.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in new_parameters
    }
    if not linears and not expert_weights(model):
        raise UserError(f"{type(model).__name__} has no linear layer to adapt")
    if "" in linears:
        raise UserError("the model is a linear layer itself, which cannot be replaced; put it into a module")
    chosen = _match(model, linears, targets)
    unusual = [name for name in chosen if _computes_otherwise(model, name)]
    if unusual and targets == ALL_LINEAR:
        log.info("left as they are, since they do not compute x Wᵀ + b themselves: %s", ", ".join(unusual))
        chosen = [name for name in chosen if name not in unusual]
    elif unusual:
        kind = type(linears[unusual[0]]).__name__
        raise UserError(
            f"targets: {unusual[0]} ({kind}) does not compute x Wᵀ + b by itself, so that an adapter in its "
            "place would change the model; leave it out"
        )
    if not chosen and not target_experts(model, [targets] if isinstance(targets, str) else targets):
        raise UserError(f"targets: {targets} leaves no layer of {type(model).__name__} to adapt; name some")
    return {name: linears[name] for name in chosen}


def _computes_otherwise(model: nn.Module, name: str) -> bool:
    """Whether a layer in this place would not be called, or would compute something else than an adapter
    layer does: its weight is packed by another library, its class computes more than x Wᵀ + b, or its parent
    reads the weight without calling it.
    """
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(layer) in (nn.Linear, PackedLinear) or layer is output:
        return isinstance(parent, nn.MultiheadAttention)
    packed = not layer.weight.dtype.is_floating_point or type(layer.weight) is not nn.Parameter
    return packed or isinstance(parent, nn.MultiheadAttention) or not _is_linear(type(layer))


def _is_linear(cls: type[nn.Linear]) -> bool:
    """Whether a small layer of the class computes x Wᵀ + b; assumed where none can be made."""
    with torch.random.fork_rng(devices=[]):  # a layer's own initialisation draws
        try:
            small = cls(3, 2)
            x = torch.linspace(-1.0, 2.0, 3)[None]
            return torch.allclose(small(x), nn.functional.linear(x, small.weight, small.bias), atol=1e-5)
        except Exception:  # whatever a class of the user's may want of its arguments
            return True


def _refuse_unknown(model: nn.Module, names: Collection[str]) -> None:
    if isinstance(names, str):
        raise UserError(f"the parameters to be trained whole are one text, {names}; give a list of names")
    known = [name for name, _ in model.named_parameters()]
    for name in names:
        if name not in known:
            hint = nearest(name, known) or "; give the full name of a parameter, such as score.weight"
            raise UserError(f"{type(model).__name__} has no parameter {name} to be trained whole{hint}")


def _refuse_experts(method: Method, experts: list[ExpertWeight]) -> None:
    for weight in experts:
        problem = problem_with_experts(method)
        if problem:
            raise UserError(f"targets: {weight.name} holds experts, and method {method.name} {problem}")
        problem = method.problem_with(*weight.shape)
        if problem:
            raise UserError(f"method {method.name}: {weight.name}: {problem} or name other targets")


def _uses(model: nn.Module, weight: nn.Parameter) -> int:
    """How many modules have this very parameter."""
    return sum(
        parameter is weight for module in model.modules() for parameter in module.parameters(recurse=False)
    )


def _match(model: nn.Module, linears: dict[str, nn.Linear], targets: str | list[str]) -> list[str]:
    """Names of the layers to adapt, in the model's order."""
    if targets == ALL_LINEAR:
        return _all_linear(model, linears)
    matched: set[str] = set()
    experts = list(expert_weights(model))
    for target in [targets] if isinstance(targets, str) else targets:
        if target == ALL_LINEAR:
            matched |= set(_all_linear(model, linears))
            continue
        hits = {name for name in linears if _matches(name, target)}
        if not hits and target == EXPERTS and not experts:
            raise UserError(f"targets: {type(model).__name__} has no experts; leave {target} out")
        if not hits and not any(asks_for(target, name) for name in experts):
            last_parts = sorted({name.rsplit(".", 1)[-1] for name in linears})
            hint = nearest(target, last_parts + list(linears)) or f"; it has {', '.join(last_parts)}"
            raise UserError(f"targets: {target} matches no linear layer of {type(model).__name__}{hint}")
        matched |= hits
    return [name for name in linears if name in matched]


def _matches(name: str, target: str) -> bool:
    """The word for experts means the linear layers of each expert where experts are modules."""
    return matches(name, target) or (target == EXPERTS and EXPERTS in name.split(".")[:-1])


def _all_linear(model: nn.Module, linears: dict[str, nn.Linear]) -> list[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, linear in linears.items()
        if linear is not output and id(linear.weight) not in embeddings
    ]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def lora_parameters(attached_to: dict[str, tuple[int, ...]], rank: int) -> int:
    """Trained parameters of an ordinary LoRA of this rank on layers of these shapes, (out, in), or
    (E, out, in) of a stack.
    """
    return sum(prod(stack) * rank * (out + inner) for *stack, out, inner in attached_to.values())
