"""Notices that a rank has gone silent while the others wait for it in a collective.

A thread of every rank keeps writing new numbers to a board on rank 0's host, even while the main thread
factorises a large weight or waits for a slow file. Rank 0 reads all numbers. If one stays the same for too
long, rank 0 writes its verdict on the board, and every rank that reads it ends. A rank that cannot reach the
board any more concludes by itself that rank 0 is gone.

Without this a collective would fail after half an hour, with the address of a socket and no name of a rank.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from distlora.sentences import ranks_on_hosts

#: The longest and the shortest time between two beats, in seconds. Within these limits it is a tenth of the
#: time that a rank may be silent.
LONGEST_INTERVAL, SHORTEST_INTERVAL = 2.0, 0.2
#: Beats after which a rank counts as silent once a collective has failed, so that something is known to be
#: wrong.
BEATS_WHEN_BROKEN = 4

VERDICT, TROUBLE, BEAT = "heartbeat/verdict", "heartbeat/trouble", "heartbeat/beat"


class Board(Protocol):
    """Texts under names, kept on rank 0's host.

    If the host cannot be reached, the methods raise ConnectionError or hang.
    """

    def write(self, name: str, text: str) -> None:
        """Replaces the text under this name."""

    def read(self, names: Iterable[str]) -> list[str | None]:
        """The texts in the order of the names; None for a name without a text."""


@dataclass(frozen=True)
class Verdict:
    """Why the run has to end. silent: because a rank went silent, so that another start may succeed."""

    sentence: str
    silent: bool


class Heartbeat:
    """One rank's part, from `start` to `stop`."""

    def __init__(
        self,
        board: Board,
        rank: int,
        hosts: Sequence[str],
        hang_timeout: float,
        end: Callable[[Verdict, bool], None],
        interval: float | None = None,
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        """hosts: the host of every rank. hang_timeout: seconds that a rank may be silent. interval: seconds
        between two beats.

        end(verdict, alone): called once, in a thread of this object. It should not return before
        `reading_time`. alone: this rank has reached the verdict by itself, because it cannot reach rank 0.
        hurried: whether silence must be noticed soon, because a launcher that has lost a rank will kill the
        others.
        """
        self._board, self._rank, self._hosts, self._end = board, rank, hosts, end
        self._patience, self._hurried = hang_timeout, hurried
        self._interval = interval or min(LONGEST_INTERVAL, max(SHORTEST_INTERVAL, hang_timeout / 10))
        self._closing, self._decided = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._answered = time.monotonic()
        self._broken = False
        self._own_trouble: str | None = None
        self._told = threading.Event()
        watched = range(len(hosts)) if rank == 0 else [0]
        self._seen: dict[int, tuple[str | None, float]] = {
            other: (None, time.monotonic()) for other in watched
        }
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """To be called before this rank ends in agreement with the others."""
        self._closing.set()

    def explain(self, sentence: str | None) -> None:
        """To be called by a rank that is about to end alone.

        sentence: what went wrong on this rank. None if a collective failed, which probably means that another
        rank is gone. Then this waits until a silent rank would have been noticed, and does not return if one
        was.
        """
        if sentence is None:
            self._broken = True
            self._decided.wait((BEATS_WHEN_BROKEN + 3) * self._interval)
            if self._decided.is_set():
                threading.Event().wait()  # until `end` ends this process
            return
        self._own_trouble = sentence
        self._told.wait(2 * self._interval)
        if self._rank == 0:
            time.sleep(self.reading_time)

    @property
    def reading_time(self) -> float:
        """Seconds that rank 0 waits after its verdict, so that the others can read it.

        The board ends with rank 0's process.
        """
        return 2 * self._interval

    # ------------------------------------------------------------------ the two threads

    def _beat(self) -> None:
        number = 0
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self._board.write(f"{BEAT}/{self._rank}", str(number))
                self._tell_trouble()
                verdict = self._make_verdict() if self._rank == 0 else self._read_verdict()
            except ConnectionError:
                if self._rank:
                    self._handle_lost_board()
                return
            self._answered = time.monotonic()
            if verdict is not None:
                self._finish(verdict, alone=False)
                return
            number += 1
            self._closing.wait(max(0.0, self._interval - (time.monotonic() - began)))

    def _guard(self) -> None:
        """Notices that the board does not answer: behind a link that was cut a call hangs for ever."""
        looked = time.monotonic()
        while not self._closing.wait(self._interval):
            now = time.monotonic()
            if now - looked > 3 * self._interval:
                self._answered += now - looked  # this process itself was stopped, not the board's
            looked = now
            if self._rank and now - self._answered > self._limit():
                self._finish(self._silent([0], now - self._answered), alone=True)
                return

    def _handle_lost_board(self) -> None:
        """The board is gone. At the end of a run that is normal, and `stop` is called within a moment."""
        if not self._closing.wait((BEATS_WHEN_BROKEN + 1) * self._interval):
            self._finish(
                Verdict(f"rank 0 on {self._hosts[0]} has ended without saying why; {_REMEDY}", True),
                alone=True,
            )

    def _finish(self, verdict: Verdict, alone: bool) -> None:
        with self._lock:
            if self._closing.is_set() or self._decided.is_set():
                return
            self._decided.set()
        self._end(verdict, alone)

    # ------------------------------------------------------------------ what is on the board

    def _tell_trouble(self) -> None:
        if self._own_trouble is not None and not self._told.is_set():
            place = f"rank {self._rank} on {self._hosts[self._rank]}"
            self._board.write(
                TROUBLE,
                json.dumps({"rank": self._rank, "sentence": f"{place} has ended: {self._own_trouble}"}),
            )
            self._told.set()
        elif self._broken:
            self._board.write(f"{TROUBLE}/broken", "1")

    def _read_verdict(self) -> Verdict | None:
        """Rank 0's verdict, or this rank's own about rank 0.

        A rank reaches its own if a launcher keeps the board, which then outlives rank 0.
        """
        if self._own_trouble is not None:
            return None  # the main thread is about to end this process with its own sentence
        text, beat = self._board.read([VERDICT, f"{BEAT}/0"])
        if text is not None:
            return Verdict(**json.loads(text))
        return self._verdict_on({0: beat})

    def _make_verdict(self) -> Verdict | None:
        """Rank 0's verdict, which it writes on the board for the others."""
        ranks = list(self._seen)
        trouble, broken, *beats = self._board.read(
            [TROUBLE, f"{TROUBLE}/broken", *(f"{BEAT}/{rank}" for rank in ranks)]
        )
        self._broken = self._broken or broken is not None
        if trouble is not None:
            told = json.loads(trouble)
            verdict = Verdict(told["sentence"], False)
        else:
            told, verdict = {}, self._verdict_on(dict(zip(ranks, beats)))
        if verdict is not None:
            self._board.write(VERDICT, json.dumps(asdict(verdict)))
        return None if told.get("rank") == self._rank else verdict

    def _verdict_on(self, beats: dict[int, str | None]) -> Verdict | None:
        """A verdict if one of these ranks has been silent for too long. beats: rank -> its newest number."""
        now = time.monotonic()
        # This thread has not looked for a while, so it does not know for how long the numbers stood still.
        if now - self._answered > 3 * self._interval:
            self._seen = {
                rank: (beat, since + now - self._answered) for rank, (beat, since) in self._seen.items()
            }
        for rank, beat in beats.items():
            if beat != self._seen[rank][0]:
                self._seen[rank] = (beat, now)
        silent = [rank for rank, (_, since) in self._seen.items() if now - since > self._limit()]
        return self._silent(silent, max(now - self._seen[rank][1] for rank in silent)) if silent else None

    def _limit(self) -> float:
        hurry = self._broken or self._hurried()
        return min(self._patience, BEATS_WHEN_BROKEN * self._interval) if hurry else self._patience

    def _silent(self, ranks: Sequence[int], seconds: float) -> Verdict:
        return Verdict(
            f"{ranks_on_hosts(ranks, self._hosts, ' and ')} went silent for {seconds:.0f} s; {_REMEDY}", True
        )


_REMEDY = (
    "is its host down, its link cut, its process killed? "
    "Started again, the run goes on from its newest checkpoint"
)
