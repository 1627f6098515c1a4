"""The kinds of tasks: prompts with responses, texts with labels, and texts with scores. That of images is in
`images`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distlora.tasks import answers, judging

#: What a column can be used for. A row may lack `input` and `answer`.
ROLES = ("prompt", "response", "input", "answer")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds of tasks have.

    path: the data set to read if the recipe names none. rows: makes the rows of a split, for a task that
    reads no file; then there is no path. header: the columns of the data set's official TSV files, if these
    do not name them. eval_split: the split on which the task is scored unless another is named. folder: how
    the data set's folder is called where those of several tasks lie in one. local_splits: names that splits
    have there, by their names on the hub.
    """

    path: str | None = None
    rows: Callable[[str], list[Row]] | None = None
    header: tuple[str, ...] | None = None
    eval_split: str = "test"
    folder: str | None = None
    local_splits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a copy of a data set with other columns is read.

    columns: what tells it from other copies. answer: the one of them that holds the answer; a row where it
    is null or empty has none. read: from a row with an answer to one with the columns of the task; it raises
    ValueError for a row that cannot be, with the rest of a sentence that begins "row 3 has". marked: whether
    -1 in the answer stands for a row without one, too, as in the hub's test splits of questions with options.
    """

    columns: tuple[str, ...]
    answer: str
    read: Callable[[Row], Row]
    marked: bool = False


@dataclass(frozen=True, kw_only=True)
class PaperPrompts:
    """What `data.template: paper` stands for: format strings, as `ResponseTask.template`.

    training, training_with_input: of the text that is trained. scoring, scoring_with_input: of questions,
    where these differ. by_steps: whether questions end in "Let's think step by step.". stops: as
    `ResponseTask.stops`.
    """

    training: str
    training_with_input: str | None = None
    scoring: str | None = None
    scoring_with_input: str | None = None
    by_steps: bool = False
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ResponseTask(Task):
    """A prompt and the response to learn.

    columns: the column of each role, if `data.fields` does not name another. layouts: other columns that
    copies of the data set have. template: the prompt, a format string of roles and columns.
    template_with_input: the same for rows with an input. paper: the prompts of the LoRA-SB paper.
    extract: finds the final answer in a text, None if there is none. Without a column for `answer`, the
    expected answer is the one that `extract` finds in the response. judge: whether an output gives an
    expected answer, see `distlora.tasks.judging`. numeric: whether every expected answer holds a number.
    options: from the text of the role `prompt` to the possible answers, each with its response; none where
    the answer is free. stops: a generated answer ends before the first of these texts.
    """

    columns: dict[str, str] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    template: str = "{prompt}"
    template_with_input: str | None = None
    paper: PaperPrompts | None = None
    extract: Callable[[str], str | None] = answers.exact_text
    judge: judging.Judge = judging.by_text
    numeric: bool = False
    options: Callable[[str], dict[str, str]] = lambda prompt: {}
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A text or a pair of texts, and what to predict of it.

    columns: for "text", "pair" (if there is one) and "label", the names that the column has in the various
    copies of the data set. metrics: names from `distlora.tasks.metrics` that are reported beside the loss.
    """

    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("accuracy",)


@dataclass(frozen=True, kw_only=True)
class LabelTask(TextTask):
    """The label is one of several.

    labels: their names, in the order of their numbers; empty if the recipe names them.
    """

    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScoreTask(TextTask):
    """The label is a number from lowest to highest: a regression."""

    metrics: tuple[str, ...] = ("pearson", "spearman")
    lowest: float
    highest: float
