"""`distlora methods`: what each method trains, what that costs on a given model, what its factors are made
of, and what it exports.

Facts come from the method's capabilities and from the trial initialisation of a small layer, numbers from the
shapes of the model's layers. No weight is read. What a method is, in a line, is the first line of its
module's docstring.
"""

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from distlora.adapter.expert_layers import parameters_of
from distlora.adapter.linears import shape_of
from distlora.adapter.reach import Reach
from distlora.adapter.targets import ALL_LINEAR, NARROW, Choice, choose
from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.initialisation.trial import Trial, trial
from distlora.methods import HasMagnitude, Method, TrainsWeight, recomposing, registry
from distlora.models.hub import without_weights
from distlora.models.loading import bare_model
from distlora.recipe.combination import check_base
from distlora.recipe.deepspeed_resolution import look_up
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import ModelSection, Recipe
from distlora.recipe.strict import validate
from distlora.sentences import size_text
from distlora.training.adapter_start import with_start
from distlora.training.objective import objective_of
from distlora.training.targets import reach_in, told

#: Up to these relative changes of a weight, the adapted network is the pretrained one before its first step,
#: or nearly so. The first one allows for rounding in float32.
EXACT, NEAR = 1e-6, 1e-2
SOURCES = {"weight": "W", "gradient": "gradients"}
#: A method that fits on every layer.
ANY = registry()["lora"](rank=1)


@dataclass(frozen=True)
class Subject:
    """What the methods are put on. model: without weights. new: names of its parameters that every method
    trains beside its own. reach: what an input reaches; None where no recipe says what the task is.
    method: whose layers the title counts.
    """

    path: str
    model: nn.Module
    targets: Any
    new: set[str]
    reach: Reach | None
    method: Method

    def choose(self, method: Method) -> Choice:
        """Raises UserError where the method cannot be put on the layers that the recipe names."""
        return choose(self.model, method, self.targets, self.new, self.reach)

    def title(self) -> list[str]:
        """The model with its layers, and what has no adapter."""
        layers = self.choose(ANY).names
        lines = [f"{self.path}: {len(layers)} layers of {type(self.model).__name__}"]
        try:
            return lines + told(self.model, self.choose(self.method), self.new)
        except UserError:  # said in the method's line
            return lines

    @property
    def heads(self) -> int:
        """Numbers of the new parameters."""
        return sum(value.numel() for name, value in self.model.named_parameters() if name in self.new)


def methods_table(
    recipe_path: str | None = None,
    overrides: Sequence[str] = (),
    rank: int | None = None,
    model: str | None = None,
) -> str:
    """The table as text, with a line for every registered method.

    recipe_path, overrides: a recipe whose model, targets, optimizer and method are used. rank: of all
    methods; by default the recipe's, or each method's own default. model: in place of the recipe's. Without a
    model, the numbers are formulas for one layer. Raises UserError for a recipe, a model or a rank that is
    wrong. What a single method cannot do is said in its line.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank={rank}: wanted a whole number of at least 1")
    recipe = _recipe(recipe_path, overrides)
    spec = OptimizerSpec(**dict(recipe.train.optimizer)) if recipe else OptimizerSpec()
    subject = _subject(recipe, model)
    if rank is None and recipe is not None:
        rank = recipe.method.rank
    numbers = ["trained parameters", "optimizer state"] if subject else ["trained parameters"]
    rows = [["method", "trains", *numbers, "needs", "exact at start", "exports to"]]
    remarks = {}
    for name in registry():
        try:
            method = _method(name, recipe, rank)
            rows.append(_row(method, subject, spec, recipe))
        except UserError as error:
            remarks[len(rows)] = str(error)
            rows.append([name, _trains(registry()[name])])
    about = [[name, summary(cls)] for name, cls in registry().items()]
    return "\n".join([*_lines(rows, remarks), "", *_legend(subject, spec, rank), "", *_lines(about)])


def summary(cls: type[Method]) -> str:
    """The first line of the docstring of the method's module, without its full stop."""
    return (inspect.getdoc(sys.modules[cls.__module__]) or "-").splitlines()[0].removesuffix(".")


# ---------------------------------------------------------------------- what is asked about


def _recipe(path: str | None, overrides: Sequence[str]) -> Recipe | None:
    if path is None:
        return None
    if "=" in path and not Path(path).exists():
        raise UserError(f"override {path} changes a recipe: name its file first")
    return with_start(load_recipe(path, overrides))


def _subject(recipe: Recipe | None, path: str | None) -> Subject | None:
    """Raises UserError where the targets are wrong for every method."""
    path = path or (recipe.model.path if recipe else None)
    if path is None:
        return None
    place = without_weights(path)
    if recipe is None:
        return Subject(
            path,
            bare_model(ModelSection(path=place, gradient_checkpointing=False)),
            ALL_LINEAR,
            set(),
            None,
            ANY,
        )
    section = recipe.model.model_copy(update={"path": place})
    objective = objective_of(recipe.model_copy(update={"model": section}))
    model = objective.bare_model()
    reach, heads = reach_in(model, objective), objective.trained_whole(model)
    choose(model, ANY, recipe.targets, heads, reach)
    return Subject(path, model, recipe.targets, heads, reach, recipe.method)


def _method(name: str, recipe: Recipe | None, rank: int | None) -> Method:
    """The recipe's own method as it is set there, any other one with its defaults."""
    content = (
        recipe.method.model_dump(mode="json") if recipe and recipe.method.name == name else {"name": name}
    )
    if rank is not None:
        content["rank"] = rank
    return validate(registry()[name], content, "method", lambda key: key)


# ---------------------------------------------------------------------- a line


def _row(method: Method, subject: Subject | None, spec: OptimizerSpec, recipe: Recipe | None) -> list[str]:
    """One line. Raises UserError where the method cannot be put on a layer, or on weights that are stored as
    the recipe says.
    """
    if subject is None:
        numbers = [_formula(method)]
    else:
        choice = subject.choose(method)
        method = choice.method
        if recipe is not None:
            partitioned = look_up(recipe.deepspeed or {}, "zero_optimization.stage") == 3
            check_base(recipe.model_copy(update={"method": method}), partitioned)
        trained = _trained(choice, subject.model) + subject.heads
        share = len(choice.names), len(choice.names) + len(choice.left_out.get(NARROW, ()))
        wide = "" if share[0] == share[1] else f" ({share[0]} of {share[1]} layers are wide enough)"
        numbers = [f"{trained:,}{wide}", size_text(trained * spec.bytes_per_element())]
    return [method.name, _trains(type(method)), *numbers, *_facts(method)]


def _trains(cls: type[Method]) -> str:
    return ", ".join(cls.trains) or "W"


def _facts(method: Method) -> list[str]:
    """What the factors are made of, whether the function is kept at the start, and the export."""
    if isinstance(method, TrainsWeight):
        return ["-", "yes", "merged model"]
    found = trial(method)
    exact = "yes" if found.moved <= EXACT else "nearly" if found.moved <= NEAR else "no"
    return [_needs(method, found), exact, _export(method, found)]


def _needs(method: Method, found: Trial) -> str:
    needs, recomposes = [], recomposing(method)
    if method.source_matrix() is not None:
        needs.append(f"{'SVD of ' if found.decomposes else ''}{SOURCES[method.source_matrix()]}")
    if recomposes is not None and recomposes.refill_probe() is not None:
        needs.append("SVD of gradients")
    return " and ".join(needs) or "-"


def _export(method: Method, found: Trial) -> str:
    factor = found.exported / method.rank
    kind = "DoRA" if isinstance(method, HasMagnitude) else "LoRA"
    text = f"{kind} of rank {'' if factor == 1 else f'{factor:g}'}r"
    return text if recomposing(method) is None else f"{text}, more with each recomposition"


# ---------------------------------------------------------------------- numbers


def _trained(choice: Choice, model: nn.Module) -> int:
    method, layers = choice.method, choice.layers.values()
    if isinstance(method, TrainsWeight):
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        return sum(parameter.numel() for parameter in weights + parameters_of(model, choice.experts))
    shapes = [shape_of(layer) for layer in layers]
    shapes += [weight.shape for weight in choice.experts for _ in range(weight.experts)]
    of_layers = (method.shapes(*shape) for shape in shapes)
    return sum(math.prod(factors[factor]) for factors in of_layers for factor in method.trains)


def _formula(method: Method) -> str:
    """Trained numbers of one layer, in r, out and in: the sizes of the factors, taken from a layer whose
    sizes cannot be confused.
    """
    if isinstance(method, TrainsWeight):
        return "out·in"
    out_features, in_features = method.rank + 1_000_003, method.rank + 2_000_003
    symbols = {method.rank: "r", out_features: "out", in_features: "in"}
    shapes = method.shapes(out_features, in_features)
    terms = (
        "·".join(symbols.get(size, str(size)) for size in sorted(shapes[factor])) for factor in method.trains
    )
    return " + ".join(terms).replace("r·r", "r²")


# ---------------------------------------------------------------------- the text


def _lines(rows: list[list[str]], remarks: Mapping[int, str] = MappingProxyType({})) -> list[str]:
    """Cells in columns. remarks: by row, the text after the first two cells in place of the others."""
    full = [row for index, row in enumerate(rows) if index not in remarks]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for index, row in enumerate(rows):
        cells = [*row, remarks[index]] if index in remarks else row
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    return lines


def _starting() -> list[str]:
    """The methods that can start from an adapter."""
    return [name for name, cls in registry().items() if getattr(cls, "peft_form", None)]


def _legend(subject: Subject | None, spec: OptimizerSpec, rank: int | None) -> list[str]:
    moments = {0: "", 1: ", one moment"}.get(
        sum(not key.endswith("_scale") for key in spec.moments()), ", two moments"
    )
    default = Method.model_fields["rank"].default
    lines = [
        f"r is {f'the rank, by default {default}' if rank is None else rank}; "
        "an export can always be a merged model instead",
        f"optimizer state of {spec.name}: float32 master{moments}, "
        f"{spec.bytes_per_element():.4g} bytes a trained parameter; "
        "at ZeRO 1 to 3 that is all ranks together",
        f"method.from names a LoRA in PEFT's files that training starts from: for {', '.join(_starting())}",
    ]
    if subject is None:
        return [
            "trained parameters: of one layer (out × in); a recipe or --model gives those of a model",
            *lines,
        ]
    heads = f", and a new head of {subject.heads:,} numbers, which is counted" if subject.heads else ""
    title, *about = subject.title()
    return [f"{title}{heads}", *about, *lines]
