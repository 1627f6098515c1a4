"""The process of one run, and the signals that are passed on to it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from distlora.errors import UserError
from distlora.sweeps.claims import BEAT
from distlora.sweeps.processes import MARK, kill_marked, marked

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
#: Seconds that what a launcher leaves behind may go on.
GRACE = 10.0


class Signals:
    """A context manager in which SIGNALS do not end this process, but ask the run to stop.

    SIGTERM and SIGUSR1 are passed on as they came: `distlora train` and the launch scripts understand both.
    For the others the run gets SIGTERM, and for a second Ctrl-C SIGKILL.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._child: subprocess.Popen[str] | None = None
        self._token = ""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Signals":
        # What is ignored stays so: under nohup the terminal's end is no request to stop.
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, child: subprocess.Popen[str] | None, token: str = "") -> None:
        """The process that signals are passed on to from now on, and one that has come already. token: that
        it and all that it starts are marked with.
        """
        self._child, self._token = child, token
        if self.asked is not None:
            self._pass_on(self.asked)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None and number == signal.SIGINT
        self.asked = signal.Signals(number)
        self._pass_on(signal.SIGKILL if again else self.asked)

    def _pass_on(self, number: signal.Signals) -> None:
        if self._child is None or self._child.returncode is not None:
            return
        if number == signal.SIGKILL:
            kill_marked(self._token)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, number if number == signal.SIGUSR1 else signal.SIGTERM)


def run(words: Sequence[str], output: Path, signals: Signals, token: str, renew: Callable[[], None]) -> int:
    """Runs the words, without a shell, to the end. Returns the exit code; below 0 it is a signal's number.

    output: a file to which is appended what it says. token: that all its processes are marked with, wherever
    a launcher puts them; none of them is left at the end. renew: called every BEAT seconds; if it raises, the
    run is killed. Raises UserError if it cannot be started.
    """
    with output.open("ab") as file:
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, MARK: token},
            )
        except OSError as error:
            raise UserError(f"{words[0]} cannot be started: {error.strerror}") from None
    signals.watch(child, token)
    try:
        return _wait(child, renew)
    except BaseException:
        kill_marked(token)
        child.wait()
        raise
    finally:
        signals.watch(None)
        _end(token)


def _wait(child: subprocess.Popen[str], renew: Callable[[], None]) -> int:
    while True:
        renew()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=BEAT)


def _end(token: str) -> None:
    """Kills what the run has left: it would hold the memory that the next one needs."""
    deadline = time.monotonic() + GRACE
    while marked(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline = time.monotonic() + GRACE
    while marked(token) and time.monotonic() < deadline:
        kill_marked(token)  # again: it may start new ones meanwhile
        time.sleep(0.05)


def last_sentence(output: Path, since: int) -> str:
    """The program's last sentence in what was appended after `since` bytes; "" without one."""
    with output.open("rb") as file:
        file.seek(since)
        lines = file.read().decode(errors="replace").splitlines()
    said = (line.partition("distlora: ")[2] for line in reversed(lines) if "distlora: " in line)
    return next(said, "")
