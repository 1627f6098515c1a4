"""The model of a run: loaded, packed if asked for, adapted, and under an engine."""

import copy
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distlora import api
from distlora.adapter.attach import pack_linears
from distlora.adapter.packed import packer, scale_bytes
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.protocol import Engine
from distlora.engine.random_state import reseed
from distlora.initialisation.heads import draw_heads
from distlora.initialisation.pretrained import PretrainedFiles
from distlora.methods import TakesFromWeight
from distlora.models.hub import resolve_path
from distlora.models.stored_names import renamed
from distlora.progress import phase
from distlora.recipe.deepspeed_config import resolve_deepspeed
from distlora.recipe.sections import Recipe
from distlora.sentences import listed
from distlora.training.objective_base import Objective
from distlora.training.targets import Chosen, choose_targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """pretrained: the weights of packed layers before that, where the method needs them. tensorboard: where
    its log will lie, if there is to be one. deepspeed: the config as it was resolved. new: names of the
    parameters that the model's files lack.
    """

    engine: Engine
    adapted: api.Adapted
    pretrained: PretrainedFiles | None
    tensorboard: str | None
    deepspeed: dict[str, Any] | None
    new: frozenset[str]


def check_targets(recipe: Recipe, objective: Objective) -> Recipe:
    """Chooses the layers in the model without weights: what is wrong with targets or rank shows before
    anything is loaded. Returns the recipe with the method fitted to the model.
    """
    return recipe.model_copy(update={"method": choose_targets(recipe, objective).method})


def build(comm: Comm, recipe: Recipe, objective: Objective, chosen: Chosen) -> Built:
    """Collective. Errors: UserError on all ranks."""
    config = on_every_rank(comm, objective.load_config)
    engine, tensorboard, resolved = on_every_rank(comm, lambda: _make_engine(comm, recipe, config))
    settings, quantized = recipe.train, recipe.model.quantization is not None
    other_sizes = on_every_rank(comm, objective.check_sizes)
    with engine.loading(whole=quantized) as together:
        # Where ranks load together, one that fails must not wait for the others: its end tells them.
        load = partial(objective.load_model, other_sizes)
        with phase("loading the model"):
            model, new = load() if together else on_every_rank(comm, load)
    heads = new | objective.trained_whole(model)
    if quantized:
        _pack(model, heads, chosen.whole, recipe, comm.device)
    layers = [name for name in chosen.layers if f"{name}.weight" not in heads]
    with engine.attaching():
        adapted = api.attach(model, recipe.method, targets=layers, also_train=heads)
    pretrained = None
    if quantized and isinstance(recipe.method, TakesFromWeight):
        pretrained = on_every_rank(comm, lambda: _pretrained(adapted, recipe, type(model).__name__))
    # Every step is preceded by a rate of its own; one that is not known yet is never this one.
    rate = settings.lr_search.lowest if settings.searches_lr else settings.lr
    engine.start(
        model, OptimizerSpec(lr=rate, weight_decay=settings.weight_decay, **dict(settings.optimizer))
    )
    draw_heads(engine, new, settings.seed)
    if new:
        log.info(
            "new, since the model's files have none of this size, and drawn by train.seed=%d: %s",
            settings.seed, listed(sorted(new)),
        )  # fmt: skip
    objective.check_loaded(engine)
    # From here on ranks may draw different numbers (dropout); new heads were drawn alike.
    reseed(settings.seed + comm.rank, comm.device)
    return Built(engine, adapted, pretrained, tensorboard, resolved, frozenset(new))


def _make_engine(comm: Comm, recipe: Recipe, config) -> tuple[Engine, str | None, dict[str, Any] | None]:
    """The engine, where TensorBoard's log will lie, and the DeepSpeed config as it was resolved."""
    if recipe.deepspeed is None:
        return LocalEngine(comm, getattr(torch, recipe.model.dtype), recipe.train.clip), None, None
    # Late: DeepSpeed takes seconds, and the plain engine does without it.
    from distlora.engine.zero.engine import ZeroEngine

    hidden = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    resolved, lines = resolve_deepspeed(recipe, comm.world_size, hidden)
    for line in lines:
        log.info("%s", line)
    board = resolved.get("tensorboard", {})
    place = Path(board.get("output_path", ""), board.get("job_name", "")) if board.get("enabled") else None
    return ZeroEngine(comm, copy.deepcopy(resolved)), place and str(place), resolved


def _pack(
    model: nn.Module, heads: set[str], whole: Collection[str], recipe: Recipe, device: torch.device
) -> None:
    """Puts the linear weights but those of `whole` into the form that the recipe asks for."""
    asked, storage = recipe.model.quantization, getattr(torch, recipe.model.dtype)
    compute = asked.compute_dtype and getattr(torch, asked.compute_dtype)
    made = pack_linears(model, packer(asked.kind, storage, compute, asked.double), device, heads, whole)
    weights, scales = sum(packing.nbytes for packing in made), sum(map(scale_bytes, made))
    log.info(
        "%s: the weights of %d linear layers take %.1f MiB, and their scales %.1f MiB on every rank",
        asked.kind, len(made), weights / 2**20, scales / 2**20,
    )  # fmt: skip


def _pretrained(adapted: api.Adapted, recipe: Recipe, model_class: str) -> PretrainedFiles:
    directory = resolve_path(recipe.model.path)
    shapes = {name: layer.shape for name, layer in adapted.layers.items() if layer.packing is not None}
    return PretrainedFiles(
        directory, shapes, getattr(torch, recipe.model.dtype), partial(renamed, directory, model_class),
        [name for name in shapes if adapted.layers[name].fan_in_fan_out],
    )  # fmt: skip
