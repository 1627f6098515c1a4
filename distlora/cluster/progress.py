"""Whether the ranks of a run still get anywhere, though every one of them is alive.

Where the link between two ranks is silent, all ranks soon wait in a collective, and none of them fails before
the collective's own half an hour. A slow phase must not be taken for that. So each rank measures by itself
for how long it has stood still, and anything counts as a move: another place in the program, a pass or a
collective that begins or ends, and, where it does not wait for others, the use of a processor, of files or of
a child process. Only when nothing has moved on any rank, and one waits for others, has the run come to a
halt; where none waits, only after that half an hour.

That long is also given to a rank that waits for something outside of the run, during which the others wait
for it: a file system that takes its time to flush a checkpoint, or a person at a debugger.
"""

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from distlora.engine.comm import Course
from distlora.sentences import ranks_on_hosts

#: Use of a processor, as a share of the time, and of files, in bytes a second, from which a rank counts as
#: working. Its own heartbeat stays far below.
LEAST_PROCESSOR, LEAST_BYTES = 0.03, 2**18
#: Where code lies in which a rank waits for others: anywhere, and in a pass.
OF_COLLECTIVES = tuple(f"{os.sep}{place}{os.sep}" for place in ("torch/distributed", "deepspeed/comm"))
OF_PASSES = (f"{os.sep}deepspeed/runtime{os.sep}",)
#: What a rank may wait for outside of the run, and where code lies, anywhere in the stack, of one that does.
DEBUGGER, FILES = "a debugger", "its file system"
OUTSIDE = {
    DEBUGGER: ("/pdb.py", "/bdb.py", "/pydevd", "/debugpy/", "/ipdb/"),
    FILES: ("/distlora/files/", "/safetensors/", "/pathlib.py", "/shutil.py"),
}


@dataclass(frozen=True)
class Report:
    """What one rank tells of itself. still: seconds since it moved. waits: whether it waits for others, as
    far as can be told. outside: what else it waits for, a key of OUTSIDE; "" for nothing. patient: also where
    it does. The rest as in `Course`.
    """

    phase: str
    step: int
    begun: int
    ended: int
    met: int
    waits: bool
    still: float
    patient: bool = False
    outside: str = ""


@dataclass(frozen=True)
class Halt:
    """A run that gets nowhere. behind: the ranks that the others wait for; none where all wait at one place.
    seconds: for which nothing has moved on any rank. after_patience: whether it was given the longer limit.
    """

    behind: list[int]
    seconds: float
    after_patience: bool = False


def halted(reports: Sequence[Report | None], limit: float, patience: float) -> Halt | None:
    """Whether the run has come to a halt. reports: by rank; None of a rank that has said nothing yet. limit:
    seconds that the ranks may all stand still while one waits for others; patience: those where none does, or
    a rank is in a patient phase.
    """
    if not reports or any(report is None for report in reports):
        return None
    long, waited_for = max(limit, patience), any(report.waits for report in reports)
    limits = [limit if waited_for and not report.patient else long for report in reports]
    if any(report.still <= allowed for report, allowed in zip(reports, limits)):
        return None
    positions = [(report.met, report.begun, report.ended) for report in reports]
    alone = [rank for rank, report in enumerate(reports) if waited_for and not report.waits]
    last = [rank for rank, position in enumerate(positions) if position < max(positions)]
    return Halt(alone or last, min(report.still for report in reports), max(limits) > limit)


def sentence(halt: Halt, reports: Sequence[Report], hosts: Sequence[str]) -> str:
    """What is told of a halt; without what to do."""
    of_step = f" after step {step}" if (step := min(report.step for report in reports)) else ""
    if halt.behind:
        phase, verb = reports[halt.behind[0]].phase, "is" if len(halt.behind) == 1 else "are"
        names = ranks_on_hosts(halt.behind, hosts, " and ")
        outside = sorted({reports[rank].outside for rank in halt.behind} - {""})
        waits = f", waiting for {' and '.join(outside)}" if outside else ""
        who = f"{names} {verb} behind ({_passes(reports, halt.behind)}){waits}, and the others wait"
    else:
        phase, everybody = reports[0].phase, list(range(len(reports)))
        who = f"all {len(reports)} ranks are at the same place ({_passes(reports, everybody)})"
    return f"nothing has moved on any rank for {halt.seconds:.0f} s in {phase}{of_step}: {who}"


def _passes(reports: Sequence[Report], ranks: Sequence[int]) -> str:
    begun = min(reports[rank].begun for rank in ranks)
    ended = min(reports[rank].ended for rank in ranks)
    return f"{begun} passes begun, {ended} ended"


class Movement:
    """Looks at one process from a thread of its own: where its main thread is, and what the process uses."""

    def __init__(self, course: Course, interval: float, spins: bool, now: float):
        """interval: seconds between two looks. spins: whether a processor is busy while this rank waits for
        its device."""
        self._course, self._interval, self._spins = course, interval, spins
        self._main = threading.main_thread().ident
        self._looked = self._since = now
        self._place: object = None
        self._used = _use()

    def look(self, now: float) -> Report:
        """now: seconds of a clock that only goes forward."""
        course, gap = self._course, now - self._looked
        if gap > 3 * self._interval:
            self._since += gap  # the whole process was stopped
        frames = _frames(self._main)
        waits = course.in_call > 0 or _is_in(OF_COLLECTIVES, frames)
        waits = waits or (course.in_pass > 0 and (self._spins or _is_in(OF_PASSES, frames)))
        outside = _outside(frames, waits)
        position = course.begun, course.ended, course.met, course.step, course.phase
        place = hash((*map(_point, frames), *position))
        used, before = _use(), self._used
        if place != self._place or (not waits and _works(before, used, gap)):
            self._since = now
        self._place, self._used, self._looked = place, used, now
        return Report(
            course.phase, course.step, course.begun, course.ended, course.met,
            waits and not outside, now - self._since, course.patient or bool(outside), outside,
        )  # fmt: skip


# ---------------------------------------------------------------------- where the program is


def _frames(main: int | None) -> list[FrameType]:
    """The frames of the main thread, innermost first, and of threads that Python has not made: autograd's."""
    current = sys._current_frames()
    known = {
        thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)
    }
    innermost = [current[main]] if main in current else []
    innermost += [frame for ident, frame in current.items() if ident not in known]
    return [frame for first in innermost for frame in _outwards(first)]


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _point(frame: FrameType) -> tuple[int, int]:
    """The instruction at which a frame is. A number instead of the frame, which would keep its tensors."""
    return id(frame), frame.f_lasti


def _is_in(places: Sequence[str], frames: Sequence[FrameType]) -> bool:
    """Whether the innermost code lies at one of these places."""
    return bool(frames) and any(place in frames[0].f_code.co_filename for place in places)


def _outside(frames: Sequence[FrameType], waits: bool) -> str:
    """What the main thread waits for outside of the run, see OUTSIDE; "" for nothing. waits: for other ranks,
    as writers of files do while they are brought tensors, and debuggers do not."""
    for what, places in OUTSIDE.items():
        found = any(place in frame.f_code.co_filename for frame in frames for place in places)
        if found and not (waits and what == FILES):
            return what
    return ""


# ---------------------------------------------------------------------- what the process uses


@dataclass(frozen=True)
class Use:
    """processor: seconds of this process; children: those of all processes that it has started, which live.
    bytes: read and written. faults: pages that had to come from a disk.
    """

    processor: float
    children: float
    bytes: int
    faults: int


def _works(before: Use, after: Use, seconds: float) -> bool:
    """Whether so much was used in these seconds that work goes on."""
    if seconds <= 0 or after.faults > before.faults:
        return after.faults > before.faults
    busy = max(after.processor - before.processor, after.children - before.children) / seconds
    return busy > LEAST_PROCESSOR or (after.bytes - before.bytes) / seconds > LEAST_BYTES


def _use() -> Use:
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = ended.ru_utime + ended.ru_stime + sum(map(_processor_seconds, _descendants("self")))
    return Use(own.ru_utime + own.ru_stime, children, _bytes_moved(), own.ru_majflt)


def _bytes_moved() -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().split("\n")
        pairs: Mapping[str, str] = dict(line.split(": ") for line in lines if ": " in line)
        return sum(
            int(pairs[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes") if name in pairs
        )
    return 0


def _descendants(process: str) -> Iterator[str]:
    """The ids of the processes that this one has started, and those have started."""
    with contextlib.suppress(OSError):  # gone meanwhile, or a kernel that does not tell
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in children.read_text().split():
                yield child
                yield from _descendants(child)


def _processor_seconds(process: str) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
