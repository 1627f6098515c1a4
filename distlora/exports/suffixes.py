"""The shortest lists of names by which PEFT finds the adapted layers of a model, and no others.

PEFT's rule: an entry means every module (in `target_parameters`: every parameter) whose name it is, or whose
name ends in a dot and the entry. Sets of names with a common ending are nested or apart, so that the fewest
entries are the shortest endings that no other name has.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from distlora.adapter.expert_layers import AdapterExperts, ExpertLinear, Experts
from distlora.adapter.layer import AdapterLinear


@dataclass(frozen=True)
class Names:
    """Of a model as PEFT sees it, before anything is adapted: its modules, and its parameters."""

    modules: frozenset[str]
    parameters: frozenset[str]


def names_in(model: nn.Module) -> Names:
    """The names in a bare model, or in an adapted one as they were before it was adapted."""
    modules, parameters = set[str](), set[str]()
    for name, module in model.named_modules():
        if isinstance(module, AdapterExperts | ExpertLinear):
            continue  # in the place of a parameter
        modules.add(name)
        dot = f"{name}." if name else ""
        parameters |= {dot + parameter for parameter in _parameters_of(module)}
    return Names(frozenset(modules), frozenset(parameters))


def _parameters_of(module: nn.Module) -> Iterable[str]:
    """The names of a module's own parameters, as they were before it was adapted."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, AdapterLinear):
        return [name for name in own if name in ("weight", "bias")]
    if isinstance(module, Experts):
        inner = {
            name: child
            for name, child in module.named_children()
            if isinstance(child, AdapterExperts | ExpertLinear)
        }
        biases = [f"{name}_bias" for name, child in inner.items() if child.bias is not None]
        return [*own, *inner, *biases]
    return own


def shortest_endings(wanted: Collection[str], names: Iterable[str], parts: int = 1) -> list[str]:
    """The fewest entries that mean exactly `wanted`, each as short as it can be, in the order of `wanted`.

    names: all that there are. parts: that an entry has at least. A layer that has no such ending in common
    with others, because only some blocks are adapted, is called by its whole name.
    """
    others = {ending for name in set(names) - set(wanted) for ending in _endings(name)}
    found: dict[str, list[str]] = {}
    for name in wanted:
        own = next((ending for ending in _endings(name, parts) if ending not in others), name)
        found.setdefault(own, []).append(name)
    return [
        members[0] if len(members) == 1 and any(part.isdigit() for part in ending.split(".")) else ending
        for ending, members in found.items()
    ]


def _endings(name: str, least: int = 1) -> Iterable[str]:
    """From the last `least` parts to the whole name."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - least, -1, -1))
