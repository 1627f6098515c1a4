"""What of a recipe does not go together, as far as neither weights nor ranks are needed to see it.

A method answers facts. The sentences are made here, where all sections of the recipe are known.
"""

from typing import Any

from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.methods import HasMagnitude, HoldsPretrained, Method, TrainsWeight, probe_of, recomposing
from distlora.recipe.sections import Recipe


def check_combination(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raises UserError for a method, weights, optimizer and ZeRO stage that exclude each other. config: the
    resolved DeepSpeed config, {} without DeepSpeed.
    """
    _refuse(problem_with_decay(recipe.method, recipe.train.weight_decay))
    if recipe.train.searches_lr:
        _refuse(problem_with_search(recipe.method))
    if recipe.data.packing and recipe.train.neftune_alpha:
        raise UserError(
            "data.packing puts several texts into a row, and train.neftune_alpha draws its noise for a row; "
            "set one of them to null or false"
        )
    if recipe.train.steps:
        check_length(recipe, recipe.train.steps)
    check_base(recipe, partitioned=config.get("zero_optimization", {}).get("stage") == 3)


def check_base(recipe: Recipe, partitioned: bool) -> None:
    """Raises UserError where the weights cannot be stored as the recipe says. partitioned: under ZeRO-3."""
    asked = recipe.model.quantization
    if asked is not None:
        _refuse(problem_with_packed_weights(recipe.method, asked.kind, partitioned))


def check_length(recipe: Recipe, steps: int) -> None:
    """Raises UserError where a run of so many steps is too short, or its optimizer unfit, for the method."""
    method = recomposing(recipe.method)
    if method is None:
        return
    _refuse(method.problem_with_length(steps))
    optimizer = recipe.train.optimizer.name
    if OptimizerSpec(optimizer).eight_bit:
        raise UserError(
            f"train.optimizer.name={optimizer} keeps moments in blocks, and {method.name} as it is set here "
            f"forgets those of single components; set it to {optimizer.replace('8bit', '')}, "
            "or turn the recomposition off in method"
        )


def problem_with_decay(method: Method, weight_decay: float) -> str | None:
    """Why the method must not be trained with this weight decay, as a sentence; None if it may be."""
    if weight_decay <= 0 or not isinstance(method, HoldsPretrained) or method.decay_pretrained:
        return None
    if isinstance(method, HasMagnitude):
        what = "shrinks the rows of the pretrained weight"
    elif method.source_matrix() == "weight":
        what = "decays pretrained directions"
    else:
        what = "shrinks factors whose start was taken out of the weight"
    return (
        f"train.weight_decay={weight_decay:g} {what} under {method.name}: "
        "set it to 0, or method.decay_pretrained to true"
    )


def problem_with_search(method: Method) -> str | None:
    """Why the learning rate cannot be searched from the initialised state, as a sentence; None if it can
    be."""
    settings = probe_of(method)
    if settings is None or settings.eta != "schedule":
        return None
    return (
        "train.lr=search starts from the initialised factors, whose size eta=schedule takes from the very "
        f"rate that is searched: set eta of method {method.name} to search or a number, or train.lr to one"
    )


def problem_with_packed_weights(method: Method, kind: str, partitioned: bool) -> str | None:
    """Why target weights that are stored as `kind` ("nf4" or "int8") cannot be adapted, as a sentence; None
    if they can be. partitioned: whether ZeRO-3 cuts them up.
    """
    why = None
    if kind == "int8" and partitioned:
        why = (
            "int8 does not go with ZeRO stage 3, under which 8-bit weights are reported to spoil the loss; "
            "use nf4, or stage 0-2"
        )
    elif isinstance(method, TrainsWeight):
        why = (
            f"method {method.name} trains the weights themselves, which {kind} cannot hold while they move; "
            "set it to null"
        )
    elif isinstance(method, HasMagnitude) and kind == "int8":
        why = (
            f"method {method.name} sets norms of rows beside the rows' own scales of int8, "
            "which is not supported; use nf4"
        )
    elif _quantises_anew(method):
        why = _problem_with_quantising_anew(method, kind, partitioned)
    return why and f"model.quantization: {why}"


def _quantises_anew(method: Method) -> bool:
    """Whether recompositions change a packed weight, instead of putting pairs beside it."""
    recomposes = recomposing(method)
    return recomposes is not None and not recomposes.fuses_beside(packed=True)


def _problem_with_quantising_anew(method: Method, kind: str, partitioned: bool) -> str | None:
    if partitioned:
        return (
            f"ZeRO stage 3 cuts up the blocks of {kind}, which method.fuse_into=base would have to quantise "
            "anew; set that to sidecar, or use stage 0-2"
        )
    if method.update_rounding() == "stochastic":
        return (
            f"method.rounding=stochastic is for weights in bfloat16, and {kind} has none; set that to nearest"
        )
    return None


def _refuse(problem: str | None) -> None:
    if problem:
        raise UserError(problem)
