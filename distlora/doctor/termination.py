"""SIGTERM during an examination."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM raises SystemExit with code 143, the code that a shell reports for SIGTERM.

    So the files that an examination has left in run directories are removed on the way out. For the main
    thread only.
    """

    def stop(number: int, frame) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
