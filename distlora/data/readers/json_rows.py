"""Rows of JSON files: an object on each line, a list of objects, or such a list under a key of one object."""

import json
import re
from pathlib import Path
from typing import Any

from distlora.data.readers.text import lines_of, opened_text, refuse_nul
from distlora.data.readers.values import Row, kind_of
from distlora.errors import UserError
from distlora.sentences import given_twice, listed, nearest

#: The keys of messages, in either form.
_MESSAGE = ({"role", "content"}, {"from", "value"})
_SPACE = re.compile(r"[ \t\r\n]*")


class _KeyTwice(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys are different: of two equal ones the first would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _KeyTwice(f"the key {given_twice(key for key, _ in pairs)!r} is given twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _problem(error: Exception) -> str:
    """What is wrong with a text that the decoder refuses, without the place."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, _KeyTwice) else "a number has too many digits"


#: What the decoder raises: JSONDecodeError and the other ValueErrors of `_problem`.
_REFUSED = (ValueError, RecursionError)


def read_json_lines(file: Path) -> list[Row]:
    """An object on each line; empty lines are left out. Errors: UserError with the line, counted from 1."""
    rows: list[Row] = []
    with opened_text(file) as stream:
        for number, line in enumerate(lines_of(stream, file), 1):
            if line.strip():
                rows.append(_row_of_line(line, number, file, first=not rows))
    return rows


#: The end of a sentence about a file that holds one value over all its lines.
_SPREAD = ": a list, or an object over several lines, belongs in a file called .json"


def _row_of_line(line: str, number: int, file: Path, first: bool) -> Row:
    try:
        row = _DECODER.decode(line)
    except _REFUSED as error:
        is_begun = first and line.strip()[0] in "[{" and getattr(error, "pos", 0) >= len(line.rstrip())
        advice = _SPREAD if is_begun else "; correct it"
        raise UserError(
            f"data.path: line {number} of {file} is not valid JSON ({_problem(error)}){advice}"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"data.path: line {number} of {file} is {kind_of(row)} and not an object, "
            f"write one object a line{_SPREAD if first and isinstance(row, list) else ''}"
        )
    return row


def read_json(file: Path, key: str | None = None) -> list[Row]:
    """A list of objects; or objects one after the other; or, with a key, the list that lies under it in one
    object (`data`, or `data.train` for one in another).

    Errors: UserError with the line, counted from 1, or the entry, counted from 0.
    """
    with opened_text(file) as stream:
        text = stream.read()
    refuse_nul(text, file)
    values = _values(text, file)
    if key is not None:
        rows = _under(values, key, file)
    elif len(values) == 1 and isinstance(values[0], list):
        rows = values[0]
    else:
        rows = values
        if len(values) == 1 and isinstance(values[0], dict):
            _check_is_row(values[0], file)
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"data.path: entry {position} of {file}, counted from 0, is {kind_of(row)} and not an "
                "object; write a list of objects"
            )
    return rows


def _values(text: str, file: Path) -> list[Any]:
    """The values that stand in a text one after the other."""
    values, place = [], _after_space(text, 0)
    while place < len(text):
        try:
            value, place = _DECODER.raw_decode(text, place)
        except _REFUSED as error:
            line = getattr(error, "lineno", None) or text.count("\n", 0, place) + 1
            known = isinstance(error, json.JSONDecodeError)
            where = f"line {line}" if known else f"in what begins on line {line}"
            raise UserError(
                f"data.path: {file} is not valid JSON ({where}: {_problem(error)}); correct it"
            ) from None
        values.append(value)
        place = _after_space(text, place)
    return values


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()


def _under(values: list[Any], key: str, file: Path) -> list[Any]:
    """The list under a key of the only object."""
    found = values[0] if len(values) == 1 else values
    left = key
    while left:
        part, left = _next_key(left, found)
        if not isinstance(found, dict):
            raise UserError(
                f"data.path: {file} has {kind_of(found)} where an object with the key {part!r} is named, "
                "correct what follows the colon"
            )
        if part not in found:
            hint = nearest(part, found) or f" (it has {listed(found)})"
            raise UserError(f"data.path: {file} has no key {part!r}{hint}")
        found = found[part]
    if not isinstance(found, list):
        raise UserError(
            f"data.path: under {key} of {file} lies {kind_of(found)}, wanted a list of objects"
            + _lists_hint(found, file, f"{key}.")
        )
    return found


def _next_key(key: str, content: Any) -> tuple[str, str]:
    """The longest part of a dotted key that is itself one of an object's keys, or the part before the first
    dot; and the rest."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        part = ".".join(parts[:count])
        if count == 1 or (isinstance(content, dict) and part in content):
            break
    return part, ".".join(parts[count:])


def _check_is_row(content: dict[str, Any], file: Path) -> None:
    """Raises UserError for a file that is one object and no single row: its rows lie under a key, or its
    columns are lists. One conversation is a row."""
    if any(map(_is_conversation, content.values())):
        return
    hint = _lists_hint(content, file, "")
    nested = [name for name, value in content.items() if isinstance(value, dict | list)]
    if hint or (nested and len(nested) == len(content)):
        raise UserError(
            f"data.path: {file} is one object, with the keys {listed(content)}; wanted a list of objects, "
            f"or one object a line{hint}"
        )


def _is_conversation(value: Any) -> bool:
    """Whether it is a list that begins with a message."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(keys <= first.keys() for keys in _MESSAGE)


def _lists_hint(content: Any, file: Path, prefix: str) -> str:
    """The end of a sentence that says how the lists of objects in an object are named."""
    if not isinstance(content, dict):
        return ""
    keys = [
        name
        for name, value in content.items()
        if value and isinstance(value, list) and all(isinstance(row, dict) for row in value)
    ]
    return f"; name the list of rows after a colon, as in data.path={file}:{prefix}{keys[0]}" if keys else ""
