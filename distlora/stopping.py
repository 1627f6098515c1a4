"""Being asked to stop: SIGTERM (a scheduler takes the nodes back) or SIGUSR1 (a batch script that sees its time run out).

The signal only sets a flag here. Ranks agree on it between micro-batches, see `Comm.sum_or_stop`, so one rank that was asked is
enough, and all stop at the same place.
"""

import logging
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger(__name__)


class StopSignals:
    """A context manager: inside, SIGNALS do not end the process but are remembered. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._told = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here: the signal may have come in the middle of a log line.
        self._received = signal.Signals(number)

    def asked(self) -> bool:
        """Whether one of them has come."""
        if self._received is not None and not self._told:
            self._told = True
            log.info("%s: stopping at the next micro-batch", self._received.name)
        return self._received is not None
