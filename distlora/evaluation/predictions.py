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


class Predictions:
    """Of one task and step, in a directory. For rank 0 alone."""

    def __init__(self, directory: Path, task: str, step: int, settings: dict[str, Any]):
        """settings: all that decides the predictions; JSON."""
        self.lines, self.summary, self._begun = (
            directory / f"{task}-{step}.{ending}" for ending in ("jsonl", "json", "begun")
        )
        self._settings = json.loads(json.dumps(settings))

    def found(self) -> dict[int, Record]:
        """What an earlier evaluation with the same settings has left, by the number of the question.

        A last line that was only half written does not count. Raises UserError for predictions of another
        evaluation. Changes nothing.
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
        """The summary of an evaluation that is done; None without one."""
        if not self.summary.exists():
            return None
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def _refuse_others(self) -> None:
        what = self.lines if self.lines.exists() else self.summary
        remedy = "--fresh removes them and begins anew, --out writes elsewhere"
        there = self._settings_there()
        if there is None:
            raise UserError(f"{what}: predictions lie there, and nothing says of what; {remedy}")
        for name in self._settings | there:
            old, new = there.get(name), self._settings.get(name)
            if old != new:
                raise UserError(
                    f"{what}: predictions of another evaluation lie there ({name} is {_short(old)} there and "
                    f"{_short(new)} here); {remedy}"
                )

    def _settings_there(self) -> dict[str, Any] | None:
        for path in (self._begun, self.summary):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                return found if path == self._begun else found["settings"]
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError):
                return None
        return None

    def _read(self) -> tuple[dict[int, Record], int]:
        """The predictions, and the bytes of the lines that are whole."""
        if not self.lines.exists():
            return {}, 0
        found: dict[int, Record] = {}
        data, position = self.lines.read_bytes(), 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                index, whole = record["index"], line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                if position + len(line) < len(data):
                    raise UserError(
                        f"{self.lines}: line {number} is no prediction; correct it, or --fresh begins anew"
                    )
                break
            found.setdefault(index, record)
            position += len(line)
        return found, position


def _short(value: Any) -> str:
    """A digest as its beginning."""
    text = "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
