"""Scores on held-out samples: of answers, and of a classifier's labels."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distlora.data import Questions, shard
from distlora.engine.protocol import Engine
from distlora.errors import TrainingError
from distlora.evaluation.answering import Generation, Record, Way
from distlora.evaluation.folding import folded
from distlora.evaluation.spreading import batch_limit, rounds
from distlora.models.cross_entropy import label_cross_entropy
from distlora.models.generation import Agree
from distlora.models.losses import label_logits, squared_error
from distlora.models.targets import Batch
from distlora.progress import each, phase
from distlora.tasks.metrics import METRICS


@contextmanager
def ready_to_answer(engine: Engine, fold: bool = False) -> Iterator[Agree | None]:
    """Around `answer_questions`: the model gathered once if it fits, and yields what it needs as `agree`.

    Without that the ranks gather it layer by layer, in step. fold: adapters into the weights; only what is
    gathered can be folded, and a model that does not fit stays as it is. Collective.
    """
    engine.train_mode(False)
    try:
        with engine.whole_model() as gathered:
            if not gathered:
                yield lambda goes_on: engine.comm.sum(float(goes_on))[0] > 0
            elif fold:
                with folded(engine):
                    yield None
            else:
                yield None
    finally:
        engine.train_mode(True)


def answer_questions(
    way: Way,
    todo: Iterable[int],
    agree: Agree | None,
    take: Callable[[list[Record]], None],
    batch_size: int | None = None,
) -> None:
    """Answers the questions of these numbers, in batches of at most `batch_size` rows. Collective.

    take: is given the records of all ranks after each round; on every rank. agree: of `ready_to_answer`.
    Raises Preempted between two rounds; TrainingError where the model computes numbers that are not finite.
    """
    comm, items = way.engine.comm, way.questions.items
    lengths = {index: way.length(items[index]) for index in todo}
    for shares in rounds(lengths, comm.world_size, batch_limit(comm, way.engine.module, batch_size)):
        indices = shares[comm.rank]
        records = _judged(way, indices, way.answer(indices, agree))
        found = [record for own in comm.gather(records) for record in own]
        _check_finite(way, found)
        take(found)
        comm.sum_or_stop()


def _check_finite(way: Way, records: Sequence[Record]) -> None:
    """Raises TrainingError, on all ranks alike, where a question has no output."""
    for record in records:
        if record["output"] is None:
            prompt = way.questions.items[record["index"]].prompt
            raise TrainingError(
                f"the logits for question {record['index'] + 1} of {way.task} ({prompt[:60]!r}) are infinite "
                "or not a number, so that nothing can be chosen by them"
            )


def check_scores(scores: Mapping[str, float], model: str, data: str) -> None:
    """Raises TrainingError for a score that is infinite or not a number. model, data: for the sentence."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise TrainingError(f"{model}: the {name} on {data} is {value:g}, which is no score")


def _judged(way: Way, indices: Sequence[int], answers: Sequence[Any]) -> list[Record]:
    """The records of this rank's answers. Collective: what a judge raises on one rank ends all."""
    records, failure = list[Record](), None
    try:
        records = [way.record(index, said) for index, said in zip(indices, answers, strict=True)]
    except Exception as error:
        failure = error
    way.engine.comm.agree(failure)
    return records


def exact_match(
    engine: Engine,
    tokenizer,
    task: str,
    questions: Questions,
    max_new_tokens: int,
    batch_size: int | None = None,
) -> float:
    """The share (0 … 1) of the questions whose generated answer is correct by the task's rule.

    Collective: each rank answers its share of the questions. Raises Preempted between two batches.
    """
    way, found = Generation(engine, tokenizer, task, questions, max_new_tokens), []
    count = len(questions.items)
    with phase("answering", "questions", count) as task, ready_to_answer(engine) as agree:

        def take(records: list[Record]) -> None:
            found.extend(records)
            task.advance(len(records))

        answer_questions(way, range(count), agree, take, batch_size)
    return way.scores(found)["exact_match"]


@torch.no_grad()
def label_scores(
    engine: Engine,
    samples: Sequence[Any],
    batch_of: Callable[[list[Any]], Batch],
    batch_size: int,
    metrics: Iterable[str],
) -> dict[str, float]:
    """The mean loss over the samples, as "loss", and the `distlora.tasks.metrics` of these names. The loss is
    the cross-entropy; of samples with scores it is the squared error.

    samples: with a `label` each. batch_of: makes a batch of some of them, or of none.
    Collective: each rank predicts the labels of its share of the samples, once. Raises Preempted between two
    batches.
    """
    comm = engine.comm
    loss = 0.0
    expected = torch.tensor([sample.label for sample in samples])
    is_score = expected.is_floating_point()
    error = squared_error if is_score else label_cross_entropy
    predicted = torch.zeros(len(samples), dtype=expected.dtype, device=comm.device)
    engine.train_mode(False)
    parts = shard(len(samples), comm.rank, comm.world_size, batch_size)
    for indices in each(parts, "evaluating", "batches", len(parts)):
        batch = batch_of([samples[i] for i in indices])
        logits = engine.run(label_logits, batch)
        loss += comm.sum_or_stop(float(error(logits, batch["labels"])))[0]
        found = logits.squeeze(-1).to(expected.dtype) if is_score else logits.argmax(-1)
        predicted[indices] = found[: len(indices)]
    engine.train_mode(True)
    predicted = comm.all_reduce(predicted).cpu()
    return {"loss": loss / len(samples)} | {name: METRICS[name](predicted, expected) for name in metrics}


def perplexity(loss: float) -> float:
    """e to the power of a mean cross-entropy; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
