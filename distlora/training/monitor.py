"""What a run tells: `metrics.jsonl`, the monitors of the DeepSpeed config, and its progress. What
TensorBoard has beside scalars is in `board`, `layer_looks` and `pictures`.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distlora import progress
from distlora.engine.protocol import Engine
from distlora.files.atomic import append_text, write_text
from distlora.files.json_files import is_number, is_whole, parse_json
from distlora.recompose.report import RecompositionReport
from distlora.sentences import counted
from distlora.training import pictures
from distlora.training.run_directory import METRICS, RECOMPOSITIONS
from distlora.training.writing import Writing

log = logging.getLogger(__name__)


#: Scalars of the file of metrics that monitors do not get: means over the whole start, of which they have
#: each step's own value under `system/`.
RECORDED_ONLY = ("train/tokens_per_second", "train/images_per_second")
#: Beginnings of tags in the file of metrics, and the group of the monitors that they belong to.
GROUPS = {"recompose/": "method/", "lr_search/": "init/"}


class Monitor:
    """Writes scalars under TensorBoard tags such as `train/loss`. Every rank may call it; rank 0 writes.

    metrics.jsonl: one JSON object a line, `{"step": n, tag: value, …}`; n counts finished optimizer steps.
    Numbers that JSON does not know (NaN, infinities) are written as strings. What cannot be written raises
    nothing, because it would be raised on rank 0 alone: see `Writing`.
    """

    def __init__(self, engine: Engine, run_dir: Path, resumed_at: int = 0, writing: Writing | None = None):
        self._engine, self._path = engine, run_dir / METRICS
        self._writing = writing or Writing(engine.comm)
        self._told, self._recomposed = set[tuple[int, str]](), set[tuple[int, str]]()
        self._unwritten: dict[str, str] = {}
        if engine.comm.is_main:
            with self._writing.errors.kept(self._path):
                self._writing.check()
                self._told = _keep_until(self._path, resumed_at)
                self._recomposed = _keep_until(self._path.with_name(RECOMPOSITIONS), resumed_at)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        scalars = {tag: value for tag, value in scalars.items() if (step, tag) not in self._told}
        if not self._engine.comm.is_main or not scalars:
            return
        line = {"step": step, **{tag: jsonable(value) for tag, value in scalars.items()}}
        self._append(self._path, line)
        self._engine.write_events(
            [(shown_as(tag), value, step) for tag, value in scalars.items() if tag not in RECORDED_ONLY]
        )

    def tell_recomposition(self, report: RecompositionReport) -> None:
        """A decision about recomposition: means for all monitors, pictures of the layers for TensorBoard, and
        all of it in `recompositions.jsonl`.
        """
        self.write(report.step, report.means())
        self._engine.on_board(lambda writer: pictures.add_recomposition(writer, report))
        if self._engine.comm.is_main:
            self._append(self._path.with_name(RECOMPOSITIONS), report.record())

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        """Writes the line, behind those for which there was no room before."""
        lines = self._unwritten[path.name] = self._unwritten.get(path.name, "") + json.dumps(line) + "\n"
        with self._writing.errors.kept(path):
            self._writing.check(at_once=False)
            append_text(path, lines)
            del self._unwritten[path.name]

    def unwritten(self) -> dict[str, str]:
        """The ends of files that could not be written, by the file's name; for a checkpoint to keep."""
        return dict(self._unwritten)

    def make_up(self, unwritten: dict[str, str]) -> None:
        """Writes what an earlier start could not. unwritten: as that one's `unwritten`."""
        for _, record in records(unwritten.get(METRICS, "")):
            step = record.pop("step")
            self.write(step, {tag: float(value) for tag, value in record.items() if _is_scalar(value)})
        for _, record in records(unwritten.get(RECOMPOSITIONS, "")):
            if self._engine.comm.is_main and (record["step"], "step") not in self._recomposed:
                self._append(self._path.with_name(RECOMPOSITIONS), record)

    def tell_rates(self, scalars: dict[str, float], tried: list[tuple[float, float]]) -> None:
        """What a search for the learning rate has found, and to TensorBoard its curve. tried: (rate, loss) by
        rate."""
        self.write(0, scalars)
        self._engine.on_board(lambda writer: pictures.add_rates(writer, scalars["lr_search/rate"], tried))


def shown_as(tag: str) -> str:
    """The tag of a scalar of the file of metrics, in monitors."""
    group = next((group for beginning, group in GROUPS.items() if tag.startswith(beginning)), "")
    return f"{group}{tag}"


@contextmanager
def writers_silenced() -> Iterator[None]:
    """A context in which a file error that ends a thread of a monitor is not printed with its traceback: who
    writes next through that monitor gets it as well."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        ours = (type(failed.thread).__module__ or "").partition(".")[0] == "tensorboard"
        if not (ours and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _keep_until(path: Path, step: int) -> set[tuple[int, str]]:
    """Forgets lines of steps that a resumed run is going to make again, and a line that a crash cut short.

    Returns the (step, tag) of all that is kept: a finished run that is started again has its last evaluation
    already.
    """
    if not path.exists():
        return set()
    kept, told = [], set()
    text = path.read_text(encoding="utf-8", errors="replace")
    found = list(records(text))
    for line, record in found:
        if step and record["step"] <= step:
            kept.append(line + "\n")
            told |= {(record["step"], tag) for tag in record}
    foreign = text.count("\n") - len(found)  # a last line without an end is one that a crash cut short
    if foreign > 0:
        log.warning("%s: %s that no run has written left out", path, counted(foreign, "line"))
    write_text(path, "".join(kept))
    return told


def records(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of `metrics.jsonl` or of a file like it, and what they hold; without those that no run has
    written."""
    for line in text.split("\n"):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and is_whole(record.get("step")):
            yield line, record


def _is_scalar(value: Any) -> bool:
    """Whether it is what `jsonable` returns."""
    return is_number(value) or (isinstance(value, str) and value in ("nan", "inf", "-inf"))


def jsonable(value: float) -> float | str:
    """The value, or the text of one that JSON does not know: "nan", "inf", "-inf"."""
    return value if math.isfinite(value) else str(value)


class Progress:
    """The progress of the steps, with loss, learning rate, tokens or images a second, and the share of
    padding.
    """

    def __init__(self, steps: int, start: int):
        self._task = progress.begin("training", "steps", steps, start)
        self._done, self._since = 0, time.perf_counter()

    def advance(
        self, loss: float, rate: float, amount: int, unit: str = "tokens", padding: float | None = None
    ) -> float:
        """One finished step; returns how much of the unit a second there was since the run began. padding:
        its share in the step's rows; None where there can be none.
        """
        self._done += amount
        speed = self._done / (time.perf_counter() - self._since)
        told = f"loss {loss:.4f}, lr {rate:.2e}, {speed:.0f} {unit}/s"
        told += "" if padding is None else f", {padding:.0%} padding"
        self._task.advance(1, told)
        return speed

    def close(self) -> None:
        self._task.close()
