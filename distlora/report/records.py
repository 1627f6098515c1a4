"""The JSON files of a run directory, read strictly: a broken one is one sentence that names file and line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distlora.errors import UserError
from distlora.files import json_files

Value = TypeVar("Value")

#: How numbers that JSON does not know are written.
NOT_FINITE = ("nan", "inf", "-inf")


def read_json(path: Path, kind: type[Value], default: Value) -> Value:
    """The content of a JSON file, which must be of this kind; the default where there is no file."""
    try:
        found = json_files.read_json(path)
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); remove or repair it") from None
    if not isinstance(found, kind):
        raise UserError(f"{path}: wanted a JSON {_name(kind)}; remove or repair it")
    return found


def read_lines(path: Path, check: Callable[[dict[str, Any]], str | None]) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; none where there is no file.

    check: what is wrong with an object, None if nothing. A last line that is not finished belongs to a run
    that is still writing, and is left out. Raises UserError with the file and the line.
    """
    try:
        text = json_files.read_limited(path).decode("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    *lines, unfinished = text.split("\n")
    records = [_record(line, f"{path}, line {number}", check) for number, line in enumerate(lines, 1) if line]
    if unfinished:
        try:
            records.append(_record(unfinished, str(path), check))
        except UserError:
            pass
    return records


def _record(line: str, place: str, check: Callable[[dict[str, Any]], str | None]) -> dict[str, Any]:
    try:
        record = json_files.parse_json(line)
    except ValueError:
        raise UserError(f"{place} is no JSON; remove or repair the line") from None
    problem = check(record) if isinstance(record, dict) else "wanted a JSON object"
    if problem:
        raise UserError(f"{place}: {problem}; remove or repair the line")
    return record


def has_step(record: dict[str, Any]) -> str | None:
    """A check for `read_lines`: a record says its step."""
    return None if is_count(record.get("step")) else "the key step is missing, or no whole number from 0 on"


def metrics_problem(record: dict[str, Any]) -> str | None:
    """A check for `read_lines`: a step, and otherwise numbers."""
    wrong = [key for key, value in record.items() if as_number(value) is None]
    return has_step(record) or (f"{wrong[0]} is no number" if wrong else None)


def is_count(value: Any) -> bool:
    return json_files.is_whole(value)


def as_number(value: Any) -> float | None:
    """A number of a file, also one that is not finite; None for what is none."""
    if json_files.is_number(value):
        return float(value)
    return float(value) if isinstance(value, str) and value in NOT_FINITE else None


def _name(kind: type) -> str:
    return {dict: "object", list: "list"}[kind]
