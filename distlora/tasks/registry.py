"""All tasks by name. A new family of tasks is one new file in this folder, with a dict `TASKS`; the families
that are scored together have a dict `SUITES`, from a name to the names of tasks, as well.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from distlora import tasks
from distlora.errors import UserError
from distlora.sentences import nearest
from distlora.tasks.base import ResponseTask, Task

#: Files that define no tasks. `metrics` loads torch, which the judging of answers does not need.
_NO_FAMILIES = ("metrics", "registry")


def _files() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(tasks.__path__):
        if module.name not in _NO_FAMILIES:
            yield importlib.import_module(f"{tasks.__name__}.{module.name}")


def find(kind: str) -> dict[str, Any]:
    """What all files in this folder have under this name, in one dict."""
    found: dict[str, Any] = {}
    for family in _files():
        found |= getattr(family, kind, {})
    return found


def families() -> dict[str, dict[str, Task]]:
    """The tasks of each file of this folder, under the first sentence of the file's docstring."""
    told = {}
    for family in _files():
        if hasattr(family, "TASKS"):
            paragraph = " ".join((family.__doc__ or "").partition("\n\n")[0].split())
            told[paragraph.partition(". ")[0].removesuffix(".")] = family.TASKS
    return told


TASKS: dict[str, Task] = find("TASKS")
SUITES: dict[str, tuple[str, ...]] = find("SUITES")


def scored_tasks(names: Sequence[str]) -> list[str]:
    """The tasks that these names stand for, each once, in order: a suite's name stands for its tasks.

    Raises UserError, which names the nearest task or suite, for an unknown name.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in SUITES | TASKS:
            hint = nearest(name, SUITES | TASKS) or f", choose from {', '.join(SUITES | TASKS)}"
            raise UserError(f"unknown task {name!r}{hint}")
        found |= dict.fromkeys(SUITES.get(name, (name,)))
    return list(found)


def get_task(name: str) -> Task:
    """The task with this name. Raises UserError, which names the nearest one, if there is none."""
    if name not in TASKS:
        hint = nearest(name, TASKS) or f", choose one of {', '.join(TASKS)}"
        raise UserError(f"data.task: unknown task {name!r}{hint}")
    return TASKS[name]


def try_judge(name: str) -> None:
    """Raises UserError if the task's judge lacks a package that it needs; nothing for tasks with labels."""
    task = get_task(name)
    if isinstance(task, ResponseTask):
        task.judge("The answer is: p + p", "2p")  # equal as mathematics only, so no shortcut decides it


def is_correct(task: str, output: str, answer: str | None) -> bool:
    """Whether a text that was generated for a `ResponseTask` gives the expected answer, by the task's judge.

    answer: bare, or a full reference response. If no answer is known (None), no text is correct.
    """
    return answer is not None and get_task(task).judge(output, answer)
