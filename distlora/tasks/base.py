"""The kinds of tasks: prompts with responses, and texts with labels. Those of images are in `images`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distlora.tasks import answers

#: What a column can be used for. A row may lack `input` and `answer`.
ROLES = ("prompt", "response", "input", "answer")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds of tasks have.

    path: the data set to read if the recipe names none. rows: makes the rows of a split, for a task that
    reads no file; then there is no path. header: the columns of the data set's official TSV files, if these
    do not name them.
    """

    path: str | None = None
    rows: Callable[[str], list[dict[str, Any]]] | None = None
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ResponseTask(Task):
    """A prompt and the response to learn.

    columns: the column of each role, if `data.fields` does not name another. template: the prompt, a format
    string of roles and columns. template_with_input: the same for rows with an input. extract: finds the
    final answer in a text, None if there is none. Without a column for `answer`, the expected answer is the
    one that `extract` finds in the response.
    """

    columns: dict[str, str] = field(default_factory=dict)
    template: str = "{prompt}"
    template_with_input: str | None = None
    extract: Callable[[str], str | None] = answers.exact_text


@dataclass(frozen=True)
class LabelTask(Task):
    """A text or a pair of texts, and the label to predict.

    columns: for "text", "pair" (if there is one) and "label", the names that the column has in the various
    copies of the data set. labels: the names of the labels, in the order of their numbers; empty if the
    recipe names them. metrics: names from `distlora.tasks.metrics` that are reported beside the loss.
    """

    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
