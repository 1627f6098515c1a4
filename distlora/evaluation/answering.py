"""The ways to answer questions: what one rank does with one batch, and what the answers are worth."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from distlora.data import Question, Questions
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.models.generation import Agree, end_tokens, generate
from distlora.models.likelihood import option_likelihoods
from distlora.tasks import is_correct

#: One prediction, as it stands in the file.
Record = dict[str, Any]


class Way(ABC):
    """task: the name. questions: of a split."""

    name: ClassVar[str]
    #: What a record says true or false of.
    verdicts: ClassVar[tuple[str, ...]]

    def __init__(self, engine: Engine, tokenizer, task: str, questions: Questions):
        self.engine, self.tokenizer, self.task, self.questions = engine, tokenizer, task, questions

    @abstractmethod
    def length(self, question: Question) -> int:
        """Tokens that a question takes up in a batch, with its answer."""

    @abstractmethod
    def answer(self, indices: Sequence[int], agree: Agree | None) -> list[Any]:
        """What the model says to these questions, one for each; `record` judges it. Collective, if `agree` is
        given. indices: none on a rank that only goes along. agree: see `distlora.models.generation.generate`.
        """

    @abstractmethod
    def record(self, index: int, said: Any) -> Record:
        """The prediction for a question, judged; JSON. said: of `answer`. Its "output" is None where the
        model has computed numbers that are not finite."""

    @abstractmethod
    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """0 … 1 each. records: at least one."""


class Generation(Way):
    """A greedy answer is right if the task finds the expected one in it."""

    name, verdicts = "generation", ("right",)

    def __init__(self, engine: Engine, tokenizer, task: str, questions: Questions, max_new_tokens: int):
        super().__init__(engine, tokenizer, task, questions)
        self._limit, self._ends = max_new_tokens, end_tokens(engine.module, tokenizer) | questions.ends
        # The tokens at the end of an answer that surely hold a stop text which has just been completed.
        self._tail = max((len(stop.encode()) for stop in questions.stops), default=0) + 4

    def length(self, question: Question) -> int:
        return len(question.prompt_ids) + self._limit

    def answer(self, indices: Sequence[int], agree: Agree | None) -> list[list[int] | None]:
        """The tokens of each answer."""
        pad = self.tokenizer.pad_token_id
        prompts = [self.questions.items[index].prompt_ids or [pad] for index in indices]
        stopped = self._stopped if self.questions.stops else None
        return generate(self.engine.module, prompts, self._limit, self._ends, pad, stopped, agree)

    def _stopped(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens[-self._tail :])
        return any(stop in text for stop in self.questions.stops)

    def record(self, index: int, said: list[int] | None) -> Record:
        if said is None:
            return {"index": index, "output": None}
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        for stop in self.questions.stops:
            text = text.partition(stop)[0]
        return {
            "index": index, "output": text,
            "right": is_correct(self.task, text, self.questions.items[index].answer),
        }  # fmt: skip

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        return {"exact_match": sum(record["right"] for record in records) / len(records)}


class Likelihood(Way):
    """The option of the largest probability is chosen: of all its tokens together ("accuracy"), and by the
    mean of their logarithms ("accuracy_norm")."""

    name, verdicts = "likelihood", ("right", "right_norm")

    def __init__(self, engine: Engine, tokenizer, task: str, questions: Questions):
        super().__init__(engine, tokenizer, task, questions)
        refuse_without_options(task, questions)

    def length(self, question: Question) -> int:
        longest = max(map(len, question.options))
        return (len(question.prompt_ids) + longest) * len(question.options)

    def answer(self, indices: Sequence[int], agree: Agree | None) -> list[list[float]]:
        """The logarithm of each option's probability."""
        questions = [self.questions.items[index] for index in indices]
        pad = self.tokenizer.pad_token_id
        rows = [(q.prompt_ids or [pad], option) for q in questions for option in q.options]
        if not rows and agree is None:
            return []
        found = iter(option_likelihoods(self.engine.module, rows, pad))
        return [[next(found) for _ in question.options] for question in questions]

    def record(self, index: int, said: list[float]) -> Record:
        if not all(map(math.isfinite, said)):
            return {"index": index, "output": None}
        question = self.questions.items[index]
        means = [total / max(len(option), 1) for total, option in zip(said, question.options)]
        chosen, by_token = said.index(max(said)), means.index(max(means))
        text = self.tokenizer.decode(question.options[chosen], skip_special_tokens=True).strip()
        return {
            "index": index, "output": text, "right": chosen == question.correct,
            "right_norm": by_token == question.correct, "log_likelihoods": [round(x, 4) for x in said],
        }  # fmt: skip

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        return {
            "accuracy": sum(record["right"] for record in records) / len(records),
            "accuracy_norm": sum(record["right_norm"] for record in records) / len(records),
        }


def refuse_without_options(task: str, questions: Questions) -> None:
    """Raises UserError where a question has nothing to choose from."""
    if any(not question.options or question.correct is None for question in questions.items):
        raise UserError(
            f"--by likelihood chooses among the options of a question, and the task {task} has none "
            "to choose from; leave it out"
        )


#: By the value of `--by`.
WAYS = {"generation": Generation, "likelihood": Likelihood}
