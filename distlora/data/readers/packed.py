"""Files, packed by gzip or not, as bytes; and the bounds of what a small file may become in memory."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from distlora.errors import UserError
from distlora.sentences import first_line

#: Bytes that any file may become, and how many times its own size a larger one. Texts and images are packed
#: to a tenth, and hardly ever to a fiftieth; a file that is made to fill a machine's memory, to a thousandth.
FREE, RATIO = 64 << 20, 50


def is_packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def most_bytes(file: Path) -> int:
    """What a file may become in memory."""
    return max(FREE, RATIO * os.stat(file).st_size)


def too_large(file: Path) -> UserError:
    """For a file that would become more."""
    return UserError(
        f"data.path: {file} holds more than {RATIO} times its own size, as no data does; "
        "make it again, without what is repeated"
    )


@contextmanager
def opened_bytes(file: Path) -> Iterator[BinaryIO]:
    """The unpacked content as a stream.

    Raises UserError for a damaged archive, one that unpacks without end, and a file that cannot be read.
    """
    try:
        if not is_packed(file):
            with file.open("rb") as stream:
                yield stream
            return
        with gzip.open(file) as archive, io.BufferedReader(_Bounded(archive, file), 1 << 17) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.path: {file} is damaged ({first_line(error)}), fetch it again") from None
    except OSError as error:
        raise UserError(
            f"data.path: {file} cannot be read ({error.strerror or error}); check the file"
        ) from error


class _Bounded(io.RawIOBase):
    """The bytes of a stream, up to a number that the size of its file allows."""

    def __init__(self, archive: BinaryIO, file: Path):
        self._archive, self._file, self._left = archive, file, most_bytes(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._archive.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise too_large(self._file)
        return count
