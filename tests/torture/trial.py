"""One trial: a run to which things happen, beside one to which nothing does."""

import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from distlora.cluster.status import read_status
from tests.e2e.program import files_of, metrics, recipe_of, write_recipe, write_rows
from tests.tiny_models import tiny_model_dir
from tests.torture.disk import Disk
from tests.torture.plan import CUT, FREEZE, FULL_DISK, KILL, SECOND_START, STOP, Event, Subject
from tests.torture.start import Start

#: Seconds of silence that a run allows its ranks, and after which one that still runs has been forgotten.
SILENCE, PATIENCE = 20, 150
PREEMPTED, MISTAKE = 75, 2
#: In what rank 0 says once all ranks are there.
MET = " ranks on "


@dataclass
class Quiet:
    """A run to which nothing happened: what it left, and how long it took."""

    lines: list[dict]
    files: dict[str, bytes]
    seconds: float


@dataclass
class Ground:
    """Where trials are played: a disk for the runs, and a folder for all that no trial may touch."""

    disk: Disk
    folder: Path
    quiet: dict[str, Quiet] = field(default_factory=dict)
    starts: int = 0

    def start(self, subject: Subject, run_dir: Path) -> Start:
        self.starts += 1
        arguments = ["train", str(self._recipe(subject)), f"output_dir={run_dir}"]
        return Start(arguments, subject.world, self.folder / f"start-{self.starts}.log")

    def _recipe(self, subject: Subject) -> Path:
        path = self.folder / f"{subject}.yaml".replace(" ", "-").replace(",", "")
        if not path.exists():
            rows = write_rows(self.folder / "rows")
            content = recipe_of(tiny_model_dir("llama", self.folder), rows, self.disk.folder / "unnamed")
            content["method"] = dict(subject.method)
            content["targets"] = ["q_proj", "v_proj", "down_proj"]
            content["train"] |= {
                "steps": 12, "lr": 0.005, "eval_every": 4, "save_every": 2, "exact_match_samples": 0,
                "hang_timeout": SILENCE,
            }  # fmt: skip
            if subject.stage is not None:
                content["deepspeed"] = {"zero_optimization": {"stage": subject.stage}}
            if subject.name == "full":
                del content["targets"]
            write_recipe(path, content)
        return path


def play(ground: Ground, subject: Subject, events: list[Event]) -> tuple[list[Event], list[str]]:
    """What has happened, and what is wrong with how it went or ended."""
    quiet = _quiet(ground, subject)
    run_dir = ground.disk.folder / f"run-{ground.starts}"
    happened, problems = [], []
    for event in events:
        if event.kind == FULL_DISK and not ground.disk.can_fill:
            continue
        start = ground.start(subject, run_dir)
        is_over = start.wait(event.moment * quiet.seconds)
        if not is_over:
            problems += _strike(ground, subject, start, event, run_dir)
            happened.append(event)
        start.end()
        if problems or is_over:
            break
    problems = problems or _finish(ground, subject, run_dir, quiet)
    if not problems:
        shutil.rmtree(run_dir)
    return happened, problems


def _quiet(ground: Ground, subject: Subject) -> Quiet:
    if str(subject) not in ground.quiet:
        run_dir, began = ground.disk.folder / "quiet", time.monotonic()
        start = ground.start(subject, run_dir)
        assert start.wait(2 * PATIENCE) and set(start.codes) == {0}, start.text()
        seconds = time.monotonic() - began
        ground.quiet[str(subject)] = Quiet(lines_of(run_dir), files_of(run_dir / "adapter"), seconds)
        shutil.rmtree(run_dir)
    return ground.quiet[str(subject)]


def _finish(ground: Ground, subject: Subject, run_dir: Path, quiet: Quiet) -> list[str]:
    start = ground.start(subject, run_dir)
    is_over = start.wait(2 * PATIENCE)
    start.end()
    if not is_over or set(start.codes) != {0}:
        return [f"the last start ended with {start.codes}, see {start.log}"]
    return differences(quiet, run_dir)


def differences(quiet: Quiet, run_dir: Path) -> list[str]:
    """Between a run that is over and the quiet one: every figure, every byte of the adapter, no litter."""
    found, lines = [], lines_of(run_dir)
    if lines != quiet.lines:
        first = next((a for a in zip(lines, quiet.lines) if a[0] != a[1]), (len(lines), len(quiet.lines)))
        found.append(f"the metrics differ, first: {first}")
    files = files_of(run_dir / "adapter")
    found += [
        f"adapter/{name} differs"
        for name in sorted(files.keys() | quiet.files.keys())
        if files.get(name) != quiet.files.get(name)
    ]
    found += [f"{path} was left over" for path in run_dir.rglob("*partial*")]
    status = read_status(run_dir)
    if status is None or status.state != "done":
        found.append(f"the status is {status}")
    return found


def lines_of(run_dir: Path) -> list[dict]:
    """The metrics without what a clock has measured."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "memory" not in key}
        for line in metrics(run_dir)
    ]


# ---------------------------------------------------------------------- what happens


def _strike(ground: Ground, subject: Subject, start: Start, event: Event, run_dir: Path) -> list[str]:
    """Lets it happen, and says what the start did wrong about it."""
    if event.kind == KILL:
        start.end()
        return []
    if event.kind == SECOND_START:
        return _second_start(ground, subject, start, run_dir)
    if event.kind == FULL_DISK:
        ground.disk.fill(event.number)
        try:
            return _ends(start, {0, MISTAKE}, may_break=False)
        finally:
            ground.disk.empty()
    if event.kind == STOP:
        start.signal(event.number, event.rank if event.moment < 0.5 else None)
        time.sleep(1)
        if -event.number in start.codes:  # before the program has asked for it: launchers end the others
            start.end()
            return []
        return _ends(start, {0, 130, PREEMPTED}, may_break=True)
    assert event.kind in (CUT, FREEZE)
    if MET not in start.text():  # others would wait for a rank that may be late: launchers end them
        start.end()
        return []
    start.signal(signal.SIGKILL if event.kind == CUT else signal.SIGSTOP, event.rank)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and start.others_run(event.rank):
        time.sleep(0.1)
    slow = start.others_run(event.rank)
    return [f"others ran {PATIENCE} s after rank {event.rank}'s end, see {start.log}"] if slow else []


def _ends(start: Start, codes: set[int], may_break: bool) -> list[str]:
    if not start.wait(PATIENCE):
        return [f"it still ran after {PATIENCE} s, see {start.log}"]
    if not set(start.codes) <= codes or (not may_break and "Traceback" in start.text()):
        return [f"it ended with {start.codes}, see {start.log}"]
    return []


def _second_start(ground: Ground, subject: Subject, first: Start, run_dir: Path) -> list[str]:
    """One of the two is refused, and the other one goes on."""
    second = ground.start(subject, run_dir)
    ended = first.wait(2 * PATIENCE) and second.wait(2 * PATIENCE)
    codes, text = (first.codes, second.codes), first.text() + second.text()
    second.end()
    if not ended:
        return [f"one of two starts still ran, see {first.log} and {second.log}"]
    refused = [set(each) == {MISTAKE} for each in codes]
    # The second may come when the first is done: then both are.
    if any(set(each) != {0} for each in codes) and (sum(refused) != 1 or "Traceback" in text):
        return [f"two starts ended with {codes}, see {first.log} and {second.log}"]
    return []
