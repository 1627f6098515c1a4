"""Being asked to stop: SIGTERM (a scheduler takes the nodes back) or SIGUSR1 (a batch script that sees its
time run out).

The signal is only remembered here. Ranks agree on it between micro-batches, see `Comm.sum_or_stop`, so one
rank that was asked is enough, and all stop at the same place.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger(__name__)


class StopSignals:
    """A context manager: inside, SIGNALS do not end the process but are remembered. Outside the main thread
    it does nothing.

    Python calls handlers in the main thread, once that comes back from a collective: too late where a rank is
    gone. The signal's number arrives at once, through a socket to which Python's own part in C writes it, and
    any thread can look there.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._told = False
        self._before: dict[signal.Signals, object] = {}
        self._sockets: tuple[socket.socket, ...] = ()
        self._woken_before = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.setblocking(False)
            self._woken_before = signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
            os.register_at_fork(
                after_in_child=self._stay_deaf
            )  # what a helper process is told is not meant for this one
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._stay_deaf()

    def _stay_deaf(self) -> None:
        if self._sockets:
            signal.set_wakeup_fd(self._woken_before)
            for end in self._sockets:
                end.close()
            self._sockets = ()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here: the signal may have come in the middle of a log line.
        self._received = signal.Signals(number)

    def asked(self) -> bool:
        """Whether one of them has come. In any thread."""
        self._look()
        if self._received is not None and not self._told:
            self._told = True
            log.info("%s: stopping at the next micro-batch", self._received.name)
        return self._received is not None

    def _look(self) -> None:
        for end in self._sockets[:1]:
            with contextlib.suppress(OSError):  # nothing is there, or it was closed just now
                self._received = next(
                    (signal.Signals(number) for number in end.recv(64) if number in SIGNALS), self._received
                )
