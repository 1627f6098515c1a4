"""Texts that users write: files of bounded size, and JSON. Every failure is one sentence with the place."""

import json
import math
import os
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.files.problems import dangling_link
from distlora.sentences import given_twice

#: Bytes of a file that is written by hand, or by a program in its place.
LONGEST = 1 << 20
#: Of a whole number in JSON, so that 64 bits hold it.
_DIGITS = 18


def read_user_text(
    path: str | os.PathLike[str], kind: str, missing: str | None = None, longest: int = LONGEST
) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Arguments and errors: as for
    `read_user_bytes`.
    """
    content = read_user_bytes(path, kind, missing, longest)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} cannot be read as {kind}: line {line} is not utf-8; save it as UTF-8"
        ) from None


def read_user_bytes(
    path: str | os.PathLike[str],
    kind: str,
    missing: str | None = None,
    longest: int = LONGEST,
    remedy: str = "",
) -> bytes:
    """The content of a file.

    kind: what it should be, such as "a recipe". missing: the sentence if nothing is there. longest: in bytes;
    no more is read. remedy: the end of the other sentences. Raises UserError for everything that fails.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(longest + 1)
        if len(content) <= longest:
            return content
        reason = f"it has more than {longest:,} bytes"
    except FileNotFoundError as error:
        link = dangling_link(Path(path))
        said = link or missing
        if said:
            raise UserError(said) from None
        reason = error.strerror or str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError:  # a NUL, or half of a character
        reason = "no file can have this name"
    raise UserError(f"{path} cannot be read as {kind}: {reason}{remedy}")


# ---------------------------------------------------------------------- JSON


def parse_json(text: str, name: str) -> Any:
    """The content of a JSON text. Raises UserError, which calls the text `name`, for anything else: also for
    a key that is given twice, numbers beyond all numbers, and values that lie too deep.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        raise UserError(
            f"{name} is not JSON: {error.msg} {where} (JSON has no comments and no trailing commas)"
        ) from None
    except RecursionError:
        raise UserError(f"{name} is not read: values lie too deep in others") from None
    except _Refused as refused:
        raise UserError(f"{name} is not JSON: {refused}") from None


class _Refused(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused(f"key {given_twice(key for key, _ in pairs)} is given twice")
    return found


def _refuse_constant(word: str) -> None:
    raise _Refused(f"{word} is no number; write one in digits")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise _Refused(f"{text[:_DIGITS]}… has {len(text):,} digits, wanted at most {_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Refused(f"{text[:20]} is beyond all numbers")
    return number
