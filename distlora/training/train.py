"""A training run, from a recipe to an adapter.

recipe -> model -> attach -> engine -> initialise (or resume) -> steps -> export
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distlora.checkpoints.directory import share_checkpoint
from distlora.cluster import environment
from distlora.cluster.lease import Lease, take_lease
from distlora.cluster.logs import LOGS, RankLog
from distlora.cluster.status import StatusFile, new_start
from distlora.cluster.supervision import Supervision
from distlora.engine.comm import Comm, Topology
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.device import device_of
from distlora.engine.random_state import own_random_state
from distlora.errors import Preempted, UserError, before_ranks_meet
from distlora.files.problems import WriteErrors
from distlora.models.hub import on_the_hub
from distlora.recipe.combination import check_combination
from distlora.recipe.deepspeed_check import checked_deepspeed
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.packages import check_packages
from distlora.recipe.sections import Recipe
from distlora.training.adapter_start import with_start
from distlora.training.build import check_targets
from distlora.training.evaluation_sets import score_names, sets_of
from distlora.training.improvement import check_metrics
from distlora.training.monitor import writers_silenced
from distlora.training.objective import Objective, objective_of
from distlora.training.run import Run
from distlora.training.run_directory import check_run_dir, claim_run_dir, find_checkpoint, with_format_of_run
from distlora.training.summary import Summary
from distlora.training.writing import Writing

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
    recipe = with_start(with_format_of_run(recipe, resume))
    objective, config = check_settings(recipe, world_size)
    check_run_dir(recipe, resume)
    recipe = fitted(recipe, objective)
    check_combination(recipe, config)
    check_packages(recipe, config)
    objective.check_split(recipe.data.split)
    sets = sets_of(recipe, objective)
    for each in sets.values():
        each.check_split(each.recipe.data.eval_split)
    check_metrics(recipe.train, score_names(sets))
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


def train(
    recipe: Recipe,
    topology: Topology,
    resume: bool | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    take_over: bool = False,
    allow_changed_data: bool = False,
) -> Summary:
    """Runs a recipe that `check` has passed; on every rank. Returns the same summary on all.

    resume: None continues from the newest complete checkpoint of the run directory if there is one, True
    demands one, False begins anew. take_over: the directory of a start on another host, without waiting for
    its silence. allow_changed_data: continue also with other samples than the run was begun with.
    asked_to_stop: whether this rank should end early; one rank is enough.
    Raises UserError for mistakes that only weights or data show, TrainingError if training breaks, Preempted
    once a run that was asked to stop has stopped. With several ranks the process is ended, with exit code 1,
    where another one goes silent for `train.hang_timeout`.
    """
    with before_ranks_meet():
        recipe = with_start(recipe)
    device, errors = device_of(topology.local_rank), WriteErrors()
    supervision = Supervision(topology, recipe.train.hang_timeout, Path(recipe.output_dir) / LOGS)
    with (
        own_random_state(recipe.train.seed, device),
        RankLog(topology.rank, errors) as rank_log,
        writers_silenced(),
        supervision,
    ):
        comm = supervision.gather(device, recipe.deepspeed is not None, asked_to_stop)
        where = environment.resolve_topology(comm, topology)
        log.info("%s", environment.topology_line(where))
        run_dir, start = Path(recipe.output_dir), comm.share(new_start())
        with comm.course.during("waiting for the run directory", patient=True):
            lease = on_main(comm, run_dir, lambda: _lease(run_dir, start, take_over, asked_to_stop))
        if comm.share(comm.is_main and lease is None):
            comm.sum_or_stop()  # which raises Preempted on all ranks
        with supervision.owning(lease), rank_log.opened_by_crash(run_dir):
            checkpoint = share_checkpoint(
                comm, on_main(comm, run_dir, lambda: find_checkpoint(recipe, resume))
            )
            recipe = _in_format_of_run(comm, recipe, resume)
            status = StatusFile(run_dir, checkpoint.step if checkpoint else 0, start)
            with supervision.telling(status):
                writing = Writing(comm, lease, errors)
                run = Run(comm, recipe, checkpoint, status, writing, allow_changed_data)
                # Loading takes minutes, in which another start may have taken the directory over.
                writing.on_main(run_dir, lambda: _claim(recipe, resume, status))
                writing.on_main(run_dir, lambda: run.seen.write(run_dir))
                on_main(comm, run_dir, writing.check)
                on_every_rank(comm, lambda: rank_log.open(run_dir))
                writing.on_main(run_dir, lambda: environment.record(run_dir, where, run.deepspeed, None))
                return run.finish()


def _lease(run_dir: Path, start: str, take_over: bool, asked_to_stop: Callable[[], bool]) -> Lease | None:
    """See `take_lease`; None if this process was asked to stop while it waited for it."""

    def pause(seconds: float) -> None:
        if asked_to_stop():
            raise Preempted("asked to stop")
        time.sleep(seconds)

    try:
        return take_lease(run_dir, start, take_over, pause=pause)
    except Preempted:
        return None


def _claim(recipe: Recipe, resume: bool | None, status: StatusFile) -> None:
    """The directory is this run's from here on. Nothing is written to one on a disk that is full already."""
    status.claim()
    claim_run_dir(recipe, resume)
    status.write("running")


def _in_format_of_run(comm: Comm, recipe: Recipe, resume: bool | None = None) -> Recipe:
    """See `with_format_of_run`; rank 0 looks."""
    found = on_main(comm, recipe.output_dir, lambda: with_format_of_run(recipe, resume))
    number, day = comm.share(found and [found.format, found.data.chat_date])
    data = recipe.data.model_copy(update={"chat_date": day})
    return recipe.model_copy(update={"data": data}).in_format(number)
