"""The model of an evaluation: a run's checkpoint, or a model as it is, perhaps with an adapter of PEFT's."""

import logging
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from distlora import api
from distlora.adapter.layer import AdapterLinear
from distlora.checkpoints.directory import Checkpoint
from distlora.checkpoints.stored import MANIFEST
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.exports.peft_files import PeftFiles, digest_of_weights
from distlora.files.atomic import sha256_of
from distlora.maths.low_rank import LowRank
from distlora.methods import HasMagnitude, magnitude_of
from distlora.models.hub import on_the_hub, resolve_path
from distlora.recipe.sections import Recipe
from distlora.recipe.strict import show
from distlora.training.build import Built, build
from distlora.training.evaluated import Subject
from distlora.training.objective import Objective
from distlora.training.targets import choose_targets

log = logging.getLogger(__name__)


def refuse_other_base(subject: Subject, objective: Objective) -> None:
    """Raises UserError where an adapter does not fit the model; not before the model is at hand."""
    path = subject.recipe.model.path
    if subject.adapter is not None and not on_the_hub(path):
        subject.adapter.refuse_other_model(objective.bare_model(), path)


def tell_other_base(adapter: PeftFiles, path: str) -> None:
    """Warns of an adapter that fits a model, and says of itself that it was trained on one of another name.
    Directories are compared by their last part: a copy of a model may lie anywhere.
    """
    base = adapter.config.get("base_model_name_or_path")
    if isinstance(base, str) and base and PurePath(base).name != PurePath(path).name:
        log.warning(
            "%s says that it was trained on %s, and is put on %s, whose layers have the same shapes",
            adapter.directory, show(base), path,
        )  # fmt: skip


class Evaluated:
    """step: of the run, when this was its state; 0 of a model alone."""

    def __init__(
        self,
        comm: Comm,
        recipe: Recipe,
        objective: Objective,
        subject: Subject,
        checkpoint: Checkpoint | None,
    ):
        """recipe: of the subject, fitted to the ranks. checkpoint: of a run. Collective; loads nothing."""
        self.comm, self.recipe, self.objective = comm, recipe, objective
        self.subject, self.checkpoint = subject, checkpoint
        adapter = subject.adapter
        self.step = checkpoint.step if checkpoint else adapter.step if adapter else 0
        if adapter is not None:
            model = on_every_rank(comm, objective.bare_model)
            on_every_rank(comm, lambda: adapter.refuse_other_model(model, recipe.model.path))
            if comm.is_main:
                tell_other_base(adapter, recipe.model.path)

    @property
    def place(self) -> str:
        """What was evaluated, for the user."""
        return str(self.checkpoint.path) if self.checkpoint else self.subject.name

    def identity(self) -> dict[str, Any]:
        """What tells this state of the model from others; JSON. For rank 0: it reads files."""
        model = self.recipe.model
        if self.checkpoint is not None:
            checkpoint = sha256_of(self.checkpoint.path / MANIFEST)
            return {"model": model.path, "dtype": model.dtype, "checkpoint": checkpoint}
        adapter = self.subject.adapter
        weights = digest_of_weights(resolve_path(model.path))
        return {"model": weights, "dtype": model.dtype, "adapter": adapter and adapter.digest}

    def engine(self) -> Engine:
        """The model, loaded, in an engine. Collective; once."""
        chosen = on_every_rank(self.comm, lambda: choose_targets(self.recipe, self.objective))
        built = build(self.comm, self.recipe, self.objective, chosen)
        if self.checkpoint is not None:
            api.load(
                built.adapted, built.engine, self.checkpoint, training=False, seed=self.recipe.train.seed,
                pretrained=built.pretrained,
            )  # fmt: skip
        else:
            self._refuse_random_heads(built)
            if self.subject.adapter is not None:
                put_on(built.engine, self.subject.adapter)
        return built.engine

    def _refuse_random_heads(self, built: Built) -> None:
        adapter = self.subject.adapter
        lacking = sorted(built.new - (set(adapter.heads) if adapter else set()))
        if lacking:
            raise UserError(
                f"{self.recipe.model.path} has no weights for {', '.join(lacking[:3])}: it was not trained "
                f"for the task {self.recipe.data.task}; name another model, or its --adapter",
                agreed=True,
            )


@torch.no_grad()
def put_on(engine: Engine, adapter: PeftFiles) -> None:
    """Writes an adapter into an engine whose layers are those of the adapter, in factors that are zero.

    Pairs are added to the weights, in float32 with one rounding, where no other layer has the same weight and
    it is not packed; elsewhere they are put beside it. Collective.
    """
    device = engine.comm.device

    def read(what, name: str) -> Any:
        return on_every_rank(engine.comm, lambda: what(name))

    for name, layer in engine.layers.items():
        pair: LowRank = read(adapter.pair, name)
        pair = LowRank(pair.left.to(device), pair.right.to(device))
        if layer.packing is not None or _is_shared(engine.module, layer):
            layer.put_beside(pair)
        else:
            engine.add_low_rank(layer, pair, "nearest", 0)
        if isinstance(layer.method, HasMagnitude):
            engine.write(layer, {magnitude_of(layer.method): read(adapter.magnitude, name).to(device)})
    for name in adapter.heads:
        value: Tensor = read(adapter.head, name)
        engine.write_parameter(name, value.to(device))


def _is_shared(model: nn.Module, layer: AdapterLinear) -> bool:
    return sum(p is layer.weight for module in model.modules() for p in module.parameters(recurse=False)) > 1
