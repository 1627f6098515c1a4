"""Ranks that wait for something outside of the run: a slow file system, a person at a debugger."""

import io
import json
import os
import pdb
import threading
from dataclasses import asdict, replace

import pytest

from distlora.cluster.heartbeat import Heartbeat
from distlora.cluster.progress import Halt, Movement, Report, halted, sentence
from distlora.engine.comm import Course
from distlora.files import atomic
from tests.unit.test_progress import ELSEWHERE, LIMIT, PATIENCE, STUCK, idle

WRITES = replace(ELSEWHERE, still=99.0, patient=True, outside="its file system")


class Held:
    """What a look finds while this thread stands in a call."""

    def __init__(self, monkeypatch):
        uses = idle()
        monkeypatch.setattr("distlora.cluster.progress._use", lambda: next(uses))
        self.course, self.found = Course(), list[Report]()
        self.movement = Movement(self.course, 1.0, False, 0.0)

    def look(self, *_) -> str:
        """Called where the thread stands; a thread of its own looks, three seconds long."""
        looker = threading.Thread(target=self._look)
        looker.start()
        looker.join(20)
        return "continue\n"

    def _look(self) -> None:
        self.found += [self.movement.look(float(second)) for second in (1, 2, 3, 4)]

    @property
    def last(self) -> Report:
        return self.found[-1]


@pytest.fixture
def held(monkeypatch) -> Held:
    return Held(monkeypatch)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic.write_text(path, "x"),
        lambda path: atomic.write_json(path, {}),
        lambda path: atomic.flush_directory(path.parent),
    ],
    ids=["a text", "JSON", "a directory"],
)
def test_a_flush_that_takes_long_is_no_halt(write, held, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", held.look)
    with held.course.during("the saving of a checkpoint"):
        write(tmp_path / "file")
    assert (held.last.still, held.last.waits, held.last.patient) == (3.0, False, True)
    assert (held.last.phase, held.last.outside) == ("the saving of a checkpoint", "its file system")


def test_a_breakpoint_is_no_halt(held):
    class Terminal(io.StringIO):
        def readline(self, *_):
            return held.look()

    def stops():
        pdb.Pdb(stdin=Terminal(), stdout=io.StringIO(), readrc=False).set_trace()

    with held.course.passing():
        stops()
    assert (held.last.outside, held.last.waits, held.last.patient) == ("a debugger", False, True)


def test_who_writes_and_waits_for_the_tensors_of_others_waits_for_these(held, monkeypatch, tmp_path):
    def brought(handle):
        with held.course.meeting():
            held.look()

    monkeypatch.setattr(os, "fsync", brought)
    atomic.write_text(tmp_path / "file", "x")
    assert (held.last.outside, held.last.waits, held.last.patient) == ("", True, False)


def test_who_waits_for_nothing_outside_is_not_patient(held):
    held.look()
    assert (held.last.outside, held.last.patient) == ("", False)


@pytest.mark.parametrize("reports", [[STUCK, WRITES, STUCK], [WRITES, STUCK, STUCK]])
def test_the_others_wait_longer_for_it_and_then_say_what_it_waits_for(reports):
    assert halted(reports, LIMIT, PATIENCE) is None
    reports = [report if report is STUCK else replace(report, still=PATIENCE + 1) for report in reports]
    reports = [replace(report, still=PATIENCE + 5) if report is STUCK else report for report in reports]
    halt = halted(reports, LIMIT, PATIENCE)
    behind = next(rank for rank, report in enumerate(reports) if report.outside)
    assert halt == Halt([behind], PATIENCE + 1, True)
    assert sentence(halt, reports, "abc").endswith(
        f"rank {behind} on {'abc'[behind]} is behind (9 passes begun, 8 ended), waiting for its file system, "
        "and the others wait"
    )


@pytest.mark.parametrize(
    ("reports", "told"),
    [
        (
            [STUCK] * 2,
            "Started again, the run goes on from its newest checkpoint; train.hang_timeout sets the limit",
        ),
        ([STUCK, replace(WRITES, still=PATIENCE + 1)], "; DEEPSPEED_TIMEOUT, in minutes, sets the limit"),
    ],
)
def test_the_sentence_says_what_sets_the_limit(reports, told):
    heart = Heartbeat(None, 0, ["a", "b"], LIMIT, lambda *_: None, 1.0, patience=PATIENCE)
    reports = [replace(report, still=max(report.still, PATIENCE + 1)) for report in reports]
    beats = [json.dumps({"number": 0, "report": asdict(report)}) for report in reports]
    assert heart._verdict_on_progress(beats).sentence.endswith(told)
