"""How far a command has come, on standard error: bars on a terminal, and lines where nobody watches."""

import contextlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from distlora import progress
from distlora.sentences import size_text

#: Seconds that a phase lasts before it is shown.
PATIENCE = 2.0
#: Seconds between two lines of a phase: at first, and at most.
FIRST, MOST = 10.0, 60.0
#: Seconds between two looks.
TICK = 0.5


@dataclass(eq=False)
class _Task:
    """A phase. shown: its number among the bars; None while there is none. due: when its next line comes, and
    wait: how long after the last."""

    display: "_Display"
    name: str
    unit: str
    total: int | None
    first: int
    began: float
    done: int = 0
    told: str = ""
    shown: int | None = None
    due: float = 0.0
    wait: float = FIRST

    def advance(self, count: int = 1, told: str = "") -> None:
        self.done += count
        self.told = told or self.told

    def expect(self, total: int) -> None:
        self.total = total

    def close(self) -> None:
        self.display.end(self)

    def left(self, now: float) -> float | None:
        """Seconds, if the rest goes on as fast as it went; None where that cannot be told."""
        made = self.done - self.first
        if self.total is None or made <= 0:
            return None
        return (now - self.began) / made * max(self.total - self.done, 0)

    def counted(self) -> str:
        if not self.unit or not (self.done or self.total):
            return ""
        if self.unit == "bytes":
            return size_text(self.done) + ("" if self.total is None else f" of {size_text(self.total)}")
        return f"{self.done:,}{'' if self.total is None else f' of {self.total:,}'} {self.unit}"


class _Display(ABC):
    """What both kinds have in common: phases become visible after PATIENCE, by a thread that looks on."""

    def __init__(self) -> None:
        self._tasks: list[_Task] = []
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, name: str, unit: str, total: int | None, done: int) -> progress.Task:
        now = time.monotonic()
        task = _Task(self, name, unit, total, done, now, done, due=now + FIRST)
        with self._lock:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look_on, name="progress", daemon=True)
                self._thread.start()
        return task

    def end(self, task: _Task) -> None:
        with self._lock:
            if task in self._tasks:
                self._tasks.remove(task)
                self.finish(task, time.monotonic())

    def close(self) -> None:
        self._over.set()
        with self._lock:
            for task in reversed(self._tasks.copy()):
                self.end(task)

    def _look_on(self) -> None:
        while not self._over.wait(TICK):
            with self._lock:
                now = time.monotonic()
                for task in self._tasks:
                    if now - task.began >= PATIENCE:
                        self.show(task, now)

    @abstractmethod
    def show(self, task: _Task, now: float) -> None:
        """A task that lasts."""

    @abstractmethod
    def finish(self, task: _Task, now: float) -> None:
        """A task that is over."""


class Lines(_Display):
    """Whole lines, which launchers pass on and label: every ten seconds, then less often, and one at the end
    of what has lasted."""

    def show(self, task: _Task, now: float) -> None:
        if now < task.due:
            return
        task.wait = min(task.wait * 1.5, MOST)
        task.due = now + task.wait
        left = task.left(now)
        parts = [
            task.counted(),
            f"{duration(now - task.began)} gone",
            "" if left is None else f"{duration(left)} left",
            task.told,
        ]
        self._say(task, parts)

    def finish(self, task: _Task, now: float) -> None:
        if now - task.began >= PATIENCE:
            self._say(task, [task.counted(), f"{duration(now - task.began)} in all", task.told])

    @staticmethod
    def _say(task: _Task, parts: list[str]) -> None:
        sys.stderr.write(f"{task.name}: {', '.join(filter(None, parts))}\n")
        sys.stderr.flush()


class Bars(_Display):
    """Bars, one under the other for phases within others; each is gone when its phase is over."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            TextColumn("{task.fields[said]}", markup=False),
            console=Console(file=sys.stderr), transient=True, redirect_stdout=False, refresh_per_second=4,
        )  # fmt: skip
        self._started = False

    def show(self, task: _Task, now: float) -> None:
        if not self._started:
            self._bars.start()
            self._started = True
        if task.shown is None:
            task.shown = self._bars.add_task(task.name, total=task.total, said="")
        left = task.left(now)
        parts = [
            task.counted(),
            duration(now - task.began),
            "" if left is None else f"{duration(left)} left",
            task.told,
        ]
        self._bars.update(
            task.shown, total=task.total, completed=task.done, said=", ".join(filter(None, parts))
        )

    def finish(self, task: _Task, now: float) -> None:
        if task.shown is not None:
            self._bars.remove_task(task.shown)
        if self._started and all(other.shown is None for other in self._tasks):
            self._bars.stop()
            self._started = False


def duration(seconds: float) -> str:
    """Such as 0:42, and 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def progress_shown(shown: bool = True) -> Iterator[None]:
    """A context in which phases are shown on standard error, if they are: by rank 0, unless --quiet."""
    if not shown:
        yield
        return
    display = Bars() if sys.stderr.isatty() else Lines()
    try:
        with progress.told_to(display):
            yield
    finally:
        display.close()
