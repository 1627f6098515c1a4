"""What a model is asked in an evaluation: a task's prompts as tokens, with the expected answers."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from distlora.data.encode import Prompts, chunks
from distlora.data.examples import CHAT, DataSection, Examples
from distlora.errors import UserError
from distlora.tasks import get_task


@dataclass(frozen=True)
class Question:
    """One question.

    prompt: the text that is shown. prompt_ids: its tokens as generation gets them, with BOS where the
    tokenizer adds one. answer: the expected final answer; None if the row has none. options: the tokens of
    each possible response as they follow prompt_ids; none where the answer is free. correct: which of the
    options is right.
    """

    prompt: str
    prompt_ids: list[int]
    answer: str | None
    options: tuple[tuple[int, ...], ...] = ()
    correct: int | None = None


@dataclass(frozen=True)
class Questions:
    """The questions of a split, in its order.

    stops: a generated answer ends before the first of these texts. origin: the data set, as messages name
    it. dropped: how many rows are left out, because their prompt is longer than `data.max_length` or they
    have no answer. digest: SHA-256 of the prompts and answers.
    """

    items: list[Question]
    stops: tuple[str, ...]
    origin: str
    dropped: int
    digest: str


def load_questions(section: DataSection, split: str, tokenizer) -> Questions:
    """Reads a split expression (`test`, `test[:100]`) of a task with responses as questions.

    A prompt longer than `data.max_length` tokens is left out and counted: cut anywhere it would be another
    question. Raises UserError for everything that is wrong with the section, its files or its rows, and if no
    question is left.
    """
    examples = Examples(section, split)
    task = get_task(section.task)
    prompts = Prompts(tokenizer, chat=section.template == CHAT)
    items = []
    for chunk in chunks(examples):
        texts = [prompts.render(example.prompt) for example in chunk]
        for example, text, ids in zip(chunk, texts, prompts.tokens(texts)):
            if len(prompts.start + ids) <= section.max_length:
                items.append(Question(text, prompts.start + ids, example.answer))
    if not items:
        raise UserError(
            f"data.max_length: none of the {len(examples)} prompts of {examples.origin} has at most "
            f"{section.max_length} tokens, raise it"
        )
    return Questions(items, task.stops, examples.origin, len(examples) - len(items), _digest(items))


def _digest(items: Iterable[Question]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.prompt, item.answer]).encode() + b"\n")
    return digest.hexdigest()
