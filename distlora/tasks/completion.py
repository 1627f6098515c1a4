"""Continued pretraining on any texts."""

from dataclasses import dataclass, field

from distlora.tasks.base import Task


@dataclass(frozen=True)
class CompletionTask(Task):
    """A text of which every token is learned. columns: that of "text", unless `data.fields` names another."""

    columns: dict[str, str] = field(default_factory=lambda: {"text": "text"})


TASKS = {"completion": CompletionTask()}
