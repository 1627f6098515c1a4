"""One recipe on one number of ranks: the resolved DeepSpeed config as numbers, and what each rank holds."""

import functools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from distlora.data import TrainOrder
from distlora.methods import Method, ProbeSettings, Recomposes, recomposing
from distlora.plan.gathering import Gathered, Limits, gather, training_order
from distlora.plan.shapes import Shapes
from distlora.recipe.combination import check_combination
from distlora.recipe.deepspeed_check import checked_deepspeed
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.deepspeed_resolution import look_up
from distlora.recipe.sections import Recipe
from distlora.training.samples import probe_samples

#: DeepSpeed's defaults, in elements.
PERSISTENCE, BUCKET, ALL_GATHER_BUCKET = 100_000, 500_000_000, 500_000_000
FLOAT32 = torch.float32.itemsize


@dataclass(frozen=True)
class Setup:
    """A recipe on `world_size` ranks.

    samples: of the training set; None where its size is not known before it is read. config: DeepSpeed's
    config without any "auto"; {} without DeepSpeed. accumulation: micro-batches a step on every rank.
    """

    recipe: Recipe
    shapes: Shapes
    world_size: int
    samples: int | None
    config: dict[str, Any]
    accumulation: int

    @property
    def method(self) -> Method:
        return self.recipe.method

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the adapted layers. Every expert of a stack counts as a layer of its own."""
        found = {}
        for name, layer in self.shapes.attached.layers.items():
            names = [f"{name}.{expert}" for expert in range(*layer.stack)] if layer.stack else [name]
            found |= dict.fromkeys(names, layer.shape)
        return found

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return self.shapes.length or self.recipe.data.max_length

    @property
    def zero(self) -> dict[str, Any]:
        return self.config.get("zero_optimization", {})

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def checkpointing(self) -> bool:
        return self.recipe.model.gradient_checkpointing

    @property
    def group(self) -> int:
        """Number of ranks that hold the frozen weights once between them (hpZ); 1 without hpZ."""
        return self.zero.get("zero_hpz_partition_size", 1)

    @property
    def summed_at_once(self) -> int:
        """Elements of the gradients that ranks add up at stages 0 and 1: at stage 1 in bfloat16 with the
        padding that lets the ranks share them."""
        trained = sum(self.shapes.trained.values())
        padded = self.stage == 1 and self.shapes.width < FLOAT32 and not self.offloads("optimizer")
        return -(-trained // (2 * self.world_size)) * 2 * self.world_size if padded else trained

    @property
    def bucket(self) -> int:
        """Elements of one bucket of gradients."""
        return int(self.zero.get("reduce_bucket_size", BUCKET))

    def offloads(self, what: str) -> bool:
        """Whether this lies in host memory. what: "param" or "optimizer"."""
        return look_up(self.zero, f"offload_{what}.device") == "cpu"

    @property
    def limits(self) -> Limits:
        own = Limits()
        return Limits(
            int(self.zero.get("stage3_max_reuse_distance", own.reuse)),
            int(self.zero.get("stage3_max_live_parameters", own.live)),
            int(self.zero.get("stage3_prefetch_bucket_size", own.prefetch)),
        )

    def padded(self, elements: int) -> int:
        """Elements of a partitioned tensor with its padding: every rank has the same number."""
        return -(-elements // self.world_size) * self.world_size

    @property
    def threshold(self) -> int:
        """The largest number of elements of a persistent parameter."""
        return int(self.zero.get("stage3_param_persistence_threshold", PERSISTENCE))

    @cached_property
    def persistent(self) -> set[str]:
        """Names of the parameters that every rank keeps whole under ZeRO-3, in addition to its part."""
        return {name for name, size in self.shapes.sizes.items() if size <= self.threshold}

    @cached_property
    def partitioned(self) -> set[str]:
        return set(self.shapes.sizes) - self.persistent

    def gathered(self, probe: bool = False, recorded: bool = True) -> Gathered:
        """What ZeRO-3 gathers in a forward and a backward pass over one micro-batch.

        probe: whether it is a pass of the probe. recorded: as in `gathering.gather`.
        """
        return _gathered(self.shapes, self.limits, self.threshold, self.checkpointing, probe, recorded)

    # ------------------------------------------------------------------ the run

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None where they depend on data that is not read yet."""
        train = self.recipe.train
        if train.steps or self.samples is None:
            return train.steps
        return max(
            1,
            round(
                train.epochs * TrainOrder(self.samples, train.global_batch_size, train.seed).steps_per_epoch
            ),
        )

    @cached_property
    def recomposing(self) -> Recomposes | None:
        """The method, if it replaces components as it is set."""
        return recomposing(self.method) if self.layers else None

    @cached_property
    def recompositions(self) -> int:
        """The largest number of recompositions in the run; 0 where its length is not known."""
        if self.recomposing is None or self.steps is None:
            return 0
        schedule = self.recomposing.recomposition_schedule(self.steps)
        decisions = (schedule.after_step(done, 1.0, lambda: 0.0) for done in range(1, self.steps + 1))
        return sum(decision is not None and decision.recompose for decision in decisions)

    @property
    def columns_of_a_recomposition(self) -> int:
        """Columns that one recomposition adds to a layer's ledger: fused components and their successors."""
        method = self.recomposing
        if method is None:
            return 0
        count = len(method.choose(torch.zeros(method.rank)))
        return count if method.refill_from() == "restart" else 2 * count

    def probe_passes(self, settings: ProbeSettings) -> int:
        """Backward passes of a probe, on every rank."""
        return self.passes(settings, settings.micro_batch_size)

    def passes(self, settings: ProbeSettings, size: int) -> int:
        """Passes over the probe's samples on every rank, with micro-batches of `size`."""
        return -(-self.probe_samples(settings) // (self.world_size * size))

    def probe_samples(self, settings: ProbeSettings) -> int:
        return probe_samples(settings.samples, self.samples)


@functools.lru_cache(maxsize=64)  # the result does not depend on the number of ranks
def _gathered(
    shapes: Shapes, limits: Limits, threshold: int, checkpointing: bool, probe: bool, recorded: bool
) -> Gathered:
    modules = [tuple(piece for piece in pieces if piece.elements > threshold) for pieces in shapes.modules]
    # With activation checkpointing the embeddings require a gradient in training. In the probe, which always
    # uses checkpointing, they do not.
    silent = set() if checkpointing and not probe else shapes.silent()
    holders = {number for number, pieces in enumerate(modules) if pieces}
    events = training_order(
        shapes.forward, shapes.blocks if checkpointing or probe else set(), silent, holders
    )
    return gather(modules, events, limits, recorded)


def setup_of(recipe: Recipe, shapes: Shapes, world_size: int, samples: int | None = None) -> Setup:
    """The recipe on `world_size` ranks. Raises UserError where it cannot run on so many."""
    recipe = recipe.model_copy(update={"method": shapes.attached.method})
    accumulation = plan_batches(recipe, world_size)
    config: dict[str, Any] = {}
    if recipe.deepspeed is not None:
        config = checked_deepspeed(recipe, world_size, getattr(shapes.config, "hidden_size", None))
    check_combination(recipe, config)
    return Setup(recipe, shapes, world_size, samples or samples_of(recipe), config, accumulation)


def samples_of(recipe: Recipe) -> int | None:
    """The size of the training set if `data.split` says it, as in train[:50000] or train[1000:2000]."""
    found = re.fullmatch(r"\w+\[(\d*):(\d+)\]", recipe.data.split)
    return int(found[2]) - int(found[1] or 0) if found else None
