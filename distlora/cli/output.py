"""Standard output and error that may be closed, full, a pipe which nobody reads any more, or in an encoding
that lacks a character. No secret is written there, whoever writes.

None of these ends the program: a run that has cost days goes on without its terminal. Whether the output
itself was the work is for the command line to judge, see `Output.error`.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from distlora.files.confidential import hidden

#: A pipe that nobody reads, a terminal that is gone. A full disk may have room again.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class Output:
    """A text stream on which writing never fails, and that shows no secret. error: the first that was passed
    over.
    """

    def __init__(self, stream: TextIO):
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(hidden(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    def finish(self) -> None:
        """Writes out what is left; what cannot be written is dropped, or Python would complain at its end."""
        self.flush()
        if self.error is not None:
            self._drop()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            if error.errno in _GONE:
                self._drop()

    def _drop(self) -> None:
        """From here on the stream leads nowhere, also for libraries that write to its number."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[Output]:
    """A context in which output never fails; yields the standard output."""
    _open_closed()
    before = sys.stdout, sys.stderr
    for stream in before:
        _replace_unknown_characters(stream)
    sys.stdout, sys.stderr = out, err = Output(sys.stdout), Output(sys.stderr)
    try:
        yield out
    finally:
        for stream in (out, err):
            stream.finish()
        sys.stdout, sys.stderr = before


def _replace_unknown_characters(stream: TextIO) -> None:
    """Has what its encoding lacks, such as a letter of a path, written as an escape: ü as \\xfc."""
    if hasattr(stream, "reconfigure"):  # a stream that a caller has put there may have none
        with contextlib.suppress(OSError):  # it is flushed, which may fail
            stream.reconfigure(errors="backslashreplace")


def _open_closed() -> None:
    """Opens what the caller has closed. Otherwise the next file to be opened would get its number, and
    with it whatever a library prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the end)
