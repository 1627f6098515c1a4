"""JSON that others may have written or damaged, parsed in one place and within limits.

Every failure is a ValueError (or an OSError) whose message says in a few words what is wrong.
"""

import functools
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Value = TypeVar("Value")

#: Bytes of a file at most. The largest that a run writes tells of the updates of all layers.
LARGEST_FILE = 256 << 20
#: Beyond that, whole numbers are not exact in other programs.
LARGEST_NUMBER = 1 << 53
#: Objects and lists within each other at most.
DEEPEST = 64


def parse_json(data: bytes | str, unique: bool = True) -> Any:
    """The value that is written there. unique: whether an object must not have a key twice.

    Raises ValueError for what is not UTF-8 or no JSON, numbers of thousands of digits, and deep nesting.
    """
    pairs = _unique_keys if unique else None
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        found = json.loads(text, object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not _is_shallow(found):
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return found


def read_json(path: Path, largest: int = LARGEST_FILE, unique: bool = True) -> Any:
    """The same of a file. Raises OSError and ValueError."""
    return parse_json(read_limited(path, largest), unique)


def read_limited(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """The content of an ordinary file of at most so many bytes. Raises OSError and ValueError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no ordinary file")
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has {about.st_size} bytes, and at most {largest} are read")
    return data


def is_whole(value: Any) -> bool:
    """Whether it is a whole number from 0 on that other programs can hold, too."""
    return type(value) is int and 0 <= value <= LARGEST_NUMBER


def is_number(value: Any) -> bool:
    """Whether it is a number, also one that is not finite, that becomes a float without an error."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_NUMBER)


def checked(kind: type[Value], content: Any) -> Value:
    """A dataclass from an object of JSON, every field with the type that it has there. Raises ValueError."""
    try:
        value: Value = _adapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    return value


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a value, and where in it, in a few words."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:60] for part in found["loc"])
    message = found["msg"].removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}" if place else message


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]} is there twice")
        found[key] = value
    return found


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _values(outer)]
        if not level:
            return True
    return False


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
