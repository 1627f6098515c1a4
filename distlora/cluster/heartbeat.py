"""Notices that a rank has gone silent while the others wait for it in a collective, that one has failed, and
that all are alive but get nowhere.

A thread of every rank keeps writing to a board on rank 0's host, even while the main thread factorises a
large weight or waits for a slow file: a number that grows, and how far its rank has come. Rank 0 reads all.
If a number stays the same for too long, or nothing moves on any rank (see `distlora.cluster.progress`), rank
0 writes its verdict on the board, and every rank that reads it ends. A rank that cannot reach the board any
more concludes by itself that rank 0 is gone.

Without this a collective would fail after half an hour, with the address of a socket and no name of a rank.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from distlora.cluster.progress import Report, halted, sentence
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
    """Why the run has to end. silent: because a rank or a link went silent, so that another start may
    succeed. code: exit code of the ranks that end because of it.
    """

    sentence: str
    silent: bool
    code: int = 1


class Heartbeat:
    """One rank's part, from `start` to `stop`."""

    def __init__(
        self,
        board: Board,
        rank: int,
        hosts: Sequence[str],
        hang_timeout: float | None,
        end: Callable[[Verdict, bool], None],
        interval: float | None = None,
        hurried: Callable[[], bool] = lambda: False,
        look: Callable[[float], Report] | None = None,
        patience: float = math.inf,
    ) -> None:
        """hosts: the host of every rank. hang_timeout: seconds that a rank may be silent, and that all may
        stand still; None: for ever. interval: seconds between two beats.

        end(verdict, alone): called once, in a thread of this object. It should not return before
        `reading_time`. alone: this rank has reached the verdict by itself, because it cannot reach rank 0.
        hurried: whether silence must be noticed soon, because a launcher that has lost a rank will kill the
        others. look: what this rank tells of its progress at a time; None: nothing, so that no halt is
        noticed. patience: see `halted`.
        """
        self._board, self._rank, self._hosts, self._end = board, rank, hosts, end
        self._patience, self._hurried = hang_timeout or math.inf, hurried
        self._look, self._patience_of_phases = look, patience
        self._interval = interval or heart_interval(hang_timeout)
        self._closing, self._decided = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._answered = time.monotonic()
        self._broken = False
        self._own_trouble: tuple[str, int] | None = None
        self._told, self._heard, self._stirred = threading.Event(), threading.Event(), threading.Event()
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
        self._stirred.set()

    def explain(self, sentence: str | None, code: int = 1) -> bool:
        """To be called by a rank that is about to end alone. Returns whether rank 0 tells the user.

        sentence: what went wrong on this rank. None if a collective failed, which probably means that another
        rank is gone. Then this waits until a silent rank would have been noticed, and does not return if one
        was. code: exit code with which the other ranks are to end.
        """
        if sentence is None:
            self._broken = True
            self._decided.wait((BEATS_WHEN_BROKEN + 3) * self._interval)
            if self._decided.is_set():
                threading.Event().wait()  # until `end` ends this process
            return False
        self._own_trouble = sentence, code
        self._stirred.set()
        self._told.wait(2 * self._interval)
        if self._rank == 0:
            time.sleep(self.reading_time)
            return True
        return self._heard.wait(4 * self._interval)

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
                self._board.write(f"{BEAT}/{self._rank}", self._text(number))
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
            self._stirred.wait(max(0.0, self._interval - (time.monotonic() - began)))
            self._stirred.clear()

    def _text(self, number: int) -> str:
        """This rank's entry on the board, which is another one for every number."""
        report = self._look and asdict(self._look(time.monotonic()))
        return json.dumps({"number": number, "report": report})

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
            why, code = self._own_trouble
            said = f"rank {self._rank} on {self._hosts[self._rank]} has ended: {why}"
            self._board.write(TROUBLE, json.dumps({"sentence": said, "code": code}))
            self._told.set()
        elif self._broken:
            self._board.write(f"{TROUBLE}/broken", "1")

    def _read_verdict(self) -> Verdict | None:
        """Rank 0's verdict, or this rank's own about rank 0.

        A rank reaches its own if a launcher keeps the board, which then outlives rank 0.
        """
        text, beat = self._board.read([VERDICT, f"{BEAT}/0"])
        if self._own_trouble is not None:
            if text is not None:
                self._heard.set()
            return None  # the main thread is about to end this process with its own sentence
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
            verdict = Verdict(silent=False, **json.loads(trouble))
        else:
            verdict = self._verdict_on(dict(zip(ranks, beats))) or self._verdict_on_progress(beats)
        if verdict is not None:
            self._board.write(VERDICT, json.dumps(asdict(verdict)))
        return None if self._own_trouble is not None else verdict

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

    def _verdict_on_progress(self, beats: Sequence[str | None]) -> Verdict | None:
        """A verdict if the run has come to a halt. beats: of all ranks."""
        told = [beat and json.loads(beat)["report"] for beat in beats]
        reports = [entry and Report(**entry) for entry in told]
        # What is on the board is up to one interval old, and read once in an interval.
        halt = halted(reports, self._patience - 2 * self._interval, self._patience_of_phases)
        if halt is None:
            return None
        limit = "DEEPSPEED_TIMEOUT, in minutes," if halt.after_patience else "train.hang_timeout"
        told = f"{sentence(halt, reports, self._hosts)}; {_REMEDY_OF_LINKS}; {limit} sets the limit"
        return Verdict(told, True)

    def _limit(self) -> float:
        hurry = self._broken or (self._patience < math.inf and self._hurried())
        return min(self._patience, BEATS_WHEN_BROKEN * self._interval) if hurry else self._patience

    def _silent(self, ranks: Sequence[int], seconds: float) -> Verdict:
        who = ranks_on_hosts(ranks, self._hosts, " and ")
        return Verdict(f"{who} went silent for {seconds:.0f} s; {_REMEDY_OF_SILENCE}", True)


def heart_interval(hang_timeout: float | None) -> float:
    """Seconds between two beats. hang_timeout: see `Heartbeat`."""
    return min(LONGEST_INTERVAL, max(SHORTEST_INTERVAL, (hang_timeout or math.inf) / 10))


_GOES_ON = "Started again, the run goes on from its newest checkpoint"
_REMEDY = f"is its host down, its link cut, its process killed? {_GOES_ON}"
_REMEDY_OF_SILENCE = f"{_REMEDY}; under a debugger, which stops a process, set train.hang_timeout=0"
_REMEDY_OF_LINKS = f"is a link between two of their hosts cut, or does a file system not answer? {_GOES_ON}"
