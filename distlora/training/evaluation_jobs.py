"""What an evaluation has to do: the questions or samples of every task, and what an earlier one has left."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.data import Questions, load_questions
from distlora.engine.coordination import on_every_rank, on_main
from distlora.errors import UserError
from distlora.evaluation.answering import WAYS, refuse_without_options
from distlora.evaluation.predictions import Predictions
from distlora.recipe.sections import DataSection, Recipe
from distlora.tasks import ResponseTask, get_task
from distlora.training.evaluated import Asked, Subject
from distlora.training.objective import Objective, Responses, conventions_of, objective_of
from distlora.training.run_directory import EVALUATIONS
from distlora.training.samples import read_samples
from distlora.training.subject import Evaluated

log = logging.getLogger(__name__)

#: In place of a way to answer, of a task with labels; and of one whose texts are only read.
LABELS = "labels"


@dataclass
class Job:
    """One task. by: as in the summary. items: questions or samples. predictions: None where nothing is
    written. done: numbers of the questions that are answered already. summary: of an evaluation that is done.
    """

    name: str
    section: DataSection
    objective: Objective
    by: str
    items: Questions | list
    predictions: Predictions | None = None
    done: frozenset[int] = frozenset()
    summary: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        return len(self.items.items if isinstance(self.items, Questions) else self.items)


def objective_for(subject: Subject, recipe: Recipe, section: DataSection, model: Objective) -> Objective:
    """What a task asks of the model. Raises UserError if that is another kind of model, or tells other labels
    apart. model: what it was trained for."""
    found = objective_of(recipe.model_copy(update={"data": section}))
    language = isinstance(found, Responses)
    if (type(found) is type(model) or (language and isinstance(model, Responses))) and (
        found.labels == model.labels
    ):
        return found
    if language:
        wanted = (
            "generated answers" if isinstance(get_task(section.task), ResponseTask) else "a language model"
        )
        raise UserError(
            f"the task {section.task} wants {wanted}, and {subject.name} predicts labels; "
            "choose a task with labels"
        )
    if not model.labels:
        raise UserError(
            f"the task {section.task} wants a classifier, and {subject.name} generates answers; "
            "choose a task with answers"
        )
    raise UserError(
        f"the task {section.task} has the labels {', '.join(found.labels)}, and {subject.name} tells apart "
        f"{', '.join(model.labels)}; choose a task with these"
    )


def jobs_of(evaluated: Evaluated, asked: Asked, sections: dict[str, DataSection], preprocessor) -> list[Job]:
    """The tasks with their questions, and what an earlier evaluation has left of each. Collective.

    Raises UserError for what is wrong with the data, and for predictions of another evaluation.
    """
    comm, recipe = evaluated.comm, evaluated.recipe
    jobs = on_every_rank(
        comm, lambda: [_read(evaluated, asked, section, preprocessor) for section in sections.values()]
    )
    directory = asked.out or (Path(recipe.output_dir) if evaluated.subject.run else None)
    if directory is not None:
        identity = comm.share(on_main(comm, recipe.model.path, evaluated.identity))
        for job in jobs:
            verdicts = WAYS[job.by].verdicts if job.by in WAYS else ()
            settings = identity | _settings(job, asked)
            job.predictions = Predictions(
                directory / EVALUATIONS, job.name, evaluated.step, settings, job.count, verdicts
            )
        if not asked.fresh:
            _look(evaluated, jobs, directory)
    return jobs


def _read(evaluated: Evaluated, asked: Asked, section: DataSection, preprocessor) -> Job:
    recipe, name = evaluated.recipe, section.task
    objective = objective_for(evaluated.subject, recipe, section, evaluated.objective)
    if not isinstance(get_task(name), ResponseTask):
        samples = read_samples(objective, section.eval_split, preprocessor)
        return Job(name, section, objective, LABELS, samples[: asked.limit])
    conventions = conventions_of(objective.recipe)
    questions = load_questions(section, section.eval_split, preprocessor, conventions, asked.limit)
    log.info(
        "data: %d questions of %s, %d left out", len(questions.items), questions.origin, questions.dropped
    )
    reads_options = asked.way == "likelihood"
    objective.check_questions(questions, preprocessor, None if reads_options else section.max_new_tokens)
    if reads_options:
        refuse_without_options(name, questions)
    return Job(name, section, objective, asked.way, questions)


def _settings(job: Job, asked: Asked) -> dict[str, Any]:
    """All that decides the predictions beside the model."""
    section = job.section
    settings = {  # the first that differs is told, and another limit makes another digest
        "limit": asked.limit, "data": _digest(job.items), "split": section.eval_split, "by": job.by,
    }  # fmt: skip
    if job.by == "generation":
        settings |= {"max_new_tokens": section.max_new_tokens, "template": section.template}
    return settings | {"merged": asked.fold}


def _digest(items: Questions | list) -> str:
    if isinstance(items, Questions):
        return items.digest
    digest = hashlib.sha256()
    for sample in items:
        digest.update(json.dumps(sample.identity()).encode())
    return digest.hexdigest()


def _look(evaluated: Evaluated, jobs: list[Job], directory: Path) -> None:
    """What an earlier evaluation has left; refuses that of another one."""

    def look() -> list[list]:
        return [[sorted(job.predictions.found()), job.predictions.finished()] for job in jobs]

    left = evaluated.comm.share(on_main(evaluated.comm, directory, look))
    for job, (done, summary) in zip(jobs, left):
        job.done, job.summary = frozenset(done), summary
