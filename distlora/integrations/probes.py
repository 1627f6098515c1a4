"""The probe of a method that starts from gradients, made of a trainer's own data, collator and loss."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distlora.api import Probe
from distlora.data.batches import shard
from distlora.errors import UserError
from distlora.initialisation.probe import probe_samples
from distlora.methods import ProbeSettings, probe_of, recomposing
from distlora.models.targets import IGNORE


@dataclass(frozen=True)
class _Pass:
    """Collated inputs, and how many samples their mean loss stands for."""

    inputs: dict[str, Any]
    weight: int


def probe_of_trainer(trainer: Any, number: int) -> Probe:
    """The training samples of the j-th probe (0: of the start), the same for every number of ranks.

    Errors: UserError where the trainer has no samples, or none of them has a target.
    """
    method = trainer.adapted.method
    recomposes = recomposing(method)
    settings = (recomposes and recomposes.refill_probe()) or probe_of(method)
    samples = _samples(trainer, settings, number)
    passes = _passes(trainer, samples, settings.micro_batch_size)

    def loss(model: nn.Module, batch: _Pass) -> torch.Tensor:
        inputs = trainer._prepare_inputs(dict(batch.inputs))  # of which a loss takes away what it has read
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs) * batch.weight

    return Probe(lambda: iter(passes), lambda: iter(passes), len(samples), loss)


def _samples(trainer: Any, settings: ProbeSettings, number: int) -> list[Any]:
    """Drawn by the run's seed, others for every number; of a stream the next ones from its beginning."""
    rows = trainer.train_dataset
    if rows is None:
        raise UserError(f"method {trainer.adapted.method.name} starts from gradients: give train_dataset=")
    try:
        size = len(rows)
    except TypeError:
        count = probe_samples(settings.samples, None)
        chosen = list(itertools.islice(iter(rows), number * count, (number + 1) * count))
    else:
        count = probe_samples(settings.samples, size)
        generator = torch.Generator().manual_seed(trainer.args.seed + (number << 32))
        chosen = [rows[i] for i in torch.randperm(size, generator=generator)[:count].tolist()]
    if not chosen:
        raise UserError(f"the training set has no samples left for probe {number + 1} of the run")
    return chosen


def _passes(trainer: Any, samples: list[Any], size: int) -> list[_Pass]:
    """This rank's, equally many on every rank. One without a target has weight 0."""
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="probe")
    shares = shard(len(samples), trainer.args.process_index, trainer.args.world_size, size)
    found = [
        _Pass(dict(collate([samples[i] for i in share])), len(share)) if share else None for share in shares
    ]
    own = (each.inputs for each in found if each is not None)
    usable = next(filter(_has_target, itertools.chain(own, (dict(collate([row])) for row in samples))), None)
    if usable is None:
        raise UserError(
            f"none of the {len(samples)} samples of the probe has a label that counts: raise samples= in the "
            "method's init, or look at what the collator makes of labels",
            agreed=True,
        )
    # The mean loss over no targets is NaN.
    idle = _Pass(usable, 0)
    return [each if each is not None and _has_target(each.inputs) else idle for each in found]


def _has_target(inputs: dict[str, Any]) -> bool:
    labels = inputs.get("labels")
    return not isinstance(labels, torch.Tensor) or bool((labels != IGNORE).any())
