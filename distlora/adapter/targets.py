"""Which layers a method is put on: the grammar of `targets`, and what it chooses in a model.

    all-linear                                              see `choose`
    [q_proj, model.layers.3.mlp.up_proj, "*.mlp.*", mlp]    names, last parts, patterns, and what holds layers
    [all-linear, experts]                                   experts of a mixture that are 3-D parameters, too
    {include: all-linear, exclude: [o_proj], layers: 10-20}

What stands for itself is the list, with `include` around it. `layers` are the numbers of blocks, the first
number in a layer's name. Layers that cannot be adapted are left out, and told; a target that is the name of
one, or that matches nothing else, is refused.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from distlora.adapter.expert_layers import ExpertWeight, expert_weights, obstacle_of
from distlora.adapter.experts import EXPERTS, experts_meant, refuse_experts
from distlora.adapter.linears import computes_otherwise, linears_of, shape_of, uses, without_output
from distlora.adapter.reach import Reach, pattern_of
from distlora.errors import UserError
from distlora.methods import Method, TrainsWeight, writes_weight
from distlora.sentences import nearest, of_several

ALL_LINEAR = "all-linear"
#: Why a layer is left out that the method's rank is too large for.
NARROW = "is too narrow for the method's rank"
#: Names of layers in a line, repeated blocks taken together.
MOST_NAMES = 8

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Numbers = int | str


def _check_numbers(value: "Numbers | list[Numbers] | None") -> "Numbers | list[Numbers] | None":
    numbers_of(value)
    return value


class Targets(BaseModel):
    """The mapping form of `targets`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: Literal["all-linear"] | Annotated[Names, Field(min_length=1)] = Field(
        ALL_LINEAR, description="all-linear, or names and patterns"
    )
    exclude: Names = Field([], description="names and patterns of layers that are left out")
    layers: Annotated[Numbers | list[Numbers] | None, BeforeValidator(_check_numbers)] = Field(
        None, description='numbers of blocks: 7, "10-20", or a list of these; null: all'
    )

    @staticmethod
    def of(value: "str | Iterable[str] | Mapping[str, Any] | Targets") -> "Targets":
        """Any form of `targets`. Raises UserError for a mapping with other keys or values."""
        if isinstance(value, Targets):
            return value
        if not isinstance(value, Iterable):
            raise UserError(f"targets: found {value!r}, wanted all-linear, or names and patterns of layers")
        if not isinstance(value, Mapping):
            names = [value] if isinstance(value, str) and value != ALL_LINEAR else value
            if not isinstance(names, str) and not all(isinstance(name, str) and name for name in names):
                raise UserError(f"targets: {names} has what is no name; give names and patterns of layers")
            return Targets.model_construct(include=names if isinstance(names, str) else list(names))
        for key in value:
            if key not in Targets.model_fields:
                known = ", ".join(Targets.model_fields)
                hint = nearest(str(key), Targets.model_fields) or f"; known here: {known}"
                raise UserError(f"targets: unknown key {key}{hint}")
        try:
            return Targets(**value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = first["loc"][0]
            reason = f"found {value[key]!r}, wanted {Targets.model_fields[key].description}"
            if first["type"] == "value_error":
                reason = first["ctx"]["error"]
            raise UserError(f"targets.{key}: {reason}") from None


def numbers_of(value: Numbers | list[Numbers] | None) -> set[int] | None:
    """The numbers that `layers` stands for; None for all. Raises ValueError for what is neither number nor
    range.
    """
    if value is None:
        return None
    found: set[int] = set()
    for item in value if isinstance(value, list) else [value]:
        first, dash, last = str(item).partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.strip().isdecimal() for end in ends):
            raise ValueError(f'found {item}, wanted numbers from 0 on, such as 7, "10-20" or [0, "10-20"]')
        low, high = int(ends[0]), int(ends[-1])
        if low > high:
            raise ValueError(f"{item} is an empty range; the smaller number comes first")
        found |= set(range(low, min(high, low + 100_000) + 1))
    if not found:
        raise ValueError("the list is empty; give numbers of blocks, or null for all")
    return found


# ---------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Choice:
    """layers: those to adapt, by name, in the model's order. method: fitted to them. left_out: by the reason,
    as the end of a sentence about a layer, the names of layers that are asked for and cannot be adapted.
    experts: the weights of experts to adapt.
    """

    layers: dict[str, nn.Module]
    method: Method
    left_out: dict[str, list[str]] = field(default_factory=dict)
    experts: list[ExpertWeight] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of all that is adapted."""
        return [*self.layers, *(weight.name for weight in self.experts)]

    def lines(self) -> list[str]:
        """What a user should be told, one line for each reason."""
        return [f"left without an adapter: {_told(names, why)}" for why, names in self.left_out.items()]


def choose(
    model: nn.Module,
    method: Method,
    targets: "str | Iterable[str] | Mapping[str, Any] | Targets" = ALL_LINEAR,
    new_parameters: Collection[str] = (),
    reach: Reach | None = None,
) -> Choice:
    """The layers that the method is put on.

    all-linear means every linear layer but output embeddings and new heads that is called, trains and is wide
    enough for the method. reach: what a forward pass calls; None where that is not known, and every layer is
    taken to be called. Raises UserError where a target matches nothing, or only what cannot be adapted, and
    where nothing is left.
    """
    asked = Targets.of(targets)
    linears, experts = linears_of(model, new_parameters), expert_weights(model)
    if not linears and not experts:
        raise UserError(f"{type(model).__name__} has no linear layer to adapt")
    if "" in linears:
        raise UserError("the model is a linear layer itself, which cannot be replaced; put it into a module")
    layers: dict[str, nn.Module | ExpertWeight] = linears | experts
    wanted, meant = _wanted(model, linears, layers, asked)
    obstacles = {name: _obstacle(model, method, name, layers[name], reach) for name in wanted}
    _refuse_by_name(meant, obstacles, lambda name: _refusal(method, name, layers[name], obstacles[name]))
    chosen, left_out = [], dict[str, list[str]]()
    for name, obstacle in obstacles.items():
        if obstacle is None:
            chosen.append(name)
        else:
            left_out.setdefault(obstacle, []).append(name)
    if not chosen:
        raise UserError(_nothing_left(model, method, layers, asked, left_out))
    fitted = method.fitted([_shape(layers[name]) for name in chosen])
    for name in chosen:  # with every open setting decided
        problem = fitted.problem_with(*_shape(layers[name]))
        if problem:
            raise UserError(_of_layer(fitted, name, problem))
        if name in linears and writes_weight(fitted) and uses(model, linears[name].weight) > 1:
            raise UserError(
                f"targets: {name} shares its weight with another layer, which would change too under "
                f"{fitted.name}; leave it out"
            )
    modules = {name: linears[name] for name in chosen if name in linears}
    return Choice(modules, fitted, left_out, [experts[name] for name in chosen if name in experts])


def _shape(layer: nn.Module | ExpertWeight) -> tuple[int, int]:
    return layer.shape if isinstance(layer, ExpertWeight) else shape_of(layer)


def _obstacle(
    model: nn.Module, method: Method, name: str, layer: nn.Module | ExpertWeight, reach: Reach | None
) -> str | None:
    if isinstance(layer, ExpertWeight):
        return obstacle_of(model, layer) or (NARROW if too_narrow(method, layer.shape) else None)
    if computes_otherwise(model, name):
        return "does not compute x Wᵀ + b by itself, so that an adapter in its place would change the model"
    if reach is not None and reach.obstacle(name, isinstance(method, TrainsWeight)):
        return reach.obstacle(name, isinstance(method, TrainsWeight))
    return NARROW if too_narrow(method, shape_of(layer)) else None


def too_narrow(method: Method, shape: tuple[int, int]) -> str | None:
    """Why the method cannot be put on a layer of this shape (out, in) at all, whatever the others are."""
    return method.fitted([shape]).problem_with(*shape)


def _refuse_by_name(
    meant: list[tuple[str, list[str]]], obstacles: dict[str, str | None], refusal: Callable[[str], str]
) -> None:
    """Raises UserError for a target that is the name of a layer which cannot be adapted, or that matches such
    layers alone. meant: what every target matches.
    """
    for target, names in meant:
        lost = [name for name in names if obstacles[name] is not None]
        if lost and (lost == names or target in lost):
            raise UserError(refusal(target if target in lost else lost[0]))


def _refusal(method: Method, name: str, layer: nn.Module | ExpertWeight, obstacle: str | None) -> str:
    if obstacle == NARROW:
        return _of_layer(method, name, too_narrow(method, _shape(layer)))
    if isinstance(layer, ExpertWeight):
        return f"targets: {name} {obstacle}; leave experts out of targets"
    return f"targets: {name} ({type(layer).__name__}) {obstacle}; leave it out"


def _of_layer(method: Method, name: str, problem: str) -> str:
    return f"method {method.name}: layer {name}: {problem} or name other targets"


def _nothing_left(
    model: nn.Module,
    method: Method,
    layers: dict[str, nn.Module | ExpertWeight],
    asked: Targets,
    left_out: dict[str, list[str]],
) -> str:
    for name in left_out.get(NARROW, [])[:1]:
        return _refusal(method, name, layers[name], NARROW)
    why = "".join(f"; {_told(names, reason)}" for reason, names in left_out.items())
    return f"targets: {_shown(asked)} leaves no layer of {type(model).__name__} to adapt{why}; name some"


def _shown(asked: Targets) -> str:
    if not asked.exclude and asked.layers is None:
        return str(asked.include)
    return str(asked.model_dump(exclude_defaults=True) | {"include": asked.include})


# ---------------------------------------------------------------------- matching


def _wanted(
    model: nn.Module, linears: dict[str, nn.Module], layers: Collection[str], asked: Targets
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The layers that are asked for, in the model's order, and those that each single target brings, of which
    all-linear is none. layers: the names of the linear ones, then those of experts.
    """
    targets = [asked.include] if isinstance(asked.include, str) else asked.include
    by_target = [(target, _hits(model, layers, target)) for target in targets if target != ALL_LINEAR]
    included = set[str]().union(*(hits for _, hits in by_target))
    if ALL_LINEAR in targets:
        included |= set(without_output(model, linears))
    numbers = numbers_of(asked.layers)
    if numbers is not None:
        included = _in_blocks(model, layers, included, numbers)
    for target in asked.exclude:
        included -= _hits(model, layers, target, "targets.exclude")
    order = [name for name in layers if name in included]
    return order, [(target, [name for name in order if name in hits]) for target, hits in by_target]


def _hits(model: nn.Module, layers: Collection[str], target: str, key: str = "targets") -> set[str]:
    hits = {name for name in layers if _matches(name, target)}
    excluded = key != "targets"
    if excluded and not hits and (target == EXPERTS or experts_meant(model, target, layers)):
        return hits  # none of them would have an adapter in any case
    if not hits or (target == EXPERTS and not excluded):
        refuse_experts(model, target, key, layers)
    if not hits:
        if target == EXPERTS:
            raise UserError(f"{key}: {type(model).__name__} has no experts; leave {target} out")
        last_parts = sorted({name.rsplit(".", 1)[-1] for name in layers})
        words = [] if excluded else [ALL_LINEAR]
        hint = _hint(target, words, last_parts + list(layers)) or f"; it has {', '.join(last_parts)}"
        raise UserError(f"{key}: {target} matches no linear layer of {type(model).__name__}{hint}")
    return hits


def _hint(target: str, words: list[str], names: list[str]) -> str:
    """What somebody may have meant by a target that matches nothing. words: those that stand for layers."""
    if "," in target:
        return f"; write several names as a list: [{', '.join(target.replace(',', ' ').split())}]"
    if words and target in ("all", "all_linear"):
        return f", did you mean {ALL_LINEAR}?"
    return nearest(target, words + names)


def is_named(name: str, target: str) -> bool:
    """Whether the target is the name, or the last parts of it."""
    return name == target or name.endswith("." + target)


def _matches(name: str, target: str) -> bool:
    """By name, last part, pattern, or as a part of what is called so: `mlp` is `model.layers.0.mlp.up_proj`,
    too.
    """
    return is_named(name, target) or f".{target}." in f".{name}" or fnmatch.fnmatchcase(name, target)


def _in_blocks(model: nn.Module, layers: Collection[str], names: set[str], numbers: set[int]) -> set[str]:
    """Those of the blocks with these numbers."""
    there = {block_of(name) for name in layers} - {None}
    missing = sorted(numbers - there)
    if missing:
        known = f"it has {in_ranges(there)}" if there else "its layers have no numbers"
        raise UserError(f"targets.layers: {type(model).__name__} has no layer {in_ranges(missing)}; {known}")
    return {name for name in names if block_of(name) in numbers}


def block_of(name: str) -> int | None:
    """The first number in a layer's name; None without one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


# ---------------------------------------------------------------------- in words


def in_ranges(numbers: Iterable[int]) -> str:
    """0-2, 5 for {0, 1, 2, 5}."""
    ordered, spans = sorted(numbers), list[list[int]]()
    for number in ordered:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def _told(names: list[str], why: str) -> str:
    """What keeps these layers from an adapter; repeated blocks are one thing."""
    return f"{in_short(names)} {why if len(set(map(pattern_of, names))) == 1 else of_several(why)}"


def in_short(names: Iterable[str]) -> str:
    """Names of layers, repeated blocks taken together: `model.layers.*.mlp.gate (24 layers)`."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(pattern_of(name), []).append(name)
    texts = [
        f"{pattern} ({len(members)} layers)" if len(members) > 1 else members[0]
        for pattern, members in counts.items()
    ]
    more = len(texts) - MOST_NAMES
    return ", ".join(texts[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
