"""From rows to texts: the recipe's task, fields and template, applied to the columns of a data set."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from distlora.data import sources
from distlora.data.chat_template import Conversation
from distlora.data.columns import (
    cell_text,
    columns_of,
    found_in,
    is_not_finite,
    require_column,
    row_name,
)
from distlora.data.labels import whole_number
from distlora.data.sources import Row
from distlora.data.templates import BY_STEPS, CHAT, PAPER, Prompt, ask_by_steps, choose_templates, joined
from distlora.errors import UserError
from distlora.files.user_paths import user_path
from distlora.sentences import listed, nearest
from distlora.tasks import ROLES, Layout, get_task


class DataSection(Protocol):
    """What this package reads of a recipe's `data:` section."""

    task: str
    path: str | None
    fields: dict[str, str] | None
    template: str | None
    think_step_by_step: bool | None
    max_length: int


@dataclass(frozen=True)
class Example:
    """A prompt, the response to learn, and the final answer in it.

    With a chat template, `prompt` is the user's message. Without one, prompt and response make up the text
    that is trained: nothing is put between them. response: None if the row has no answer. options: the
    possible answers, each with its response, of a question; none where the answer is free. own: the places
    (start, end) of the prompt that its template has written. conversation: of the task `chat`, in the place
    of the prompt.
    """

    prompt: str
    response: str | None
    answer: str | None
    options: dict[str, str] = field(default_factory=dict)
    own: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    conversation: Conversation | None = None

    @property
    def shown(self) -> Prompt:
        return Prompt(self.prompt, self.own)


def download(section: DataSection, split: str) -> None:
    """Brings a split from the hub into the local cache, if it comes from the hub.

    One process of each node should do this before the others read the rows.
    """
    if get_task(section.task).rows is None:
        sources.fetch(_path(section), split)


def is_at_hand(section: DataSection) -> bool:
    """Whether the rows can be read without the hub, or the hub could not give them either."""
    path = section.path or get_task(section.task).path
    return get_task(section.task).rows is not None or path is None or sources.is_local(path)


def load_rows(section: DataSection, split: str) -> Sequence[Row]:
    """The rows of a split expression. Raises UserError, also if there are none."""
    task = get_task(section.task)
    if task.rows is not None:
        if section.path is not None:
            raise UserError(
                f"data.path: the task {section.task} makes its own data, "
                "remove the path or choose another task"
            )
        rows = sources.select(sources.parse_split(split), task.rows)
    else:
        rows = sources.load_rows(_path(section), split, task.header, task.local_splits)
    if len(rows) == 0:
        raise UserError(f"data: {origin(section, split)} has no rows; choose another split or another file")
    return rows


def origin(section: DataSection, split: str) -> str:
    """The data set, as error messages name it."""
    has_path = section.path or get_task(section.task).path
    return f"{_path(section) if has_path else section.task}, split {split}"


def _path(section: DataSection) -> str:
    path = section.path or get_task(section.task).path
    if path is None:
        raise UserError(
            f"data.path: the task {section.task} needs one; name a file, a directory or a data set of the hub"
        )
    for folder in filter(None, (get_task(section.task).folder, section.task)):
        if (user_path(path, "data.path") / folder).is_dir():  # those of several tasks lie in one
            return str(Path(path) / folder)
    return path


def is_same_data(first: DataSection, second: DataSection) -> bool:
    """Whether two sections read the same data set, however a local path is written."""

    def place(section: DataSection) -> str:
        if not (section.path or get_task(section.task).path):
            return f"task {section.task}"
        path = _path(section)
        return os.path.realpath(user_path(path, "data.path")) if sources.is_local(path) else path

    return place(first) == place(second)


class Examples:
    """The rows of a split as examples, in order. To make one checks the section against the columns.

    scoring: whether the prompts are those of an evaluation.
    """

    def __init__(self, section: DataSection, split: str, scoring: bool = False):
        self.rows = load_rows(section, split)
        self.origin = origin(section, split)
        self._section, self._task, self._scoring = section, get_task(section.task), scoring
        self.by_steps = scoring and ask_by_steps(section.template, section.think_step_by_step, self._task)
        self._layout = None if section.fields else self._find_layout()
        self._columns = self._assign_columns(section.fields or {})
        self._template, self._template_with_input = choose_templates(
            section.template, self._task, section.task, scoring
        )
        for name in self._template.names:
            self._check_name(name)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        for position, row in enumerate(self.rows):
            yield self._example(row, position)

    @property
    def stops(self) -> tuple[str, ...]:
        """A generated answer ends before the first of these texts."""
        paper = self._task.paper if self._section.template == PAPER else None
        return self._task.stops if paper is None else paper.stops

    # ------------------------------------------------------------------ columns

    def _find_layout(self) -> Layout | None:
        """How the rows are read if they do not have the columns of the task themselves.

        Raises UserError if they have those of no copy of the data set. Where they have some of the task's own
        columns, what is missing is told later, by name.
        """
        own = tuple(self._task.columns[role] for role in ROLES[:2] if role in self._task.columns)
        available = set(columns_of(self.rows))
        if not self._task.layouts or available.issuperset(own):
            return None
        for layout in self._task.layouts:
            if available.issuperset(layout.columns):
                return layout
        if available.intersection(own):
            return None
        known = " nor ".join(
            ", ".join(columns) for columns in (own, *(layout.columns for layout in self._task.layouts))
        )
        raise UserError(
            f"task {self._section.task}: {self.origin} has neither the columns {known}; name others in "
            f"data.fields (it has {listed(columns_of(self.rows))})"
        )

    def _assign_columns(self, fields: dict[str, str]) -> dict[str, str]:
        """The column of each role that has one."""
        for role, column in fields.items():
            if role not in ROLES:
                hint = nearest(role, ROLES) or f"; choose from {', '.join(ROLES)}"
                raise UserError(f"data.fields: unknown name {role!r}{hint}")
            self._require(column, f"data.fields: {role}")
        defaults = {role: column for role, column in self._task.columns.items() if role not in fields}
        if "response" not in fields | defaults:
            raise UserError(
                "data.fields: no column for response; set it, as in {prompt: question, response: answer}"
            )
        if "response" in defaults:
            self._require(defaults["response"], f"response of the task {self._section.task}")
        return {**defaults, **fields}

    def _require(self, column: str, where: str) -> None:
        if self._layout is None or column not in self._task.columns.values():
            require_column(self.rows, column, where, self.origin)

    def _check_name(self, name: str) -> None:
        """Raises UserError unless a template's name means a column that does not show the answer."""
        column = self._columns.get(name, name)
        secret = [
            self._columns["response"],
            self._columns.get("answer"),
            self._layout and self._layout.answer,
        ]
        if column in secret:
            raise UserError(
                f"data.template: {{{name}}} would show the answer; remove it "
                "(the response is added by itself)"
            )
        if name == "prompt" and name not in self._columns:
            raise UserError(
                "data.fields: no column for prompt; set it, as in {prompt: question, response: answer}"
            )
        explicit = self._section.template not in (None, CHAT, PAPER)
        self._require(
            column, f"data.template: {{{name}}}" if explicit else f"{name} of the task {self._section.task}"
        )

    # ------------------------------------------------------------------ rows

    def _example(self, row: Row, position: int) -> Example:
        if self._layout is not None:
            row = self._read(self._layout, row, position)
            if row is None:
                return Example("", None, None)
        has_input = bool(self._text(row, self._columns.get("input"), position, optional=True).strip())
        template = self._template_with_input if has_input else self._template
        values = {
            name: self._text(row, self._columns.get(name, name), position, name == "input")
            for name in template.names
        }
        prompt, own = template.fill(values)
        if self.by_steps:
            prompt += joined(prompt, BY_STEPS)
        response = self._text(row, self._columns["response"], position)
        answer = self._text(row, self._columns.get("answer"), position, optional=True).strip()
        options = self._options(row, position) if self._scoring else {}
        return Example(
            prompt,
            self._following(prompt, response),
            answer or self._task.extract(response),
            {name: self._following(prompt, text) for name, text in options.items()},
            own,
        )

    def _options(self, row: Row, position: int) -> dict[str, str]:
        column = self._columns.get("prompt")
        return self._task.options(self._text(row, column, position, optional=True))

    def _following(self, prompt: str, response: str) -> str:
        """A response as it follows a prompt: a task's own prompt with a space, if there is no white space,
        and every other one just as it is written."""
        return response if self._section.template is not None else joined(prompt, response)

    def _read(self, layout: Layout, row: Row, position: int) -> Row | None:
        """A row with the columns of the task beside its own; None for a row without an answer."""
        value = row.get(layout.answer)
        if value is None or not str(value).strip() or (layout.marked and whole_number(value) == "-1"):
            return None
        where = f"data: {row_name(position, self.origin)}"
        for column in layout.columns:
            if row.get(column) is None or is_not_finite(row[column]):
                found = found_in(row.get(column))
                raise UserError(f"{where} has {found} in column {column!r}; correct it")
        try:
            return {**row, **layout.read(row)}
        except ValueError as error:
            raise UserError(f"{where} has {error}; correct it") from None
        except (KeyError, TypeError, IndexError):
            form = f"rows of the task {self._section.task} ({', '.join(layout.columns)})"
            raise UserError(f"{where} has another form than {form}; correct it") from None

    def _text(self, row: Row, column: str | None, position: int, optional: bool = False) -> str:
        """A cell as text. An optional one may be missing or null; its text is then empty."""
        if optional and (column is None or row.get(column) is None):
            return ""
        return cell_text(row, column, position, self.origin)
