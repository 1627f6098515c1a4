"""Which ranks count as standing still, and when a run has come to a halt: false alarms first."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from distlora.cluster.progress import LEAST_BYTES, Halt, Movement, Report, Use, _works, halted, sentence
from distlora.engine.comm import Course

LIMIT, PATIENCE = 20.0, 1800.0
#: A rank that stands still in a collective.
STUCK = Report("training", step=4, begun=9, ended=8, met=30, waits=True, still=25.0)
BUSY = replace(STUCK, still=0.5)
ELSEWHERE = replace(STUCK, waits=False, met=29)


@pytest.mark.parametrize(
    ("what", "reports"),
    [
        ("nobody has said anything", [None, None, None]),
        ("a rank has not said anything yet", [STUCK, None, STUCK]),
        ("no rank at all", []),
        ("all move", [BUSY, BUSY, BUSY]),
        ("one moves: it tokenises, compiles or saves for the others", [STUCK, BUSY, STUCK]),
        ("one moves without waiting", [STUCK, replace(ELSEWHERE, still=0.0), STUCK]),
        ("rank 0 alone moves", [BUSY, STUCK, STUCK]),
        ("not for so long yet", [replace(STUCK, still=LIMIT)] * 3),
        ("nobody waits for others: all download, or sleep", [replace(ELSEWHERE, still=99.0)] * 3),
        (
            "one waits for another machine and may",
            [STUCK, replace(ELSEWHERE, still=99.0, patient=True), STUCK],
        ),
        ("all wait for the one that may wait", [replace(STUCK, still=99.0, patient=True)] * 3),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_who_may_still_get_somewhere_is_left_alone(what, reports):
    assert halted(reports, LIMIT, PATIENCE) is None, what


@pytest.mark.parametrize(
    ("reports", "halt"),
    [
        ([STUCK, STUCK, STUCK], Halt([], 25.0)),
        ([STUCK, replace(STUCK, met=29), replace(STUCK, met=29)], Halt([1, 2], 25.0)),
        ([STUCK, replace(STUCK, begun=8, ended=8), STUCK], Halt([1], 25.0)),
        ([STUCK, STUCK, replace(ELSEWHERE, still=21.0)], Halt([2], 21.0)),
        ([replace(STUCK, met=31), STUCK, ELSEWHERE], Halt([2], 25.0)),
        ([replace(STUCK, still=PATIENCE + 1, patient=True)] * 2, Halt([], PATIENCE + 1, True)),
        ([replace(ELSEWHERE, still=PATIENCE + 2)] * 3, Halt([], PATIENCE + 2, True)),
        ([STUCK] * 2 + [replace(STUCK, still=PATIENCE + 9, patient=True)], Halt([], 25.0, True)),
    ],
    ids=[
        "at one place",
        "two ranks behind",
        "a pass behind",
        "asleep",
        "asleep, and behind",
        "patient",
        "a stale lock",
        "mixed",
    ],
)
def test_a_run_in_which_nothing_moves_has_halted(reports, halt):
    assert halted(reports, LIMIT, PATIENCE) == halt


def test_without_a_limit_nothing_is_a_halt():
    assert halted([replace(STUCK, still=1e9)] * 3, float("inf"), PATIENCE) is None


def test_a_longer_limit_than_the_collectives_own_holds_for_patient_phases_too():
    reports = [replace(STUCK, still=PATIENCE + 1, patient=True)] * 2
    assert halted(reports, 2 * PATIENCE, PATIENCE) is None


def test_the_sentence_names_phase_step_and_who_is_behind():
    reports = [STUCK, replace(STUCK, met=29), replace(STUCK, met=29, begun=8)]
    said = sentence(halted(reports, LIMIT, PATIENCE), reports, ["a", "b", "c"])
    assert said == (
        "nothing has moved on any rank for 25 s in training after step 4: rank 1 on b and rank 2 on c are "
        "behind (8 passes begun, 8 ended), and the others wait"
    )
    said = sentence(halted([STUCK] * 2, LIMIT, PATIENCE), [replace(STUCK, step=0)] * 2, ["a", "b"])
    assert said == (
        "nothing has moved on any rank for 25 s in training: all 2 ranks are at the same place "
        "(9 passes begun, 8 ended)"
    )


# ---------------------------------------------------------------------- what a rank tells of itself


class Clock:
    """A look at this process every so often, on a clock of its own: it moves by one second a look."""

    def __init__(self, monkeypatch, spins: bool = False, uses=None):
        self.course, self.now = Course(), 0.0
        if uses is not None:
            monkeypatch.setattr("distlora.cluster.progress._use", lambda: next(uses))
        self.movement = Movement(self.course, 1.0, spins, self.now)

    def looks(self, *seconds: float) -> Report:
        """The last of several looks, all made while this thread stands at one place. seconds: between them;
        the first look only finds the place.
        """
        found, done = [], threading.Event()

        def look():
            for passed in seconds or (1.0,) * 4:
                self.now += passed
                found.append(self.movement.look(self.now))
            done.set()

        threading.Thread(target=look).start()
        assert done.wait(20)
        return found[-1]


def idle():
    while True:
        yield Use(0.0, 0.0, 0, 0)


def growing(**rates):
    count = 0
    while True:
        yield Use(
            **{name: rates.get(name, 0) * count for name in ("processor", "children", "bytes", "faults")}
        )
        count += 1


def test_a_thread_that_sleeps_stands_still(monkeypatch):
    assert Clock(monkeypatch, uses=idle()).looks().still == 3.0


@pytest.mark.parametrize(
    "used",
    [
        {"processor": 0.5},  # one long call that computes: a large factorisation, a tokeniser in Rust
        {"children": 0.5},  # a compiler that was started
        {"bytes": 2 * LEAST_BYTES},  # a file that is written or read
        {"faults": 1},  # a mapped file that is read
    ],
    ids=lambda used: next(iter(used)),
)
def test_a_long_call_that_uses_anything_moves(monkeypatch, used):
    clock = Clock(monkeypatch, uses=growing(**used))
    assert clock.looks().still == 0.0
    with clock.course.meeting():  # a processor may be busy with waiting
        assert clock.looks().still == 3.0


@pytest.mark.parametrize("spins", [True, False])
def test_a_pass_moves_by_its_use_of_a_processor_where_waiting_takes_none(monkeypatch, spins):
    clock = Clock(monkeypatch, spins, growing(processor=1.0))
    with clock.course.passing():
        report = clock.looks()
    assert (report.waits, report.still) == (spins, 3.0 if spins else 0.0)


@pytest.mark.parametrize("counter", ["step", "begun", "ended", "met", "phase"])
def test_what_the_course_tells_moves(monkeypatch, counter):
    clock, looks = Clock(monkeypatch, uses=idle()), []

    def look():
        for number in range(6):
            if number == 4:
                setattr(clock.course, counter, getattr(clock.course, counter) * 2 or 1)
            clock.now += 1.0
            looks.append(clock.movement.look(clock.now).still)

    thread = threading.Thread(target=look)
    clock.course.begun = clock.course.ended = clock.course.met = clock.course.step = 1
    thread.start()
    thread.join(20)
    assert looks[3:] == [3.0, 0.0, 1.0]


def test_a_process_that_was_stopped_as_a_whole_has_not_stood_still(monkeypatch):
    clock = Clock(monkeypatch, uses=idle())
    assert clock.looks(1.0, 1.0, 1.0, 600.0, 1.0).still == 3.0


def test_its_own_looks_are_no_movement(monkeypatch):
    """What a heartbeat itself takes stays far below what counts as work."""
    course, began = Course(), time.monotonic()
    movement, done, last = Movement(course, 0.2, False, began), threading.Event(), []

    def look():
        for _ in range(6):
            time.sleep(0.2)
            last.append(movement.look(time.monotonic()))
        done.set()

    threading.Thread(target=look).start()
    done.wait(20)
    assert last[-1].still > 0.6 and not last[-1].waits


def test_a_child_that_computes_is_seen():
    course = Course()
    movement = Movement(course, 0.5, False, time.monotonic())
    code = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    seen, done = [], threading.Event()

    def look():
        for _ in range(3):
            time.sleep(0.5)
            seen.append(movement.look(time.monotonic()))
        done.set()

    try:
        threading.Thread(target=look).start()
        done.wait(20)
    finally:
        child.kill()
        child.wait()
    assert seen[-1].still < 0.5


def test_little_is_no_work():
    nothing = Use(0.0, 0.0, 0, 0)
    assert not _works(nothing, Use(0.01, 0.01, 4096, 0), 1.0)
    assert not _works(nothing, nothing, 0.0)


def test_a_phase_within_a_phase_ends_with_it():
    course = Course()
    course.enter("training")
    with pytest.raises(ValueError), course.during("saving", patient=True):
        assert (course.phase, course.patient) == ("saving", True)
        raise ValueError
    assert (course.phase, course.patient) == ("training", False)
