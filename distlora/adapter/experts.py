"""Experts of a mixture that are no modules of their own: one 3-D parameter holds a matrix for each of them.

No linear layer stands for such an expert, so that `all-linear` does not reach it; those of a known form are
adapted when they are asked for, see `expert_layers`.
"""

import fnmatch
from collections.abc import Collection

from torch import nn

from distlora.errors import UserError

#: What a target calls them all.
EXPERTS = "experts"


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the 3-D parameters that hold one matrix an expert. Those of convolutions are none."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if _dimensions(parameter) == 3 and EXPERTS in key.rpartition(".")[0].split("."):
                found[key] = parameter
    return found


def _dimensions(parameter: nn.Parameter) -> int:
    """Also of a parameter that ZeRO-3 has cut up."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def experts_meant(model: nn.Module, target: str, known: Collection[str]) -> list[str]:
    """The parameters of experts of a form that is not known which a target means. known: names of those that
    can be adapted."""
    return [
        name
        for name in expert_parameters(model)
        if name not in known and (f".{target}." in f".{name}." or fnmatch.fnmatchcase(name, target))
    ]


def refuse_experts(model: nn.Module, target: str, key: str, known: Collection[str]) -> None:
    """Raises UserError where a target means such experts."""
    hits = experts_meant(model, target, known)
    if hits:
        raise UserError(
            f"{key}: {target} of {type(model).__name__} means experts that are 3-D parameters ({hits[0]}) "
            "computed in a way that is not known here; name other layers"
        )
