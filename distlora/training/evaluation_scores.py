"""Doing the jobs of an evaluation: answers and labels of the model, and the files that hold their scores."""

import logging
import time
from collections.abc import Sequence

from distlora import progress
from distlora.data import Questions
from distlora.engine.coordination import on_every_rank, on_main
from distlora.engine.protocol import Engine
from distlora.evaluation.answering import WAYS, Record, Way
from distlora.evaluation.folding import refuse_packed
from distlora.evaluation.scoring import answer_questions, check_scores, ready_to_answer
from distlora.models.generation import Agree
from distlora.recipe.sections import DataSection
from distlora.tasks import SUITES, get_task
from distlora.training.evaluated import Asked
from distlora.training.evaluation_jobs import LABELS, Job, jobs_of
from distlora.training.subject import Evaluated

log = logging.getLogger(__name__)

Scores = dict[str, float]


def scores_of_tasks(
    evaluated: Evaluated, asked: Asked, sections: dict[str, DataSection]
) -> dict[str, Scores]:
    """Those of every task, and the means of every suite that was asked for. Collective."""
    preprocessor = on_every_rank(evaluated.comm, evaluated.objective.load_preprocessor)
    jobs = jobs_of(evaluated, asked, sections, preprocessor)
    for job in jobs:
        if job.summary is not None:
            log.info("%s: evaluated before; --fresh begins anew", job.predictions.summary)
    if any(job.summary is None for job in jobs):
        _Work(evaluated, asked, preprocessor).do([job for job in jobs if job.summary is None])
    found = {job.name: job.summary["scores"] for job in jobs}
    return found | {name: means(found, SUITES[name]) for name in asked.tasks if name in SUITES}


def means(found: dict[str, Scores], tasks: Sequence[str]) -> Scores:
    """Of the metrics that all the tasks have. Losses are no metric: they differ in kind and unit."""
    common = [name for name in found[tasks[0]] if all(name in found[task] for task in tasks)]
    return {name: sum(found[task][name] for task in tasks) / len(tasks) for name in common if name != "loss"}


class _Work:
    """What all jobs have in common."""

    def __init__(self, evaluated: Evaluated, asked: Asked, preprocessor):
        self.evaluated, self.asked, self.comm = evaluated, asked, evaluated.comm
        self.preprocessor = preprocessor

    def do(self, jobs: Sequence[Job]) -> None:
        """Loads the model, and leaves every job with a summary. Collective."""
        engine = self.evaluated.engine()
        without_answers = [job for job in jobs if job.by == LABELS]
        self._forget(without_answers)
        for job in without_answers:
            self._label(engine, job)
        jobs = [job for job in jobs if job.by != LABELS]
        if jobs:
            self._answer_all(engine, jobs)

    def _answer_all(self, engine: Engine, jobs: Sequence[Job]) -> None:
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

    def _label(self, engine: Engine, job: Job) -> None:
        began = time.perf_counter()
        scores = job.objective.evaluate(engine, self.preprocessor, job.items)
        self._finish(job, scores, time.perf_counter() - began)

    def _answer(self, engine: Engine, job: Job, agree: Agree | None) -> None:
        way = on_every_rank(self.comm, lambda: self._way(engine, job))
        began, found = time.perf_counter(), list[Record]()
        if job.predictions is not None:
            found += on_main(self.comm, job.predictions.lines, lambda: self._begin(job)) or []
        task = progress.begin(job.name, "questions", job.count, len(job.done))

        def take(records: list[Record]) -> None:
            found.extend(records)
            if job.predictions is not None:
                lines = [_line(record, job.items) for record in records]
                on_main(self.comm, job.predictions.lines, lambda: job.predictions.add(lines))
            task.advance(len(records))

        todo = [index for index in range(job.count) if index not in job.done]
        try:
            answer_questions(way, todo, agree, take, self.asked.batch_size)
        finally:
            task.close()
        scores = self.comm.share(on_main(self.comm, job.name, lambda: way.scores(found)))
        self._finish(job, scores, time.perf_counter() - began)

    def _forget(self, jobs: Sequence[Job]) -> None:
        """With --fresh, what was left of all tasks: where this evaluation is cut short, the next one goes on
        with its predictions alone.
        """
        for job in jobs:
            if self.asked.fresh and job.predictions is not None:
                on_main(self.comm, job.predictions.lines, job.predictions.forget)

    def _begin(self, job: Job) -> list[Record]:
        """Makes the file ready to be written to, and returns what it holds."""
        job.predictions.begin()
        return list(job.predictions.found().values())

    def _way(self, engine: Engine, job: Job) -> Way:
        more = [job.section.max_new_tokens] if job.by == "generation" else []
        return WAYS[job.by](engine, self.preprocessor, job.name, job.items, *more)

    def _finish(self, job: Job, scores: Scores, seconds: float) -> None:
        section = job.section
        check_scores(scores, self.evaluated.place, job.name)
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
