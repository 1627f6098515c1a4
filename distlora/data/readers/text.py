"""Files as text: UTF-8, or what a byte order mark says, packed by gzip or not."""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from distlora.data.readers.packed import opened_bytes
from distlora.errors import UserError

#: Characters of a line: more than the longest books have.
LONGEST_LINE = 1 << 26

#: By the first bytes of a file; the longest first, because one begins with another.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def opened_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file as a stream of text. newline: as for `open`.

    Raises UserError for bytes that are no text, a damaged archive, and a file that cannot be read.
    """
    try:
        with opened_bytes(file) as raw:
            start = raw.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
        with opened_bytes(file) as raw, io.TextIOWrapper(raw, encoding, newline=newline) as stream:
            yield stream
    except UnicodeError:
        raise UserError(f"data.path: {file} is not UTF-8 text{_where(file)}; convert it to UTF-8") from None


def _where(file: Path) -> str:
    """The first line that is not UTF-8, as a part of a sentence."""
    with opened_bytes(file) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" (line {number})"
    return ""


def lines_of(stream: TextIO, file: Path) -> Iterator[str]:
    """The lines of a file. Raises UserError for one with a NUL, which texts of two bytes a character have,
    and for one without end.
    """
    for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), ""), 1):
        refuse_nul(line, file, number)
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"data.path: line {number} of {file} has more than {LONGEST_LINE:,} characters, divide it"
            )
        yield line


def refuse_nul(text: str, file: Path, line: int = 1) -> None:
    """line: the number of the first one of the text."""
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise UserError(
            f"data.path: {file} has a NUL byte in line {line}: it is damaged, or UTF-16 without a byte order "
            "mark; convert it to UTF-8"
        )
