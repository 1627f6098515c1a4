"""Lists for the terminal: tasks, and the files that come with distlora."""

import shutil
import sys
import textwrap
from collections.abc import Iterable

from distlora.errors import UserError
from distlora.recipe.shipped import (
    description,
    shipped_examples,
    shipped_launch,
    shipped_recipes,
    shipped_sweeps,
    shipped_zero,
)
from distlora.sentences import nearest

#: Where nobody watches, lines are as long as they are: they may be searched.
_UNLIMITED = 10_000


def recipes_text() -> str:
    """The recipes, and what else comes with distlora."""
    described = {
        "recipes, for `distlora train NAME`": shipped_recipes(),
        "sweeps, for `distlora sweep NAME`": shipped_sweeps(),
    }
    lines = []
    for title, files in described.items():
        lines += [title, *_columns((name, description(path)) for name, path in files.items()), ""]
    named = {
        "DeepSpeed configs": [f"configs/zero/{path.name}" for path in shipped_zero().values()],
        "launch scripts": shipped_launch(),
        "examples of data": shipped_examples(),
    }
    lines += _columns((title, ", ".join(names)) for title, names in named.items())
    lines += ["", "`distlora recipes NAME` shows a file, `distlora copy NAME FILE` writes it to one of yours"]
    return "\n".join(lines)


def tasks_text() -> str:
    """The tasks by family, with their data sets."""
    from distlora.tasks import SUITES, families

    lines = []
    for title, tasks in families().items():
        rows = [(name, f"{_learned(task)}; {_data(task)}") for name, task in tasks.items()]
        lines += [title, *_columns(rows), ""]
    suites = [(name, ", ".join(tasks)) for name, tasks in SUITES.items()]
    return "\n".join([*lines, "several at once, for `distlora eval --tasks`", *_columns(suites)])


def task_text(name: str) -> str:
    """A task in detail, and the section of a recipe that asks for it; of a suite its tasks. Errors:
    UserError."""
    from distlora.tasks import SUITES, TASKS

    if name in SUITES and name not in TASKS:
        return "\n\n".join(task_text(task) for task in SUITES[name])
    if name not in TASKS:
        remedy = nearest(name, TASKS | SUITES) or "; `distlora tasks` lists them"
        raise UserError(f"no task is called {name}{remedy}")
    task = TASKS[name]
    facts = [
        ("learns", _learned(task)),
        ("data", _data(task)),
        ("scored on", f"split {task.eval_split}"),
        *((f"column {role}", _names(column)) for role, column in getattr(task, "columns", {}).items()),
        ("labels", ", ".join(getattr(task, "labels", ()))),
        ("prompt", repr(task.template) if hasattr(task, "template") else ""),
        ("metrics", ", ".join(getattr(task, "metrics", ()))),
    ]
    section = ["in a recipe:", "  data:", f"    task: {name}", "    split: train"]
    if task.path is None and task.rows is None:
        section.insert(3, "    path: FILE            # or a folder, or a data set of the hub")
    return "\n".join([name, *_columns((key, value) for key, value in facts if value), "", *section])


def _learned(task) -> str:
    from distlora.tasks import ChatTask, CompletionTask, ImageTask, LabelTask, ScoreTask

    kinds = {
        ChatTask: "the assistant's turns",
        CompletionTask: "whole texts",
        ImageTask: "labels of images",
        LabelTask: "labels of texts",
        ScoreTask: "scores of texts",
    }
    return next((said for kind, said in kinds.items() if isinstance(task, kind)), "responses to prompts")


def _data(task) -> str:
    if task.rows is not None:
        return "generated, needs no file"
    return task.path or "data of yours, named by data.path"


def _names(column: str | Iterable[str]) -> str:
    return column if isinstance(column, str) else " or ".join(column)


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0) + 4
    whole = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    lines = []
    for name, text in rows:
        first, *more = textwrap.wrap(text, max(whole - width, 30)) or [""]
        lines += [f"  {name:<{width - 2}}{first}", *(" " * width + line for line in more)]
    return lines
