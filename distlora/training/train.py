"""A training run, from a recipe to an adapter.

recipe -> model -> attach -> engine -> initialise (or resume) -> steps -> export
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distlora.adapter.packed import library
from distlora.checkpoints.directory import share_checkpoint
from distlora.cluster import environment
from distlora.cluster.logs import RankLog
from distlora.cluster.status import StatusFile, new_start
from distlora.cluster.supervision import Supervision
from distlora.engine.comm import Comm, Topology
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.device import device_of
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.random_state import own_random_state
from distlora.errors import UserError, before_ranks_meet
from distlora.models.hub import on_the_hub
from distlora.recipe.combination import check_combination
from distlora.recipe.deepspeed_check import checked_deepspeed
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.sections import Recipe
from distlora.training.build import check_targets
from distlora.training.objective import Objective, objective_of
from distlora.training.run import Run, Summary
from distlora.training.run_directory import check_run_dir, claim_run_dir, find_checkpoint, with_format_of_run

log = logging.getLogger(__name__)


def check(recipe: Recipe, topology: Topology, resume: bool | None) -> None:
    """Everything that can be wrong with a recipe and needs neither weights nor other ranks.

    Errors: UserError.
    """
    with before_ranks_meet():
        check_run(recipe, topology.world_size, resume)


def check_run(recipe: Recipe, world_size: int, resume: bool | None) -> tuple[Recipe, Objective]:
    """The same without ranks. Returns the recipe as it is run, as far as the model is at hand, and what is
    learned."""
    recipe = with_format_of_run(recipe, resume)
    objective, config = check_settings(recipe, world_size)
    check_run_dir(recipe, resume)
    recipe = fitted(recipe, objective)
    check_combination(recipe, config)
    check_packages(recipe)
    for split in filter(None, (recipe.data.split, recipe.data.eval_split)):
        objective.check_split(split)
    return recipe, objective


def check_settings(recipe: Recipe, world_size: int) -> tuple[Objective, dict[str, Any]]:
    """What is learned, and the DeepSpeed config; {} without one. Raises UserError where they contradict."""
    objective = objective_of(recipe)
    plan_batches(recipe, world_size)
    if recipe.deepspeed is None:
        if world_size > 1:
            raise UserError(
                f"{world_size} ranks need DeepSpeed; set deepspeed: to a ZeRO config, or start one process"
            )
        return objective, {}
    # The sizes that depend on the model's width are of no interest here; contradictions are.
    return objective, checked_deepspeed(recipe, world_size, hidden_size=1)


def fitted(recipe: Recipe, objective: Objective) -> Recipe:
    """See `check_targets`; the recipe as it is where the model has to be fetched first. Errors: UserError."""
    if on_the_hub(recipe.model.path):
        return recipe
    objective.check_length()
    return check_targets(recipe, objective)


def check_packages(recipe: Recipe) -> None:
    """Raises UserError for a package that the recipe needs and that is not there."""
    lacking = OptimizerSpec(recipe.train.optimizer.name).problem()
    if lacking:
        raise UserError(lacking)
    if recipe.model.quantization is not None:
        library()


def train(
    recipe: Recipe,
    topology: Topology,
    resume: bool | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Runs a recipe that `check` has passed; on every rank. Returns the same summary on all.

    resume: None continues from the newest complete checkpoint of the run directory if there is one, True
    demands one, False begins anew. asked_to_stop: whether this rank should end early; one rank is enough.
    Raises UserError for mistakes that only weights or data show, TrainingError if training breaks, Preempted
    once a run that was asked to stop has stopped. With several ranks the process is ended, with exit code 1,
    where another one goes silent for `train.hang_timeout`.
    """
    device = device_of(topology.local_rank)
    supervision = Supervision(topology, recipe.train.hang_timeout)
    with own_random_state(recipe.train.seed, device), RankLog(topology.rank) as rank_log, supervision:
        comm = supervision.gather(device, recipe.deepspeed is not None, asked_to_stop)
        where = environment.resolve_topology(comm, topology)
        log.info("%s", environment.topology_line(where))
        checkpoint = share_checkpoint(
            comm, on_main(comm, recipe.output_dir, lambda: find_checkpoint(recipe, resume))
        )
        recipe = _in_format_of_run(comm, recipe, resume)
        status = StatusFile(
            Path(recipe.output_dir), checkpoint.step if checkpoint else 0, comm.share(new_start())
        )
        with supervision.telling(status):
            run = Run(comm, recipe, checkpoint, status)
            on_main(comm, recipe.output_dir, lambda: claim_run_dir(recipe, resume))
            on_main(comm, run.run_dir, lambda: status.write("running"))
            on_every_rank(comm, lambda: rank_log.open(run.run_dir))
            on_main(
                comm,
                run.run_dir,
                lambda: environment.record(run.run_dir, where, run.deepspeed, checkpoint and checkpoint.step),
            )
            return run.finish()


def _in_format_of_run(comm: Comm, recipe: Recipe, resume: bool | None = None) -> Recipe:
    """See `with_format_of_run`; rank 0 looks."""
    found = on_main(comm, recipe.output_dir, lambda: with_format_of_run(recipe, resume).format)
    return recipe.in_format(comm.share(found))
