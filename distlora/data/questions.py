"""What a model is asked in an evaluation: a task's prompts as tokens, with the expected answers."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from distlora.data.chat import Chat
from distlora.data.chat_template import Conversation
from distlora.data.columns import row_name
from distlora.data.conventions import NEWEST, Conventions
from distlora.data.conversations import ChatExamples
from distlora.data.encode import chat_of, conversation_of, examples_of, of_row
from distlora.data.examples import DataSection, Example, Examples
from distlora.data.seams import Tokens, common, tokens_of
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
    ends: frozenset[int] = frozenset()


def load_questions(
    section: DataSection,
    split: str,
    tokenizer,
    conventions: Conventions = NEWEST,
    limit: int | None = None,
) -> Questions:
    """Reads a split expression (`test`, `test[:100]`) of a task with responses as questions.

    The prompt ends before the token with which a response begins, as it does in training. A question that
    ends in "Let's think step by step." and one of the LoRA-SB paper are tokenised alone. A prompt longer than
    `data.max_length` tokens is left out and counted: cut anywhere it would be another question. Of a
    conversation the last turn of the assistant is the answer, and what stands before it the prompt. limit:
    the first so many questions; the rows after them are not looked at. Raises
    UserError for everything that is wrong with the section, its files or its rows, and if no question is
    left.
    """
    task, examples = get_task(section.task), examples_of(section, split, scoring=True)
    chat = chat_of(section, tokenizer, conventions)
    tokens = tokens_of(section, tokenizer, conventions) if chat is None else chat
    ask = _question if chat is None else _chat_question
    items, ends, has_answers, seen = [], set(), False, 0
    for position, example in enumerate(examples):
        if len(items) == limit:
            break
        seen = position + 1
        if task.numeric and example.response is not None:
            _check_number(example, row_name(position, examples.origin), section.task)
        if example.answer is None:
            continue
        has_answers = True
        with of_row(examples.origin, [position] * max(len(example.options), 1)):
            item, found = ask(example, tokens, examples, position)
        ends |= found
        if len(item.prompt_ids) <= section.max_length:
            items.append(item)
    if not has_answers:
        raise UserError(f"data: no row of {examples.origin} has an answer; choose another split")
    if not items:
        raise UserError(
            f"data.max_length: none of the {len(examples)} prompts of {examples.origin} has at most "
            f"{section.max_length} tokens; raise it"
        )
    dropped = seen - len(items)
    return Questions(items, examples.stops, examples.origin, dropped, _digest(items), frozenset(ends))


def _check_number(example: Example, where: str, task: str) -> None:
    """Raises UserError if the answer of a row is no number."""
    if example.answer is None:
        raise UserError(
            f"data: the task {task} finds no final answer, such as `#### 72`, in the response of {where} "
            "correct it or choose another task"
        )
    if not re.search(r"\d", example.answer):
        raise UserError(
            f"data: {where} has no number as its answer, which the task {task} wants; correct it or choose "
            "another task"
        )


def _question(example: Example, tokens: Tokens, examples: Examples, position: int) -> tuple[Question, set]:
    """The question of a row that has an answer, and the tokens that end an answer beside the model's."""
    text = tokens.render(example.prompt)
    if not example.options:
        response = None if examples.by_steps else example.response
        return Question(text, tokens.before_answer(example.shown, response), example.answer), set()
    right = _right_option(example, examples, position)
    ids, following = tokens.before_options(example.shown, list(example.options.values()))
    return Question(text, ids, example.answer, tuple(map(tuple, following)), correct=right), set()


def _chat_question(
    example: Example, chat: Chat, examples: Examples | ChatExamples, position: int
) -> tuple[Question, set]:
    """The same of a row that a chat template shows."""
    if example.options:
        right = _right_option(example, examples, position)
        conversations = [Conversation.of_texts(example.prompt, text) for text in example.options.values()]
        found = chat.encode(conversations)
        ends = {token for each in found for token in each.turns[-1].ends}
        asked = common([each.ids[: each.turns[-1].start] for each in found])
        following = tuple(tuple(each.ids[len(asked) : each.turns[-1].stop - 1]) for each in found)
        return Question(found[0].asked, asked, example.answer, following, correct=right), ends
    (found,) = chat.encode([conversation_of(example)], all_turns=False)
    text, ids = found.asked, found.ids[: found.turns[-1].start]
    if examples.by_steps:
        text, ids = chat.before_answer(Conversation.of_texts(example.prompt, None))
    return Question(text, ids, example.answer), set(found.turns[-1].ends)


def _right_option(example: Example, examples: Examples, position: int) -> int:
    names = list(example.options)
    if example.answer not in names:
        raise UserError(
            f"data: {row_name(position, examples.origin)} has the answer {example.answer!r}, "
            f"which is none of {', '.join(names)}; correct it"
        )
    return names.index(example.answer)


def _digest(items: Iterable[Question]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.prompt, item.answer]).encode() + b"\n")
    return digest.hexdigest()
