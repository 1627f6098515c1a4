"""An evaluation: of a run's newest checkpoint, or of a model that something else has trained, on the run's
own evaluation split or on any tasks. No training data is read.
"""

from collections.abc import Callable
from pathlib import Path

from distlora.checkpoints.directory import newest
from distlora.cluster.logs import LOGS
from distlora.cluster.supervision import Supervision
from distlora.engine.comm import Topology
from distlora.engine.coordination import on_every_rank
from distlora.engine.device import device_of
from distlora.engine.random_state import own_random_state
from distlora.errors import Preempted, UserError, before_ranks_meet
from distlora.evaluation.scoring import check_scores
from distlora.recipe.combination import check_combination
from distlora.recipe.packages import check_packages
from distlora.recipe.sections import Recipe
from distlora.tasks import try_judge
from distlora.training.evaluated import Asked, Subject, fitted_to_ranks, sections_of
from distlora.training.evaluation_jobs import objective_for
from distlora.training.evaluation_scores import Scores, scores_of_tasks
from distlora.training.evaluation_sets import generated_scores, scores_of_sets, sets_of
from distlora.training.objective import Objective, objective_of
from distlora.training.samples import fetch, read_sets
from distlora.training.subject import Evaluated, refuse_other_base
from distlora.training.train import check_settings, fitted

#: What the split of an evaluation without tasks is called in the answer of `evaluate`.
OWN_SPLIT = ""
#: The sentence of an evaluation that was asked to stop and has stopped.
STOPPED = "asked to stop; the same command goes on from the predictions so far"


def check(subject: Subject, topology: Topology, asked: Asked) -> None:
    """Everything that can be wrong with an evaluation and needs neither weights nor other ranks.

    Errors: UserError.
    """
    with before_ranks_meet():
        recipe = _of_model(subject, fitted_to_ranks(subject.recipe, topology.world_size), asked)
        objective, config = check_settings(recipe, topology.world_size)
        refuse_other_base(subject, objective)
        recipe = fitted(recipe, objective)
        check_combination(recipe, config)
        check_packages(recipe, config)
        if not asked.tasks:
            sets = sets_of(recipe, objective)
            if not sets:
                raise UserError("data.eval_split is null, so there is nothing to evaluate on; name a split")
            for each in sets.values():
                each.check_split(each.recipe.data.eval_split)
            if recipe.train.exact_match_samples:
                try_judge(recipe.data.task)
        check_tasks(subject, recipe, asked, objective)


def check_tasks(subject: Subject, recipe: Recipe, asked: Asked, objective: Objective) -> None:
    """Raises UserError for tasks that the model cannot do, and for what is wrong with data that is at hand.

    objective: what the model was trained for.
    """
    for name, section in sections_of(subject, asked).items():
        objective_for(subject, recipe, section, objective).check_split(section.eval_split)
        if asked.way == "generation":
            try_judge(name)


def evaluate(
    subject: Subject,
    topology: Topology,
    asked: Asked,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Scores]:
    """Evaluates what `check` has passed; on every rank. Returns the same scores on all: those of each task
    and the means of each suite by name, or under OWN_SPLIT those of the run's own evaluation split.

    Predictions and scores of tasks are written to `eval/` in the directory of the run, or in `asked.out`; an
    evaluation that was cut short goes on from there, on any number of ranks. Raises UserError for mistakes
    that only weights or data show, and for predictions of another evaluation that lie in the way;
    TrainingError for a score that is not finite; Preempted once an evaluation that was asked to stop has
    stopped.
    """
    recipe = _of_model(subject, fitted_to_ranks(subject.recipe, topology.world_size), asked)
    with (
        own_random_state(recipe.train.seed, device := device_of(topology.local_rank)),
        Supervision(topology, recipe.train.hang_timeout, _logs(subject, asked)) as supervision,
    ):
        comm = supervision.gather(device, recipe.deepspeed is not None, asked_to_stop)
        checkpoint = newest(recipe.output_dir, comm) if subject.run else None
        if subject.run and checkpoint is None:
            raise UserError(f"{recipe.output_dir} holds no complete checkpoint; train first", agreed=True)
        sections = sections_of(subject, asked)
        wanted = sections.values() if asked.tasks else recipe.data.evaluation_sections.values()
        comm.course.enter("fetching the model and the data", patient=True)
        fetch(comm, recipe, [(section, section.eval_split) for section in wanted])
        comm.course.enter("the evaluation")
        evaluated = Evaluated(comm, recipe, objective_of(recipe), subject, checkpoint)
        try:
            return scores_of_tasks(evaluated, asked, sections) if asked.tasks else _own_split(evaluated)
        except Preempted:
            raise Preempted(STOPPED) from None


def _logs(subject: Subject, asked: Asked) -> Path | None:
    """Where the logs of the evaluation go; None where it writes no files."""
    place = asked.out or (Path(subject.recipe.output_dir) if subject.run else None)
    return place and place / LOGS


def _of_model(subject: Subject, recipe: Recipe, asked: Asked) -> Recipe:
    """The recipe that the model is loaded by. With tasks the run's own data section, or that of the first
    task, says what kind of model it is."""
    if not asked.tasks:
        return recipe
    data = subject.own or next(iter(sections_of(subject, asked).values()))
    train = recipe.train.model_copy(update={"exact_match_samples": 0})
    return recipe.model_copy(update={"data": data, "train": train})


def _own_split(evaluated: Evaluated) -> dict[str, Scores]:
    comm, recipe, objective = evaluated.comm, evaluated.recipe, evaluated.objective
    preprocessor = on_every_rank(comm, objective.load_preprocessor)
    sets = on_every_rank(comm, lambda: read_sets(recipe, objective, preprocessor))
    engine = evaluated.engine()
    scores = scores_of_sets(sets, engine, preprocessor, recipe.train.eval_samples)
    data = f"data.eval_split={recipe.data.eval_split}" if recipe.data.eval is None else "data.eval"
    check_scores(scores, evaluated.place, data)
    return {OWN_SPLIT: scores | generated_scores(sets, engine, preprocessor)}
