"""The predictions of one task: `<task>-<step>.jsonl`, one line each, written as they are made, and in the end
the scores, `<task>-<step>.json`.

While an evaluation is under way, `<task>-<step>.begun` says with which settings it was begun. Without that an
evaluation would go on with the answers of another one.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.evaluation.answering import Record
from distlora.files.atomic import write_text
from distlora.files.json_files import parse_json, read_limited

_REMEDY = "--fresh removes them and begins anew, --out writes elsewhere"


class Predictions:
    """Of one task and step, in a directory. For rank 0 alone."""

    def __init__(
        self,
        directory: Path,
        task: str,
        step: int,
        settings: dict[str, Any],
        count: int,
        verdicts: Sequence[str],
    ):
        """settings: all that decides the predictions; JSON. count: of the questions. verdicts: what a
        prediction says true or false of."""
        self._count, self._verdicts = count, verdicts
        self.lines, self.summary, self._begun = (
            directory / f"{task}-{step}.{ending}" for ending in ("jsonl", "json", "begun")
        )
        self._settings = json.loads(json.dumps(settings))

    def found(self) -> dict[int, Record]:
        """What an earlier evaluation with the same settings has left, by the number of the question.

        A last line that was only half written does not count. Raises UserError for predictions of another
        evaluation, and for lines that are none. Changes nothing.
        """
        if not (self.lines.exists() or self.summary.exists()):
            return {}
        self._refuse_others()
        return self._read()[0]

    def begin(self) -> None:
        """Cuts off a half-written line, and notes the settings. After `found`, or `forget`."""
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        if self.lines.exists():
            whole = self._read()[1]
            if whole < self.lines.stat().st_size:
                os.truncate(self.lines, whole)
        write_text(self._begun, json.dumps(self._settings, indent=1) + "\n")
        self.lines.touch()

    def forget(self) -> None:
        """Removes what an earlier evaluation has left."""
        for path in (self.summary, self.lines, self._begun):
            path.unlink(missing_ok=True)

    def add(self, records: Sequence[Record]) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            file.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the scores: all predictions are there."""
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.summary, json.dumps(summary | {"settings": self._settings}, indent=1) + "\n")
        self._begun.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """The summary of an evaluation that is done; None without one. Raises UserError for what is none."""
        if not self.summary.exists():
            return None
        found = _object(self.summary)
        scores = found.get("scores") if found else None
        if not isinstance(scores, dict) or not all(map(_is_number, scores.values())):
            raise UserError(f"{self.summary} is no summary with scores; {_REMEDY}")
        return found

    def _refuse_others(self) -> None:
        what = self.lines if self.lines.exists() else self.summary
        there = self._settings_there()
        if there is None:
            raise UserError(f"{what}: predictions lie there, and nothing says of what; {_REMEDY}")
        for name in self._settings | there:
            old, new = there.get(name), self._settings.get(name)
            if old != new:
                raise UserError(
                    f"{what}: predictions of another evaluation lie there ({name} is {_short(old)} there and "
                    f"{_short(new)} here); {_REMEDY}"
                )

    def _settings_there(self) -> dict[str, Any] | None:
        if self._begun.exists():
            return _object(self._begun)
        found = (_object(self.summary) if self.summary.exists() else None) or {}
        return found["settings"] if isinstance(found.get("settings"), dict) else None

    def _read(self) -> tuple[dict[int, Record], int]:
        """The predictions, and the bytes of the lines that are whole."""
        if not self.lines.exists():
            return {}, 0
        found: dict[int, Record] = {}
        data, position = self.lines.read_bytes(), 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            record = self._prediction(line)
            if record is None or not line.endswith(b"\n"):
                if position + len(line) < len(data):
                    raise UserError(
                        f"{self.lines}: line {number} is no prediction; correct it, or --fresh begins anew"
                    )
                break
            found.setdefault(record["index"], record)
            position += len(line)
        return found, position

    def _prediction(self, line: bytes) -> Record | None:
        record = _parsed(line)
        if record is None or type(record.get("index")) is not int:
            return None
        known = 0 <= record["index"] < self._count and isinstance(record.get("output"), str)
        judged = all(isinstance(record.get(name), bool) for name in self._verdicts)
        return record if known and judged else None


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None for anything else."""
    try:
        return _parsed(read_limited(path))
    except ValueError:
        return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """A digest as its beginning."""
    text = "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
