"""From rows to texts: the recipe's task, fields and template, applied to the columns of a data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Protocol

from distlora.data import sources
from distlora.data.sources import Row
from distlora.errors import UserError
from distlora.sentences import nearest
from distlora.tasks import ROLES, get_task

#: The value of `data.template` that asks for the tokenizer's chat template.
CHAT = "chat"


class DataSection(Protocol):
    """What this package reads of a recipe's `data:` section."""

    task: str
    path: str | None
    fields: dict[str, str] | None
    template: str | None
    max_length: int


@dataclass(frozen=True)
class Example:
    """A prompt, the response to learn, and the final answer in it.

    With a chat template, `prompt` is the user's message.
    """

    prompt: str
    response: str
    answer: str | None


@dataclass(frozen=True)
class Template:
    """A parsed format string: pairs of literal text and the name that follows it, None if none follows."""

    pieces: list[tuple[str, str | None]]

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.pieces if name is not None]

    def fill(self, values: dict[str, str]) -> str:
        return "".join(text + ("" if name is None else values[name]) for text, name in self.pieces)


def parse_template(template: str) -> Template:
    """Parses `data.template`. Only plain names may stand in braces: they are looked up, never evaluated."""
    pieces = []
    try:
        for text, name, spec, conversion in Formatter().parse(template):
            if spec or conversion or name == "":
                raise ValueError("only names may stand in braces")
            pieces.append((text, name))
    except ValueError as error:
        raise UserError(
            f"data.template: {error}, write {{name}} for a column and {{{{ }}}} for braces as text"
        ) from None
    return Template(pieces)


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
        rows = sources.load_rows(_path(section), split, task.header)
    if len(rows) == 0:
        raise UserError(f"data: {origin(section, split)} has no rows, choose another split or another file")
    return rows


def origin(section: DataSection, split: str) -> str:
    """The data set, as error messages name it."""
    path = section.path or get_task(section.task).path or section.task
    return f"{path}, split {split}"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of a data set. Where rows may differ (JSON), those of the first row."""
    columns = getattr(rows, "column_names", None)
    return list(rows[0]) if columns is None else columns


def require_column(rows: Sequence[Row], column: str, where: str, origin: str) -> None:
    """Raises UserError if there is no such column. where: what asks for it."""
    available = columns_of(rows)
    if column not in available:
        hint = nearest(column, available) or ", name another in data.fields"
        columns = ", ".join(map(str, available))
        raise UserError(f"{where}: {origin} has no column {column!r}{hint} (it has {columns})")


def cell_text(row: Row, column: str, position: int, origin: str) -> str:
    """A cell as text. Raises UserError if it holds neither text nor a number.

    position, origin: the row's number and the data set, for the error.
    """
    value = row.get(column)
    if not isinstance(value, str | int | float):
        found = "no value" if value is None else f"a {type(value).__name__}"
        raise UserError(
            f"data: row {position} of {origin} has {found} in column {column!r}, make it text or a number"
        )
    return str(value)


def _path(section: DataSection) -> str:
    path = section.path or get_task(section.task).path
    if path is None:
        raise UserError(
            f"data.path: the task {section.task} needs one, name a file, a directory or a data set of the hub"
        )
    return path


class Examples:
    """The rows of a split as examples, in order. To make one checks the section against the columns."""

    def __init__(self, section: DataSection, split: str):
        self.rows = load_rows(section, split)
        self.origin = origin(section, split)
        self._section = section
        self._task = get_task(section.task)
        self._columns = self._assign_columns(section.fields or {})
        self._template, self._template_with_input = self._choose_templates(section.template)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        for position, row in enumerate(self.rows):
            yield self._example(row, position)

    def _assign_columns(self, fields: dict[str, str]) -> dict[str, str]:
        """The column of each role that has one."""
        for role, column in fields.items():
            if role not in ROLES:
                hint = nearest(role, ROLES) or f", choose from {', '.join(ROLES)}"
                raise UserError(f"data.fields: unknown name {role!r}{hint}")
            self._require(column, f"data.fields: {role}")
        defaults = {role: column for role, column in self._task.columns.items() if role not in fields}
        if "response" not in fields | defaults:
            raise UserError(
                "data.fields: no column for response, set it, as in {prompt: question, response: answer}"
            )
        if "response" in defaults:
            self._require(defaults["response"], f"response of the task {self._section.task}")
        return {**defaults, **fields}

    def _choose_templates(self, template: str | None) -> tuple[Template, Template]:
        """The templates for a row without an input, and for a row with one."""
        if template == CHAT:
            plain, with_input = Template([("", "prompt")]), Template([("", "prompt"), ("\n\n", "input")])
        elif template is not None:
            plain = with_input = parse_template(template)
        else:
            plain = parse_template(self._task.template)
            with_input = parse_template(self._task.template_with_input or self._task.template)
        for name in plain.names:
            self._check_name(name)
        return plain, with_input

    def _check_name(self, name: str) -> None:
        """Raises UserError unless a template's name means a column that does not show the answer."""
        column = self._columns.get(name, name)
        if column in (self._columns["response"], self._columns.get("answer")):
            raise UserError(
                f"data.template: {{{name}}} would show the answer, remove it "
                "(the response is added by itself)"
            )
        if name == "prompt" and name not in self._columns:
            raise UserError(
                "data.fields: no column for prompt, set it, as in {prompt: question, response: answer}"
            )
        explicit = self._section.template not in (None, CHAT)
        self._require(
            column, f"data.template: {{{name}}}" if explicit else f"{name} of the task {self._section.task}"
        )

    def _require(self, column: str, where: str) -> None:
        require_column(self.rows, column, where, self.origin)

    def _example(self, row: Row, position: int) -> Example:
        has_input = bool(self._text(row, self._columns.get("input"), position, optional=True).strip())
        template = self._template_with_input if has_input else self._template
        values = {
            name: self._text(row, self._columns.get(name, name), position, name == "input")
            for name in template.names
        }
        response = self._text(row, self._columns["response"], position)
        answer = self._text(row, self._columns.get("answer"), position, optional=True).strip()
        return Example(template.fill(values), response, answer or self._task.extract(response))

    def _text(self, row: Row, column: str | None, position: int, optional: bool = False) -> str:
        """A cell as text. An optional one may be missing or null; its text is then empty."""
        if optional and (column is None or row.get(column) is None):
            return ""
        return cell_text(row, column, position, self.origin)
