"""Runs what is missing of a sweep, point after point, each in a process of its own."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlora.cluster.status import START_AGAIN, Status
from distlora.engine.comm.group import STOPPED as STOPPED_EARLY
from distlora.errors import Preempted, TrainingError
from distlora.sentences import counted
from distlora.sweeps.child import Signals, last_sentence, run
from distlora.sweeps.claims import Claim, Lost, take
from distlora.sweeps.file import Sweep
from distlora.sweeps.points import Point
from distlora.sweeps.states import (
    claim_path,
    folder_of,
    held_by,
    holder,
    is_evaluated,
    is_trained,
    keep_table,
    read_note,
    state_of,
    status_of,
    write_note,
)
from distlora.training.evaluate import STOPPED

log = logging.getLogger(__name__)

#: So many names stand in a sentence.
_NAMED = 8


def conduct(sweep: Sweep, points: Sequence[Point]) -> None:
    """Trains and evaluates those of the points that are not done, one after the other.

    A point that fails does not stop the others. Raises TrainingError, which names the points, if some have
    failed; Preempted if this process, or a run, was asked to stop, or if another sweep runs some of them.
    """
    folder_of(sweep)
    with Signals() as signals:
        for point in points:
            if signals.asked:
                break
            if state_of(sweep, point).state != "done":
                _try_point(sweep, point, signals)
                keep_table(sweep)
        keep_table(sweep)
        _conclude(sweep, points, signals)


def _try_point(sweep: Sweep, point: Point, signals: Signals) -> None:
    path = claim_path(sweep, point)
    claim = take(path)
    if not isinstance(claim, Claim):
        log.info("%s is run by %s", point.title, held_by(claim, path))
        return
    try:
        _PointRun(sweep, point, signals, claim).finish()
    except Lost:
        log.warning("%s was ended: %s is no longer this sweep's", point.title, path)
        return
    finally:
        claim.release()
    row = state_of(sweep, point)
    log.info("%s: %s%s", point.title, row.state, f": {row.message}" if row.message else "")


class _PointRun:
    """One claimed point, from where it stands to its end."""

    def __init__(self, sweep: Sweep, point: Point, signals: Signals, claim: Claim):
        self._sweep, self._point, self._signals, self._claim = sweep, point, signals, claim
        self._output = folder_of(sweep) / f"{point.name}.log"

    def finish(self) -> None:
        """Trains and evaluates, as far as the point lacks it, and notes what came out."""
        self._note(failed="")
        if not is_trained(self._point):
            self._note(evaluated={})  # that was of a run that is gone
            self._note(failed=self._train())
        if is_trained(self._point) and not is_evaluated(self._sweep, self._point) and not self._signals.asked:
            self._evaluate()

    def _train(self) -> str:
        """Why the training failed; "" if it is done, or is to be started again."""
        before = status_of(self._point)
        code, said = self._start("train", str(self._sweep.recipe), *self._point.overrides)
        return _failure(code, said, before, status_of(self._point), bool(self._signals.asked))

    def _evaluate(self) -> None:
        settings, there = self._sweep.evaluation.settings, read_note(self._sweep, self._point).predictions
        # `eval` goes on with predictions of the same settings, and refuses others.
        fresh = any(there.get(task, wanted) != wanted for task, wanted in settings.items())
        if not fresh:
            self._note(predictions=there | settings)
        options = [*self._sweep.evaluation.words, *(["--fresh"] if fresh else [])]
        code, said = self._start("eval", str(self._point.run_dir), *options)
        again = code == START_AGAIN or said in (STOPPED, STOPPED_EARLY)  # launchers swallow the exit code
        if code == 0 or said == STOPPED:  # else it may have ended before it removed the others
            self._note(predictions=there | settings)
        if code == 0:
            self._note(evaluated=settings)
        elif not (again or (self._signals.asked and code != 2)):
            self._note(failed=f"its evaluation: {said or _ended(code)}")

    def _start(self, verb: str, *arguments: str) -> tuple[int, str]:
        """The exit code, and the program's last sentence."""
        log.info("%s: %s, see %s", self._point.title, verb, self._output)
        since = self._output.stat().st_size if self._output.exists() else 0
        keep_table(self._sweep)
        words = self._sweep.command(verb, *arguments)
        code = run(words, self._output, self._signals, self._claim.token, self._claim.renew)
        return code, last_sentence(self._output, since)

    def _note(self, **changes: Any) -> None:
        self._claim.renew()  # what is no longer this sweep's is not written
        write_note(self._sweep, self._point, replace(read_note(self._sweep, self._point), **changes))


def _failure(code: int, said: str, before: Status | None, after: Status | None, asked: bool) -> str:
    """Why a training failed; "" if it is done, or goes on when it is started again.

    Launchers swallow the program's exit code, so its status comes first, if this start has written one.
    """
    if after is not None and after.state == "done":
        return ""
    ended = after if after != before and after is not None and after.state != "running" else None
    if code == START_AGAIN or (ended is not None and ended.requeue):
        return ""
    if ended is not None:
        return ended.message or said or _ended(code)
    if asked and code != 2:
        return ""
    return said or _ended(code)


def _ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code} without saying why"


def _conclude(sweep: Sweep, points: Sequence[Point], signals: Signals) -> None:
    rows = [(point, state_of(sweep, point)) for point in points]
    left = [point for point, row in rows if row.state in ("waiting", "preempted")]
    failed = [point for point, row in rows if row.state == "failed"]
    busy = [point for point, row in rows if row.state == "running"]
    if left:
        why = f"asked to stop ({signals.asked.name})" if signals.asked else "not done"
        raise Preempted(f"{why}: {_named(left)} left of {len(points)}; the same command goes on")
    if failed:
        where = Path(folder_of(sweep), "NAME.log")
        raise TrainingError(f"{_named(failed)} of {len(points)} failed; see {where}, and start again")
    if busy:
        who = holder(sweep, busy[0]) or "a process that has just ended"
        raise Preempted(
            f"{_named(busy)} of {len(points)} run by another sweep ({who}); start again when it has ended"
        )


def _named(points: Sequence[Point]) -> str:
    shown = ", ".join(point.name for point in points[:_NAMED])
    more = ", …" if len(points) > _NAMED else ""
    return f"{counted(len(points), 'point')} ({shown}{more})"
