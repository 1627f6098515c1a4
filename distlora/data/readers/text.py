"""Files as text: UTF-8, or what a byte order mark says, packed by gzip or not."""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from distlora.errors import UserError
from distlora.sentences import first_line

#: By the first bytes of a file; the longest first, because one begins with another.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _opened(file: Path) -> BinaryIO:
    return gzip.open(file) if is_packed(file) else file.open("rb")


@contextmanager
def opened_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file as a stream of text. newline: as for `open`.

    Raises UserError for bytes that are no text, a damaged archive, and a file that cannot be read.
    """
    try:
        with _opened(file) as raw:
            start = raw.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
        opener = gzip.open if is_packed(file) else open
        with opener(file, "rt", encoding=encoding, newline=newline) as stream:
            yield stream
    except UnicodeError:
        raise UserError(f"data.path: {file} is not UTF-8 text{_where(file)}, convert it to UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.path: {file} is damaged ({first_line(error)}), fetch it again") from None
    except OSError as error:
        raise UserError(
            f"data.path: {file} cannot be read ({error.strerror or error}), check the file"
        ) from error


def _where(file: Path) -> str:
    """The first line that is not UTF-8, as a part of a sentence."""
    with _opened(file) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" (line {number})"
    return ""


def lines_of(stream: Iterable[str], file: Path) -> Iterator[str]:
    """The lines of a file. Raises UserError for one with a NUL, which texts of two bytes a character have."""
    for number, line in enumerate(stream, 1):
        refuse_nul(line, file, number)
        yield line


def refuse_nul(text: str, file: Path, line: int = 1) -> None:
    """line: the number of the first one of the text."""
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise UserError(
            f"data.path: {file} has a NUL byte in line {line}: it is damaged, or UTF-16 without a byte order "
            "mark; convert it to UTF-8"
        )
