"""Answers that were generated elsewhere, judged by a task's rule."""

import json
import os
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.sentences import first_line, nearest
from distlora.tasks import TASKS, ResponseTask
from distlora.tasks.judging import Judge

#: What an object needs: the text that a model wrote, and the reference answer.
OUTPUT, ANSWER, RIGHT = "output", "answer", "right"


def judge_file(task: str, source: Path, target: Path) -> tuple[int, int]:
    """Judges a JSONL file, one object with "output" and "answer" a line, and writes the same objects with
    "right" added, in order. Returns how many are right, and how many there are.

    An answer may be bare, or a full reference response; a number or a truth value will do, too. The target
    appears at once, when all are judged.

    Raises UserError: an unknown task, one without generated answers, files that are not as described.
    """
    judge = _judge(task)
    _check_target(source, target)
    rows = _rows(source)
    judged = [row | {RIGHT: judge(row[OUTPUT], _as_text(row[ANSWER]))} for row in rows]
    lines = "".join(_as_line(row) for row in judged)
    try:
        write_text(target, lines, writer=str(os.getpid()))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    return sum(row[RIGHT] for row in judged), len(judged)


def _judge(name: str) -> Judge:
    answered = {known: task for known, task in TASKS.items() if isinstance(task, ResponseTask)}
    if name in answered:
        return answered[name].judge
    if name in TASKS:
        raise UserError(f"the task {name} generates no answers that could be judged")
    hint = nearest(name, answered) or f", choose one of {', '.join(answered)}"
    raise UserError(f"unknown task {name!r}{hint}")


def _check_target(source: Path, target: Path) -> None:
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError(f"{target} is the file with the predictions; name another one for the result")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already; name another file or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target} cannot be written: there is no folder {target.parent}")


def _rows(source: Path) -> list[dict[str, Any]]:
    try:
        if source.is_char_device() or source.is_block_device():  # some have no end
            raise UserError(f"{source} is a device; name a file with predictions")
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{source} is no text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    # Not splitlines(), which breaks a line at characters that JSON allows within a string.
    lines = text.removeprefix("\ufeff").split("\n")
    rows = [_row(line, f"line {number} of {source}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{source} has no predictions: it is empty")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: {first_line(error)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object with {OUTPUT!r} and {ANSWER!r}")
    for name in (OUTPUT, ANSWER):
        if name not in row:
            raise UserError(f"{where} has no {name!r}, it needs {OUTPUT!r} and {ANSWER!r}")
        if not isinstance(row[name], str if name == OUTPUT else (str, int, float)):
            raise UserError(f"{where}: {name!r} is {json.dumps(row[name])[:40]}, it must be a text in quotes")
    return row


def _as_text(answer: str | float | bool) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer)


def _as_line(row: dict[str, Any]) -> str:
    """The row as a line of JSON, with letters of all scripts as they are, if they can be written so."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name and UTF-8 cannot
        line = json.dumps(row)
    return line + "\n"
