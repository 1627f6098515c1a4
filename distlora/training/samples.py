"""The samples of a run on this rank: brought, read, and in batches."""

import logging
from collections.abc import Iterator

import torch
from huggingface_hub import is_offline_mode

from distlora.data import Encoded, TrainOrder, download, is_at_hand, micro_batches, shard
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank
from distlora.initialisation.probe import Probe
from distlora.methods import ProbeSettings
from distlora.models.hub import may_download, resolve_path
from distlora.models.targets import Batch, loss_of_samples
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.sections import Recipe
from distlora.training.objective import Objective

#: Fewest samples that a fraction of the training set stands for (LoRA-SB's Table 5: quality is flat above).
FEWEST_PROBE_SAMPLES = 25

log = logging.getLogger(__name__)


def fetch(comm: Comm, recipe: Recipe) -> None:
    """Model and data into the local caches: one process a node brings them, the others wait. Collective.
    Where that may be a download, every rank says so; of a data set nobody knows before the hub is asked."""

    def bring() -> None:
        resolve_path(recipe.model.path, progress=log.info)
        for split in filter(None, (recipe.data.split, recipe.data.eval_split)):
            download(recipe.data, split)

    lacking = on_every_rank(comm, lambda: (may_download(recipe.model.path), not is_at_hand(recipe.data)))
    model, data = comm.sum(*lacking)  # before anyone downloads, or the others might find it there already
    if comm.world_size > 1 and (model or data) and not is_offline_mode():
        what = " and ".join(
            name for name, is_lacking in (("the model", model), ("the data", data)) if is_lacking
        )
        log.info(
            "%s: one rank of each node downloads what its cache lacks, and all ranks wait for that", what
        )
    on_every_rank(comm, lambda: bring() if comm.local_rank == 0 else None)


class RunSamples:
    """preprocessor: the tokenizer, or what else comes with the model and makes numbers of its inputs.
    training, held_out: the samples of both splits, the second empty without one. order: which of the first
    make up a step.
    """

    def __init__(self, comm: Comm, recipe: Recipe, objective: Objective):
        """Collective. Raises UserError, on all ranks, for what is wrong with the data."""
        self._comm, self._recipe, self._objective = comm, recipe, objective
        self.preprocessor = on_every_rank(comm, objective.load_preprocessor)
        self.training = on_every_rank(comm, lambda: self._read(recipe.data.split))
        self.held_out = (
            on_every_rank(comm, lambda: self._read(recipe.data.eval_split)) if recipe.data.eval_split else []
        )
        self.order = TrainOrder(len(self.training), recipe.train.global_batch_size, recipe.train.seed)
        self._accumulation = plan_batches(recipe, comm.world_size)

    def _read(self, split: str) -> list:
        encoded: Encoded = self._objective.read(split, self.preprocessor)
        cut = f"{encoded.truncated} truncated to {self._recipe.data.max_length} tokens, "
        log.info(
            "data: %d samples of split %s, %s%d dropped because %s",
            len(encoded.samples), split, "" if encoded.truncated is None else cut, encoded.dropped,
            encoded.why_dropped,
        )  # fmt: skip
        return encoded.samples

    def of_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, counted from 0; equally many on every rank."""
        micro = self._recipe.train.micro_batch_size
        indices = self.order.indices(step)
        return list(
            self._batches(
                self.training,
                micro_batches(indices, self._comm.rank, self._comm.world_size, micro, self._accumulation),
            )
        )

    def _batches(self, samples: list, parts: list[list[int]]) -> Iterator[Batch]:
        for indices in parts:
            part = [samples[i] for i in indices]
            yield self._objective.batch(part, self.preprocessor, self._comm.device)

    def probe_data(self, settings: ProbeSettings, number: int = 0) -> Probe:
        """The same training samples for every world size, drawn by the recipe's seed; others for every number
        of a probe.
        """
        count = probe_samples(settings.samples, len(self.training))
        generator = torch.Generator().manual_seed(self._recipe.train.seed + (number << 32))
        chosen = [
            self.training[i] for i in torch.randperm(len(self.training), generator=generator)[:count].tolist()
        ]

        def batches(size: int) -> Iterator[Batch]:
            for batch in self._batches(chosen, shard(count, self._comm.rank, self._comm.world_size, size)):
                if number == 0:  # a later probe is part of a recomposition, which must be whole
                    self._comm.sum_or_stop()
                yield batch

        forward_size = max(settings.micro_batch_size, self._recipe.train.micro_batch_size)
        return Probe(
            lambda: batches(settings.micro_batch_size),
            lambda: batches(forward_size),
            count,
            loss_of_samples(self._objective.loss),
        )


def probe_samples(setting: float, available: int | None) -> int:
    """How many samples `samples` stands for: itself, or below 1 that share of the training set, of which at
    least 25. available: the size of that; None where it is not known yet."""
    wanted = max(FEWEST_PROBE_SAMPLES, round(setting * (available or 0))) if setting < 1 else int(setting)
    return min(wanted, available or wanted)
