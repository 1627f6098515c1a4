"""What counts as a linear layer: a module that computes `x Wᵀ + b` when it is called.

Most are `nn.Linear`. transformers' Conv1D (GPT-2 and its kin) computes the same with a weight that is stored
as (in, out). It is told by its name and sizes, because this folder does without transformers.
"""

from collections.abc import Collection

import torch
from torch import nn


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or keeps_transpose(module)


def keeps_transpose(layer: nn.Module) -> bool:
    """Whether the class of a layer, and the files of its model, hold the weight as (in, out)."""
    if isinstance(layer, nn.Linear):
        return getattr(layer, "fan_in_fan_out", False)
    named = any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)
    return named and all(isinstance(getattr(layer, size, None), int) for size in ("nf", "nx"))


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in). The weight itself does not say so under ZeRO-3, where it is empty between passes."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return layer.nf, layer.nx


def matrix_of(layer: nn.Module) -> torch.Tensor:
    """The whole weight of a plain layer as (out, in), without a gradient."""
    weight = layer.weight.detach()
    return weight.T if keeps_transpose(layer) else weight


def linears_of(model: nn.Module, new_parameters: Collection[str] = ()) -> dict[str, nn.Module]:
    """All linear layers by name, in the model's order, but those whose weight is among `new_parameters`."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and f"{name}.weight" not in new_parameters
    }


def without_output(model: nn.Module, linears: dict[str, nn.Module]) -> list[str]:
    """Names of the layers that are no output embedding and share no weight with an embedding."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, linear in linears.items()
        if linear is not output and id(linear.weight) not in embeddings
    ]


def uses(model: nn.Module, weight: nn.Parameter) -> int:
    """How many modules have this very parameter."""
    return sum(
        parameter is weight for module in model.modules() for parameter in module.parameters(recurse=False)
    )


def computes_otherwise(model: nn.Module, name: str) -> bool:
    """Whether a layer in this place would not be called, or would compute something else than an adapter
    layer does: its weight is packed by another library, its class computes more than x Wᵀ + b, or its parent
    reads the weight without calling it.
    """
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(parent, nn.MultiheadAttention):
        return True
    if type(layer) is nn.Linear or hasattr(layer, "packing") or layer is output:
        return False
    packed = not layer.weight.dtype.is_floating_point or type(layer.weight) is not nn.Parameter
    return packed or not _computes_product(type(layer), isinstance(layer, nn.Linear))


def _computes_product(cls: type[nn.Module], plain: bool) -> bool:
    """Whether a small layer of the class computes x Wᵀ + b. plain: whether it is made of (in, out), and not
    of (out, in).
    """
    makers = [lambda: cls(3, 2), lambda: _without_init(cls)] if plain else [lambda: cls(2, 3)]
    with torch.random.fork_rng(devices=[]):  # a layer's own initialisation draws
        for make in makers:
            try:
                small = make()
                x = torch.linspace(-1.0, 2.0, 3)[None]
                wanted = nn.functional.linear(x, matrix_of(small), small.bias)
                return torch.allclose(small(x), wanted, atol=1e-5)
            except Exception:  # whatever a class may want of its arguments; ZeRO-3 cuts up what is made
                continue
    return not plain


def _without_init(cls: type[nn.Module]) -> nn.Module:
    """A layer of three columns and two rows that has a weight and nothing of its own: what computes more, as
    routers of mixtures of experts do, fails."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features, layer.bias = 3, 2, None
    layer.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 6).view(2, 3))
    return layer
