"""Requests to stop: SIGTERM (a scheduler takes the nodes back) or SIGUSR1 (the time of a batch job runs out).

The signal is only remembered here. The ranks agree on it between micro-batches, see `Comm.sum_or_stop`.
Therefore it is enough that one rank was asked, and all ranks stop at the same place.
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
    """A context manager in which SIGNALS do not end the process but are remembered.

    In a thread other than the main one it does nothing.

    Python calls signal handlers in the main thread, after that has returned from a collective. This is too
    late if a rank is gone. So this class also reads the signal's number from a socket: Python's C code writes
    it there at once, and any thread can read it.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._logged = False
        self._before: dict[signal.Signals, object] = {}
        self._sockets: tuple[socket.socket, ...] = ()
        self._woken_before = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.setblocking(False)
            self._woken_before = signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
            # A signal to a forked helper process is not meant for this process.
            os.register_at_fork(after_in_child=self._close_sockets)
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._sockets:
            signal.set_wakeup_fd(self._woken_before)
            for end in self._sockets:
                end.close()
            self._sockets = ()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here, because the signal may interrupt the writing of a log line.
        self._received = signal.Signals(number)

    def asked(self) -> bool:
        """Whether one of the signals has come. May be called in any thread."""
        self._read_socket()
        if self._received is not None and not self._logged:
            self._logged = True
            log.info("%s: stopping at the next micro-batch", self._received.name)
        return self._received is not None

    def _read_socket(self) -> None:
        for end in self._sockets[:1]:
            with contextlib.suppress(OSError):  # nothing has come, or the socket was closed just now
                self._received = next(
                    (signal.Signals(number) for number in end.recv(64) if number in SIGNALS), self._received
                )
