"""Conversations of several turns: the answer is what the assistant says last."""

from dataclasses import dataclass

from distlora.tasks.base import ResponseTask


@dataclass(frozen=True, kw_only=True)
class ChatTask(ResponseTask):
    """Rows are conversations, which the tokenizer's chat template renders. Columns: see
    `distlora.data.conversations`.
    """


TASKS = {"chat": ChatTask()}
