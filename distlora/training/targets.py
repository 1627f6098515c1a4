"""The layers that a recipe's `targets` choose in its model, found without weights."""

import logging
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distlora.adapter.coverage import coverage
from distlora.adapter.linears import linears_of
from distlora.adapter.reach import Reach, reach_of
from distlora.adapter.targets import Choice, choose
from distlora.exports.starting import start_from
from distlora.methods import Method, TrainsWeight
from distlora.models.dry_run import class_and_config
from distlora.models.targets import Batch
from distlora.recipe.sections import Recipe
from distlora.training.objective_base import Objective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """method: fitted to the layers. layers: their names, in the model's order. lines: what a user should be
    told: the share of the weights, and what was left out. whole: layers whose weight must not be packed,
    because the model reads it by itself.
    """

    method: Method
    layers: list[str]
    lines: list[str]
    whole: frozenset[str] = frozenset()


def choose_targets(recipe: Recipe, objective: Objective) -> Chosen:
    """Raises UserError for what is wrong with targets or rank, before anything is loaded."""
    return chosen_in(objective.bare_model(), recipe, objective)


def chosen_in(model: nn.Module, recipe: Recipe, objective: Objective) -> Chosen:
    """The same in the bare model that is at hand."""
    heads = objective.trained_whole(model)
    start = start_from(recipe.method)
    if start is not None:
        start.check_model(model, recipe.model.path)
    reach = reach_in(model, objective)
    choice = choose(model, recipe.method, recipe.targets, heads, reach)
    if start is not None:
        start.check_layers(choice.names)
    whole = frozenset(name for name in linears_of(model) if reach is not None and reach.read_by_others(name))
    return Chosen(choice.method, choice.names, told(model, choice, heads), whole)


def told(model: nn.Module, choice: Choice, new_parameters: Collection[str]) -> list[str]:
    """What a user should be told of a choice: the share of the weights, and what was left out."""
    verb = "trained" if isinstance(choice.method, TrainsWeight) else "adapted"
    return [coverage(model, choice.names, new_parameters, verb), *choice.lines()]


#: What was found, by class and config of the model and the shapes of its input: a sweep asks for each of its
#: points.
_REACHES: dict[Hashable, Reach | None] = {}


def reach_in(model: nn.Module, objective: Objective) -> Reach | None:
    """Which layers of a bare model an input of the task reaches. None where the model cannot be run without
    its weights; a line says so.
    """
    sample, labelled = objective.meta_sample(model), bool(objective.labels)
    shapes = tuple((name, value.shape, value.dtype) for name, value in sample.items())
    key = (class_and_config(model), labelled, shapes)
    if key not in _REACHES:
        _REACHES[key] = _observed(model, _forms(sample, labelled))
    if _REACHES[key] is None:
        log.info(
            "%s cannot be run without its weights, so that all of its layers are taken to be called",
            type(model).__name__,
        )
    return _REACHES[key]


def _observed(model: nn.Module, forms: Iterable[Batch]) -> Reach | None:
    training = model.training
    model.eval()
    try:
        for given in forms:
            found = reach_of(model, lambda given=given: _total(model(**given)))
            if found is not None:
                return found
    finally:
        model.train(training)
    return None


def _forms(sample: Batch, labelled: bool) -> list[dict]:
    """Ways to call a model with a sample: not all have a cache, or a mask of the form that most take."""
    bare = {name: value for name, value in sample.items() if name != "attention_mask"}
    forms = [sample, bare]
    return forms if labelled else [*({**form, "use_cache": False} for form in forms), bare]


def _total(output) -> Tensor:
    """A number that depends on all that the model answers with: its logits, or the first tensor."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = next(value for value in output.values() if isinstance(value, torch.Tensor))
    return logits.float().sum()
