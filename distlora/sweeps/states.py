"""What became of each point of a sweep: from its claim, its run's status, and what the sweep has noted.

OUTPUT/sweep.json               the table, for programs
OUTPUT/points/NAME.claim        while the point is run, see `claims`
OUTPUT/points/NAME.json         what the sweep knows and the run does not: a `Note`
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from distlora.cluster.status import Status, read_status
from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.sweeps.claims import Owner, holder_of
from distlora.sweeps.file import Sweep
from distlora.sweeps.points import Point

State = Literal["waiting", "running", "done", "failed", "preempted"]
TABLE, POINTS = "sweep.json", "points"


@dataclass(frozen=True)
class Note:
    """What the sweep writes down about a point.

    failed: why it failed, in a sentence; "" if it has not. evaluated: the evaluation that it has had.
    predictions: by task, the settings of those that may lie in its directory; see `Evaluation`.
    """

    failed: str = ""
    evaluated: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PointState:
    """A row of the table. step, steps: as in `Status`; 0 and None where nothing was trained yet."""

    point: str
    output_dir: str
    state: State
    step: int = 0
    steps: int | None = None
    message: str = ""


def folder_of(sweep: Sweep) -> Path:
    """The folder of claims and notes, made if it is not there. Raises UserError."""
    folder = sweep.output / POINTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{sweep.path}: output: {folder} cannot be made ({error.strerror})") from None
    return folder


def claim_path(sweep: Sweep, point: Point) -> Path:
    return sweep.output / POINTS / f"{point.name}.claim"


def read_note(sweep: Sweep, point: Point) -> Note:
    """The note of a point; an empty one if there is none, or if it is damaged."""
    try:
        content = json.loads(_note_path(sweep, point).read_text(encoding="utf-8"))
        return Note(content["failed"], dict(content["evaluated"]), dict(content["predictions"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Note()


def write_note(sweep: Sweep, point: Point, note: Note) -> None:
    write_text(_note_path(sweep, point), json.dumps(asdict(note), indent=1) + "\n")


def _note_path(sweep: Sweep, point: Point) -> Path:
    return sweep.output / POINTS / f"{point.name}.json"


def status_of(point: Point) -> Status | None:
    """The status of the point's run; None without one, or if it is damaged: runs do not depend on it."""
    try:
        return read_status(point.run_dir)
    except UserError:
        return None


def is_trained(point: Point) -> bool:
    status = status_of(point)
    return status is not None and status.state == "done"


def is_evaluated(sweep: Sweep, point: Point) -> bool:
    """Whether the point has had this evaluation; True where the sweep asks for none."""
    return sweep.evaluation is None or read_note(sweep, point).evaluated == sweep.evaluation.settings


def state_of(sweep: Sweep, point: Point) -> PointState:
    """A point's row."""
    note, status = read_note(sweep, point), status_of(point)
    state, message = _state(note, holder(sweep, point), status, is_evaluated(sweep, point))
    step, steps = (status.step, status.steps) if status else (0, None)
    return PointState(point.name, str(point.run_dir), state, step, steps, message)


def holder(sweep: Sweep, point: Point) -> str:
    """Who runs the point, and the claim that says so; "" if nobody does."""
    path = claim_path(sweep, point)
    owner = holder_of(path)
    return "" if owner is None else held_by(owner, path)


def held_by(owner: Owner, claim: Path) -> str:
    return f"{owner.where}, as {claim} says"


def _state(note: Note, holder: str, status: Status | None, evaluated: bool) -> tuple[State, str]:
    if holder:
        return "running", holder
    if note.failed:
        return "failed", note.failed
    if status is None:
        return "waiting", ""
    if status.state == "done":
        return ("done", "") if evaluated else ("waiting", "trained; its evaluation is missing")
    if status.state == "failed" and not status.requeue:
        return "failed", status.message
    return "preempted", status.message or "ended without saying why"


def states_of(sweep: Sweep) -> list[PointState]:
    return [state_of(sweep, point) for point in sweep.points]


def keep_table(sweep: Sweep) -> list[PointState]:
    """Writes the table into the sweep's directory, and returns its rows."""
    rows = states_of(sweep)
    content = {
        "sweep": str(sweep.path),
        "recipe": str(sweep.recipe),
        "evaluate": list(sweep.evaluation.tasks) if sweep.evaluation else [],
        "points": [asdict(row) for row in rows],
    }
    writer = f"{socket.gethostname()}-{os.getpid()}"
    write_text(sweep.output / TABLE, json.dumps(content, indent=1) + "\n", writer=writer)
    return rows


def table_of(rows: Sequence[PointState]) -> str:
    """The table for a reader: a line for each point, and how many there are in each state."""
    width = max(len(row.point) for row in rows)
    lines = [_line(number, row, width) for number, row in enumerate(rows)]
    counts = Counter(row.state for row in rows)
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def _line(number: int, row: PointState, width: int) -> str:
    whole = f"{row.step}/{row.steps}" if row.steps else ""
    return f"{number:>3}  {row.point:<{width}}  {row.state:<9}  {whole:<9}  {row.message}".rstrip()
