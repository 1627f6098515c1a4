"""The data section of a recipe for data that nobody has described: by its columns."""

from collections.abc import Sequence
from typing import Any

from distlora.data.columns import cells_of, columns_of
from distlora.data.image_files import splits_of
from distlora.data.labels import is_unlabelled, stored_names, truth_in, whole_number
from distlora.data.sources import Row, is_local, load_rows
from distlora.errors import UserError
from distlora.files.problems import file_errors_explained
from distlora.files.user_paths import user_path
from distlora.sentences import listed
from distlora.tasks import TASKS, ChatTask, ImageTask, LabelTask, Task, get_task

#: Columns of a prompt and its response, in the data sets of the field.
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "response"),
    ("instruction", "output"), ("input", "output"), ("query", "response"), ("source", "target"),
)  # fmt: skip
_CONVERSATIONS = ("messages", "conversations", "conversation")
_TEXTS, _LABELS = ("text", "sentence", "content", "review"), ("label", "labels", "class", "category")
#: Of rows without an evaluation split a tenth is held back, from this many on.
_ENOUGH = 20
#: Labels that a classifier has at most.
_MOST_LABELS = 1000


def choose_data(data: str | None, task: str | None) -> dict[str, Any]:
    """The section: the task, where the data is, its splits, columns and labels.

    data: a local path, a data set of the hub, or the name of a task that has data of its own; None for the
    task's own. task: its name, None where the columns are to tell it. Raises UserError where they do not.
    """
    if data is not None and data in TASKS and _has_data(TASKS[data]):
        data, task = None, task or data
    if data is not None and task is None and not is_local(data):
        task = next((name for name, known in TASKS.items() if known.path == data), None)
        if task is None:
            raise UserError(
                f"--data {data} is neither a local file nor the data of a task; give its path, or "
                "name the --task as well (`distlora tasks` lists them)"
            )
    if data is None or not is_local(data):
        known = get_task(task or "")
        if data is None and not _has_data(known):
            raise UserError(f"--data is missing: the task {task} has no data of its own")
        where = {} if data is None or data == known.path else {"path": data}
        held_out = (
            known.eval_split if _has_data(known) and known.eval_split != "train" and not where else None
        )
        return {"task": task, **where, "split": "train", "eval_split": held_out}
    return _of_local(data, task)


def _has_data(task: Task) -> bool:
    return task.path is not None or task.rows is not None


def _of_local(path: str, task: str | None) -> dict[str, Any]:
    place = user_path(path, "--data")
    with file_errors_explained(f"--data: {path}"):
        images = splits_of(place) if task is None or isinstance(get_task(task), ImageTask) else None
    if images is not None:
        held_out = next((name for name in ("test", "validation", "val") if name in images), None)
        splits = {"split": "train", "eval_split": held_out}
        return {"task": task or "images", "path": path, **(splits if held_out else _cut())}
    rows = load_rows(path, "train")
    if not rows:
        raise UserError(f"--data {path} has no rows")
    section = {"task": task} if task else {}
    if task is None or (get_task(task) in (TASKS["text"], TASKS["classification"])):
        section = _by_columns(rows, path, task)
    return {**section, "path": path, **_splits(path, len(rows))}


def _cut() -> dict[str, str]:
    return {"split": "train[:90%]", "eval_split": "train[90%:]"}


def _splits(path: str, count: int) -> dict[str, str | None]:
    for name in ("test", "validation"):
        try:
            if user_path(path, "--data").is_dir() and load_rows(path, name):
                return {"split": "train", "eval_split": name}
        except UserError:
            pass  # the folder has none of this name
    return _cut() if count >= _ENOUGH else {"split": "train", "eval_split": None}


def _by_columns(rows: Sequence[Row], path: str, task: str | None) -> dict[str, Any]:
    """The task, its columns and labels."""
    columns = [str(column) for column in columns_of(rows)]
    pair = next((pair for pair in _PAIRS if set(pair) <= set(columns)), None)
    text = next((name for name in _TEXTS if name in columns), None)
    label = next((name for name in _LABELS if name in columns), None)
    wanted = get_task(task) if task else None
    talks = any(name in columns for name in _CONVERSATIONS) or (
        pair and isinstance(rows[0].get(pair[0]), list)
    )
    if talks and (wanted is None or isinstance(wanted, ChatTask)):
        return {"task": "chat"}
    if pair == ("instruction", "output") and wanted is None:
        return {"task": "instruct"}
    if pair and not isinstance(wanted, LabelTask):
        return {"task": "text", "fields": dict(zip(("prompt", "response"), pair))}
    if text and label and wanted != TASKS["text"]:
        fields = {"text": text, "label": label}
        return {"task": "classification", "fields": fields, "labels": _labels(rows, label, path)}
    if text and wanted is None:
        return {"task": "completion", **({} if text == "text" else {"fields": {"text": text}})}
    missing = f"no columns of the task {task}" if task else "columns that name no task"
    raise UserError(
        f"--data {path} has {missing} ({listed(columns)}); rename them, such as to prompt and "
        "completion, messages, or text and label, or write data.fields by hand"
    )


def _labels(rows: Sequence[Row], column: str, path: str) -> list[str | int]:
    stored = stored_names(rows, column)
    if stored:
        return list(stored)
    values = {str(value).strip(): value for value in cells_of(rows, column) if not is_unlabelled(value)}
    if not 2 <= len(values) <= _MOST_LABELS:
        raise UserError(
            f"--data {path}: column {column} has {len(values)} different labels, wanted 2 to {_MOST_LABELS}"
        )
    numbers = [whole_number(value) for value in values.values()]
    if None not in numbers:
        return sorted({int(number) for number in numbers if number is not None})
    return sorted({truth_in(value) or text for text, value in values.items()})
