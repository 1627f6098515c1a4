"""An evaluation: of a run's newest checkpoint, or of a model that something else has trained, on the run's
own evaluation split or on any tasks. No training data is read.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distlora.checkpoints.directory import newest
from distlora.cluster.supervision import Supervision
from distlora.data import Questions, load_questions
from distlora.engine.comm import Topology
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.device import device_of
from distlora.engine.protocol import Engine
from distlora.engine.random_state import own_random_state
from distlora.errors import Preempted, UserError, before_ranks_meet
from distlora.evaluation.answering import WAYS, Record, Way, refuse_without_options
from distlora.evaluation.folding import refuse_packed
from distlora.evaluation.predictions import Predictions
from distlora.evaluation.scoring import answer_questions, ready_to_answer
from distlora.models.generation import Agree
from distlora.models.loading import position_limit
from distlora.recipe.combination import check_combination
from distlora.recipe.sections import DataSection, Recipe
from distlora.tasks import SUITES, ResponseTask, get_task
from distlora.training.evaluated import Asked, Subject, fitted_to_ranks, sections_of
from distlora.training.monitor import progress_bar
from distlora.training.objective import Objective, objective_of
from distlora.training.run_directory import EVALUATIONS
from distlora.training.samples import fetch, read_samples
from distlora.training.subject import Evaluated, refuse_other_base
from distlora.training.train import check_packages, check_settings, fitted

log = logging.getLogger(__name__)

Scores = dict[str, float]
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
        check_packages(recipe)
        if not asked.tasks:
            if recipe.data.eval_split is None:
                raise UserError("data.eval_split is null, so there is nothing to evaluate on; name a split")
            objective.check_split(recipe.data.eval_split)
        check_tasks(subject, recipe, asked, objective)


def check_tasks(subject: Subject, recipe: Recipe, asked: Asked, objective: Objective) -> None:
    """Raises UserError for tasks that the model cannot do, and for what is wrong with data that is at hand.

    objective: what the model was trained for.
    """
    for section in sections_of(subject, asked).values():
        _objective(subject, recipe, section, objective).check_split(section.eval_split)


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
    that only weights or data show, and for predictions of another evaluation that lie in the way; Preempted
    once an evaluation that was asked to stop has stopped.
    """
    recipe = _of_model(subject, fitted_to_ranks(subject.recipe, topology.world_size), asked)
    with (
        own_random_state(recipe.train.seed, device := device_of(topology.local_rank)),
        Supervision(topology, recipe.train.hang_timeout) as supervision,
    ):
        comm = supervision.gather(device, recipe.deepspeed is not None, asked_to_stop)
        checkpoint = newest(recipe.output_dir, comm) if subject.run else None
        if subject.run and checkpoint is None:
            raise UserError(f"{recipe.output_dir} holds no complete checkpoint; train first", agreed=True)
        sections = sections_of(subject, asked)
        wanted = sections.values() if asked.tasks else [recipe.data]
        fetch(comm, recipe, [(section, section.eval_split) for section in wanted])
        evaluated = Evaluated(comm, recipe, objective_of(recipe), subject, checkpoint)
        try:
            return _Jobs(evaluated, asked, sections).scores() if asked.tasks else _own_split(evaluated)
        except Preempted:
            raise Preempted(STOPPED) from None


def _of_model(subject: Subject, recipe: Recipe, asked: Asked) -> Recipe:
    """The recipe that the model is loaded by. With tasks the run's own data section, or that of the first
    task, says what kind of model it is."""
    if not asked.tasks:
        return recipe
    data = subject.own or next(iter(sections_of(subject, asked).values()))
    train = recipe.train.model_copy(update={"exact_match_samples": 0})
    return recipe.model_copy(update={"data": data, "train": train})


def _objective(subject: Subject, recipe: Recipe, section: DataSection, model: Objective) -> Objective:
    """What a task asks of the model. Raises UserError if that is another kind of model, or tells other labels
    apart. model: what it was trained for."""
    found = objective_of(recipe.model_copy(update={"data": section}))
    if type(found) is type(model) and found.labels == model.labels:
        return found
    if isinstance(get_task(section.task), ResponseTask):
        raise UserError(
            f"the task {section.task} wants generated answers, and {subject.name} predicts labels; "
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


def _own_split(evaluated: Evaluated) -> dict[str, Scores]:
    comm, recipe, objective = evaluated.comm, evaluated.recipe, evaluated.objective
    preprocessor = on_every_rank(comm, objective.load_preprocessor)
    samples = on_every_rank(comm, lambda: read_samples(objective, recipe.data.eval_split, preprocessor))
    engine = evaluated.engine()
    scores = objective.evaluate(engine, preprocessor, samples[: recipe.train.eval_samples])
    return {OWN_SPLIT: scores | objective.generate(engine, preprocessor, samples)}


@dataclass
class _Job:
    """One task. by: as in the summary. items: questions or samples. predictions: None where nothing is
    written."""

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


class _Jobs:
    """The tasks of an evaluation."""

    def __init__(self, evaluated: Evaluated, asked: Asked, sections: dict[str, DataSection]):
        """Reads the questions, and what an earlier evaluation has left. Collective."""
        self.evaluated, self.asked, self.comm = evaluated, asked, evaluated.comm
        recipe = evaluated.recipe
        self.preprocessor = on_every_rank(self.comm, evaluated.objective.load_preprocessor)
        self.jobs = on_every_rank(
            self.comm, lambda: [self._read(name, section) for name, section in sections.items()]
        )
        directory = asked.out or (Path(recipe.output_dir) if evaluated.subject.run else None)
        if directory is not None:
            identity = self.comm.share(on_main(self.comm, recipe.model.path, evaluated.identity))
            for job in self.jobs:
                settings = identity | self._settings(job)
                job.predictions = Predictions(directory / EVALUATIONS, job.name, evaluated.step, settings)
            self._look(directory)

    def _read(self, name: str, section: DataSection) -> _Job:
        evaluated, limit = self.evaluated, self.asked.limit
        recipe, model = evaluated.recipe, evaluated.objective
        objective = _objective(evaluated.subject, recipe, section, model)
        if not isinstance(get_task(name), ResponseTask):
            samples = read_samples(objective, section.eval_split, self.preprocessor)
            return _Job(name, section, objective, "labels", samples[:limit])
        questions = load_questions(section, section.eval_split, self.preprocessor, recipe.whole_text)
        log.info(
            "data: %d questions of %s, %d left out", len(questions.items), questions.origin, questions.dropped
        )
        questions = replace(questions, items=questions.items[:limit])
        self._refuse_long(section, questions)
        if self.asked.by == "likelihood":
            refuse_without_options(name, questions)
        return _Job(name, section, objective, self.asked.by, questions)

    def _refuse_long(self, section: DataSection, questions: Questions) -> None:
        """Raises UserError where an answer could run over the end of the model's table of positions."""
        positions = position_limit(self.evaluated.objective.bare_model())
        prompt = max(len(question.prompt_ids) for question in questions.items)
        if positions is not None and prompt + section.max_new_tokens > positions:
            raise UserError(
                f"data.max_new_tokens={section.max_new_tokens}: with a prompt of {prompt} tokens that is "
                f"beyond the {positions} positions of {self.evaluated.recipe.model.path}; lower it, or "
                "data.max_length"
            )

    def _settings(self, job: _Job) -> dict[str, Any]:
        """All that decides the predictions beside the model."""
        section, asked = job.section, self.asked
        settings = {
            "data": _digest(job.items), "split": section.eval_split, "by": job.by, "limit": asked.limit,
        }  # fmt: skip
        if job.by == "generation":
            settings |= {"max_new_tokens": section.max_new_tokens, "template": section.template}
        return settings | {"merged": asked.fold}

    def _look(self, directory: Path) -> None:
        """What an earlier evaluation has left; refuses that of another one."""

        def look() -> list[list]:
            if self.asked.fresh:
                return [[[], None] for _ in self.jobs]
            return [[sorted(job.predictions.found()), job.predictions.finished()] for job in self.jobs]

        left = self.comm.share(on_main(self.comm, directory, look))
        for job, (done, summary) in zip(self.jobs, left):
            job.done, job.summary = frozenset(done), summary

    # ------------------------------------------------------------------ doing it

    def scores(self) -> dict[str, Scores]:
        """Those of every task, and the means of every suite that was asked for."""
        open_jobs = [job for job in self.jobs if job.summary is None]
        for job in self.jobs:
            if job.summary is not None:
                log.info("%s: evaluated before; --fresh begins anew", job.predictions.summary)
        if open_jobs:
            self._do(open_jobs)
        found = {job.name: job.summary["scores"] for job in self.jobs}
        suites = {name: _means(found, SUITES[name]) for name in self.asked.tasks if name in SUITES}
        return found | suites

    def _do(self, jobs: Sequence[_Job]) -> None:
        engine = self.evaluated.engine()
        if jobs[0].by == "labels":
            self._forget(jobs)
            for job in jobs:
                self._label(engine, job)
            return
        if self.asked.fold:
            refuse_packed(engine.layers)
        with ready_to_answer(engine, self.asked.fold) as agree:
            if self.asked.fold and agree is not None:
                log.info("--merge: the model does not fit whole, so its adapter stays beside the weights")
            elif self.asked.fold:
                log.info("--merge: %d layers compute with one matrix", len(engine.layers))
            self._forget(jobs)
            for job in jobs:
                self._answer(engine, job, agree)

    def _label(self, engine: Engine, job: _Job) -> None:
        began = time.perf_counter()
        scores = job.objective.evaluate(engine, self.preprocessor, job.items)
        self._finish(job, scores, time.perf_counter() - began)

    def _answer(self, engine: Engine, job: _Job, agree: Agree | None) -> None:
        way = on_every_rank(self.comm, lambda: self._way(engine, job))
        began, found = time.perf_counter(), list[Record]()
        if job.predictions is not None:
            on_main(self.comm, job.predictions.lines, job.predictions.begin)
            found += on_main(self.comm, job.predictions.lines, self._earlier(job)) or []
        bar = progress_bar(job.name, "question", job.count, len(job.done), self.comm.is_main)

        def take(records: list[Record]) -> None:
            found.extend(records)
            if job.predictions is not None:
                lines = [_line(record, job.items) for record in records]
                on_main(self.comm, job.predictions.lines, lambda: job.predictions.add(lines))
            bar.update(len(records))

        todo = [index for index in range(job.count) if index not in job.done]
        try:
            answer_questions(way, todo, agree, take, self.asked.batch_size)
        finally:
            bar.close()
        scores = self.comm.share(way.scores(found) if self.comm.is_main else None)
        self._finish(job, scores, time.perf_counter() - began)

    def _forget(self, jobs: Sequence[_Job]) -> None:
        """With --fresh, what was left of all tasks: where this evaluation is cut short, the next one goes on
        with its predictions alone."""
        for job in jobs:
            if self.asked.fresh and job.predictions is not None:
                on_main(self.comm, job.predictions.lines, job.predictions.forget)

    def _earlier(self, job: _Job) -> Callable[[], list[Record]]:
        return lambda: list(job.predictions.found().values())

    def _way(self, engine: Engine, job: _Job) -> Way:
        more = [job.section.max_new_tokens] if job.by == "generation" else []
        return WAYS[job.by](engine, self.preprocessor, job.name, job.items, *more)

    def _finish(self, job: _Job, scores: Scores, seconds: float) -> None:
        section = job.section
        job.summary = {
            "task": job.name, "step": self.evaluated.step, "by": job.by, "samples": job.count,
            "scores": scores, "data": section.path or get_task(job.name).path or job.name,
            "split": section.eval_split, "seconds": round(seconds, 3),
            "dropped": job.items.dropped if isinstance(job.items, Questions) else 0,
        }  # fmt: skip
        log.info("%s: %s", job.name, ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
        if job.predictions is not None:
            on_main(self.comm, job.predictions.summary, lambda: job.predictions.finish(job.summary))


def _line(record: Record, questions: Questions) -> Record:
    """A prediction with what it answers."""
    question = questions.items[record["index"]]
    first = {"index": record["index"], "prompt": question.prompt, "output": record["output"]}
    return first | {"answer": question.answer} | record


def _means(found: dict[str, Scores], tasks: Sequence[str]) -> Scores:
    """Of the metrics that all the tasks have."""
    common = [name for name in found[tasks[0]] if all(name in found[task] for task in tasks)]
    return {name: sum(found[task][name] for task in tasks) / len(tasks) for name in common}


def _digest(items: Questions | list) -> str:
    if isinstance(items, Questions):
        return items.digest
    digest = hashlib.sha256()
    for sample in items:
        digest.update(json.dumps(sample.identity()).encode())
    return digest.hexdigest()
