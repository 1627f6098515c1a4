"""The samples of a run on this rank: brought, read, and in batches."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from huggingface_hub import is_offline_mode

from distlora.data import (
    Arrangement,
    Encoded,
    TrainOrder,
    by_length,
    download,
    in_a_row,
    is_at_hand,
    one_by_one,
    packed,
    shard,
)
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank
from distlora.errors import UserError
from distlora.initialisation.probe import Probe, probe_samples
from distlora.methods import ProbeSettings
from distlora.models.hub import may_download, resolve_path
from distlora.models.targets import Batch, loss_of_samples
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.sections import DataSection, Recipe
from distlora.training.evaluation_sets import SetOfSamples, sets_of
from distlora.training.objective import Objective

log = logging.getLogger(__name__)


def splits_read(recipe: Recipe) -> list[tuple[DataSection, str]]:
    """What training reads: the training split, and those of all evaluation sets."""
    sets = recipe.data.evaluation_sections.values()
    return [(recipe.data, recipe.data.split), *((section, section.eval_split) for section in sets)]


def fetch(comm: Comm, recipe: Recipe, wanted: Sequence[tuple[DataSection, str]] | None = None) -> None:
    """Model and data into the local caches: one process a node brings them, the others wait. Collective.
    Where that may be a download, every rank says so; of a data set nobody knows before the hub is asked.

    wanted: splits of data sections; None for what training reads.
    """
    wanted = splits_read(recipe) if wanted is None else wanted

    def bring() -> None:
        resolve_path(recipe.model.path, tell=log.info)
        for section, split in wanted:
            download(section, split)

    lacking = on_every_rank(
        comm,
        lambda: (
            may_download(recipe.model.path),
            not all(is_at_hand(section) for section, _ in wanted),
        ),
    )
    model, data = comm.sum(*lacking)  # before anyone downloads, or the others might find it there already
    if comm.world_size > 1 and (model or data) and not is_offline_mode():
        what = " and ".join(
            name for name, is_lacking in (("the model", model), ("the data", data)) if is_lacking
        )
        log.info(
            "%s: one rank of each node downloads what its cache lacks, and all ranks wait for that", what
        )
    on_every_rank(comm, lambda: bring() if comm.local_rank == 0 else None)


def read_samples(objective: Objective, split: str, preprocessor) -> list:
    """The samples of a split, and a line on them in the log. Raises UserError."""
    encoded: Encoded = objective.read(split, preprocessor)
    objective.check_samples(encoded.samples, preprocessor)
    log.info(
        "data: %d samples of split %s, %s%d dropped because %s",
        len(encoded.samples), split, objective.told_of(encoded), encoded.dropped, encoded.why_dropped,
    )  # fmt: skip
    return encoded.samples


def read_sets(recipe: Recipe, objective: Objective, preprocessor) -> list[SetOfSamples]:
    """What a run is evaluated on. objective: the run's. Raises UserError."""
    return [
        SetOfSamples(name, each, read_samples(each, each.recipe.data.eval_split, preprocessor))
        for name, each in sets_of(recipe, objective).items()
    ]


class RunSamples:
    """preprocessor: the tokenizer, or what else comes with the model and makes numbers of its inputs.
    training: its samples. evaluated: the sets of the evaluation, none without such. order: which of the
    training samples make up a step.
    """

    def __init__(self, comm: Comm, recipe: Recipe, objective: Objective):
        """Collective. Raises UserError, on all ranks, for what is wrong with the data."""
        self._comm, self._recipe, self._objective = comm, recipe, objective
        self.preprocessor = on_every_rank(comm, objective.load_preprocessor)
        self.training = on_every_rank(
            comm, lambda: read_samples(objective, recipe.data.split, self.preprocessor)
        )
        self.evaluated = on_every_rank(comm, lambda: read_sets(recipe, objective, self.preprocessor))
        self.order = TrainOrder(len(self.training), recipe.train.global_batch_size, recipe.train.seed)
        self._accumulation = plan_batches(recipe, comm.world_size)

    def of_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, counted from 0; equally many on every rank."""
        return self._micro_batches(self.order.indices(step))

    def load_of_step(self, step: int) -> tuple[int, float | None]:
        """Of all ranks' micro-batches of a step: tokens or images, as the objective counts, and the share of
        padding in their rows, None for images.
        """
        sizes = self._sizes(self.order.indices(step))
        padded = self._objective.unit == "tokens"
        return sum(sizes), self._arranged(sizes).padding(sizes) if padded else None

    def _sizes(self, indices: Sequence[int]) -> list[int]:
        return [self._objective.size(self.training[i]) for i in indices]

    def _arranged(self, sizes: Sequence[int]) -> Arrangement:
        """How samples of these sizes, which make up a global batch, become micro-batches."""
        data, micro, world = self._recipe.data, self._recipe.train.micro_batch_size, self._comm.world_size
        if data.packing:
            return packed(sizes, data.max_length, world, micro)
        if data.group_by_length:
            return by_length(sizes, world, micro)
        return one_by_one(len(sizes), world, micro, self._accumulation)

    def _micro_batches(self, indices: Sequence[int]) -> list[Batch]:
        """This rank's part of the training samples that make up a global batch."""
        passes = self._arranged(self._sizes(indices)).ranks[self._comm.rank]
        return [
            self._batch([[self.training[indices[place]] for place in row] for row in rows]) for rows in passes
        ]

    def _batch(self, rows: list[list]) -> Batch:
        packs = self._recipe.data.packing
        samples = [in_a_row(row) for row in rows] if packs else [sample for row in rows for sample in row]
        return self._objective.batch(samples, self.preprocessor, self._comm.device)

    def rows_of_step(self, step: int) -> list[tuple[int | None, Batch]]:
        """The rows of a step: see `rows`."""
        return list(self.rows(self.order.indices(step)))

    def rows(self, indices: list[int]) -> Iterator[tuple[int | None, Batch]]:
        """This rank's share of these samples, each with its number and as a batch of its own; equally many on
        every rank, where one lacks a sample None and a batch of weight zero.
        """
        world = self._comm.world_size
        own: list[int | None] = indices[self._comm.rank :: world]
        own += [None] * (-(-len(indices) // world) - len(own))
        parts = [[] if number is None else [number] for number in own]
        return zip(own, self._batches(self.training, parts))

    def _batches(self, samples: list, parts: list[list[int]]) -> Iterator[Batch]:
        for indices in parts:
            part = [samples[i] for i in indices]
            yield self._objective.batch(part, self.preprocessor, self._comm.device)

    def trial(self, steps: int, count: int) -> tuple["StepsOfBatches", list[Batch]]:
        """This rank's micro-batches of `steps` global batches, and batches of `count` training samples that
        are in none of them, the same samples on any number of ranks: see `trial_indices`. Errors: UserError.
        """
        rank, world = self._comm.rank, self._comm.world_size
        micro = self._recipe.train.micro_batch_size
        trained, held_back = self._trial_indices(steps, count)
        chosen = [self.training[i] for i in held_back]
        return (
            StepsOfBatches(trained, self._micro_batches),
            list(self._batches(chosen, shard(len(chosen), rank, world, micro))),
        )

    def rows_of_trial(self, steps: int, count: int) -> Iterator[tuple[int | None, Batch]]:
        """All samples of a trial, as in `rows`."""
        trained, held_back = self._trial_indices(steps, count)
        return self.rows(sorted({*held_back, *itertools.chain(*trained)}))

    def _trial_indices(self, steps: int, count: int) -> tuple[list[list[int]], list[int]]:
        order = [i for step in range(self.order.steps_per_epoch) for i in self.order.indices(step)]
        return trial_indices(order, steps, self._recipe.train.global_batch_size, count)

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
            loss_of_samples(self._objective.training_loss),
            len(shard(count, self._comm.rank, self._comm.world_size, settings.micro_batch_size)),
        )


class StepsOfBatches(Sequence):
    """The micro-batches of several steps, made for one step at a time: a device may have no room for all."""

    def __init__(self, steps: Sequence[list[int]], batches_of: Callable[[list[int]], list[Batch]]):
        """steps: for each step the samples of its global batch."""
        self._steps, self._batches_of = steps, batches_of

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> list[Batch]:
        return self._batches_of(self._steps[step])


def trial_indices(
    order: Sequence[int], steps: int, batch_size: int, count: int
) -> tuple[list[list[int]], list[int]]:
    """The samples of trial steps, and `count` others, at most half of all. order: in which they are trained.

    The steps take what the run's own first steps do, as long as there are enough others; then they begin
    again. Errors: UserError where there are too few samples to hold one back.
    """
    count = min(count, len(order) // 2)
    if not count:
        raise UserError("train.lr=search holds training samples back, and there is only one: set a number")
    rest, held_back = order[:-count], list(order[-count:])
    size = min(batch_size, len(rest))
    wanted = itertools.islice(itertools.cycle(rest), steps * size)
    return [list(itertools.islice(wanted, size)) for _ in range(steps)], held_back
