"""A recipe's model as sizes, from its config alone: the parameters of every module, and the order in which
modules run.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from distlora.adapter.attach import Attached, attach, linears_to_pack
from distlora.adapter.expert_layers import expert_weights
from distlora.adapter.linears import linears_of, shape_of
from distlora.adapter.packed import Packing, packing_maker
from distlora.errors import UserError
from distlora.maths.known_values import known_values
from distlora.models.hub import without_weights
from distlora.models.output import output_of
from distlora.models.targets import Batch
from distlora.plan.gathering import Event, Module, Piece
from distlora.recipe.sections import Recipe
from distlora.training.objective import objective_of
from distlora.training.objective_base import Objective
from distlora.training.targets import chosen_in


@dataclass(frozen=True, eq=False)
class Shapes:
    """A model as sizes. Objects are compared by identity, so that results for one can be cached.

    modules: the parameters of each module, by the module's number.
    forward: the modules as a forward pass enters and leaves them.
    blocks: numbers of the modules that activation checkpointing covers.
    names: the names of the modules, by number.
    trained: elements of every trained parameter.
    config: the text model's config, from transformers.
    width: bytes of one element of the weights.
    attention: the implementation that this machine would run.
    labels: number of labels of a classifier, else 0.
    length: tokens that the model makes of an image; None where the recipe says how long samples are.
    remarks: lines about the share of the weights that is adapted, and about layers that are not.
    whole_logits: whether the loss is taken of the logits of all tokens at once.
    sizes: elements of every parameter as it is stored; a shared one stands under its first name.
    linears: (out, in) of every linear layer.
    experts: (out, in) of one expert of every weight that holds experts.
    packings: how weights are packed, by the name of their layer.
    """

    modules: list[Module]
    forward: list[Event]
    blocks: set[int]
    names: list[str]
    trained: dict[str, int]
    attached: Attached
    config: object
    width: int
    attention: str
    labels: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    experts: dict[str, tuple[int, int]] = field(default_factory=dict)
    packings: dict[str, Packing] = field(default_factory=dict)
    length: int | None = None
    remarks: list[str] = field(default_factory=list)
    whole_logits: bool = False

    @property
    def elements(self) -> int:
        """Elements of all parameters with the adapters, before any is packed. A shared one counts once."""
        return sum(self.sizes.values()) + sum(
            prod(packing.shape) - packing.elements for packing in self.packings.values()
        )

    @property
    def scales(self) -> int:
        """Bytes of the scales of packed weights, which every rank holds whole."""
        return sum(packing.scale_nbytes for packing in self.packings.values())

    @property
    def factors(self) -> int:
        """Elements of the adapters, trained or frozen."""
        layers = self.attached.layers.values()
        return sum(prod(shape) for layer in layers for shape in layer.factor_shapes().values())

    def silent(self) -> set[int]:
        """Modules that end before the first trained parameter is used: no gradient passes through them."""
        found = set()
        for event in self.forward:
            if event.kind == "enter" and any(not piece.frozen for piece in self.modules[event.module]):
                break
            if event.kind == "leave":
                found.add(event.module)
        return found

    def targets(self) -> set[int]:
        """Numbers of the modules that are adapted, or whose weights are trained as targets."""
        wanted = set(self.attached.targets)
        return {number for number, name in enumerate(self.names) if name in wanted}


def shapes_of(recipe: Recipe) -> Shapes:
    """Reads the model's config, and no weights. Raises UserError where recipe and model do not fit."""
    config_only = recipe.model.model_copy(update={"path": without_weights(recipe.model.path)})
    recipe = recipe.model_copy(update={"model": config_only})
    objective = objective_of(recipe)
    objective.check_length()
    model = objective.bare_model()
    config = model.config.get_text_config(decoder=True)
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        raise UserError(
            f"model.path={recipe.model.path}: {type(model).__name__} has no attention, or blocks of several "
            "widths, whose memory and traffic this plan does not know"
        )
    chosen = chosen_in(model, recipe, objective)
    packings = _packings(recipe, model, objective.trained_whole(model), chosen.whole)
    linears = {name: shape_of(layer) for name, layer in linears_of(model).items()}
    experts = {name: weight.shape for name, weight in expert_weights(model).items()}
    stored = {f"{name}.weight": packing.elements for name, packing in packings.items()}
    attached = attach(model, recipe.method, chosen.layers, objective.trained_whole(model))
    named = dict(model.named_modules())
    number_of = {id(module): number for number, module in enumerate(named.values())}
    first_names: dict[int, str] = {}
    modules = []
    for prefix, module in named.items():
        pieces = []
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            own = first_names.setdefault(id(parameter), name)
            pieces.append(Piece(own, stored.get(own, parameter.numel()), not parameter.requires_grad))
        modules.append(tuple(pieces))
    return Shapes(
        modules,
        [Event(kind, number_of[id(module)]) for kind, module in _order(model, objective)],
        {number_of[id(block)] for block in _blocks(model)},
        list(named),
        {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad},
        attached,
        config,
        getattr(torch, recipe.model.dtype).itemsize,
        objective.attention(),
        len(objective.labels),
        {piece.name: piece.elements for module in modules for piece in module},
        linears,
        experts,
        packings,
        _tokens_of_an_image(model, objective.meta_sample(model)),
        chosen.lines,
        not objective.labels and output_of(model) is None,
    )


def _packings(
    recipe: Recipe, model: nn.Module, heads: set[str], whole: Collection[str]
) -> dict[str, Packing]:
    asked, storage = recipe.model.quantization, getattr(torch, recipe.model.dtype)
    if asked is None:
        return {}
    compute = asked.compute_dtype and getattr(torch, asked.compute_dtype)
    make = packing_maker(asked.kind, storage, compute, asked.double)
    return {name: make(shape_of(model.get_submodule(name))) for name in linears_to_pack(model, heads, whole)}


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the longest list of modules of one class: what activation checkpointing covers. An
    encoder-decoder has two such lists.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    longest = sorted(lists, key=len, reverse=True)[: 2 if model.config.is_encoder_decoder else 1]
    return [block for blocks in longest for block in blocks]


def _tokens_of_an_image(model: nn.Module, sample: Batch) -> int | None:
    """The length of what the first block is handed; None for a sample that is no image."""
    if "pixel_values" not in sample:
        return None
    lengths: list[int] = []
    hook = _blocks(model)[0].register_forward_pre_hook(
        lambda block, inputs, named: lengths.append((inputs or tuple(named.values()))[0].shape[1]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**sample)
    hook.remove()
    return lengths[0]


def _order(model: nn.Module, objective: Objective) -> list[tuple[str, nn.Module]]:
    """The modules as a forward pass enters and leaves them, observed on the meta device."""
    seen: list[tuple[str, nn.Module]] = []
    with _watched(model, seen), known_values():
        given = objective.meta_sample(model)
        if objective.labels:
            if "attention_mask" in given:  # in the form that DeBERTa takes as well
                given = given | {"attention_mask": torch.ones_like(given["input_ids"])}
            model(**given)
        elif output_of(model) is None:
            model(**given)
        else:
            hidden = model.base_model(**given, use_cache=False).last_hidden_state
            model.get_output_embeddings()(hidden)
    # In a run the outermost module encloses all others, because it is the one that calls the loss.
    return [("enter", model), *(item for item in seen if item[1] is not model), ("leave", model)]


@contextmanager
def _watched(model: nn.Module, seen: list[tuple[str, nn.Module]]) -> Iterator[None]:
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, inputs: seen.append(("enter", module))))
        hooks.append(
            module.register_forward_hook(lambda module, inputs, output: seen.append(("leave", module)))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
