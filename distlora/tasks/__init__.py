"""Tasks: which columns a data set has, what is made of a row, and how an answer or a label is judged.

base            the kinds of tasks
answers         how the answer is found in a reference response, and when two are the same
judging         whether an output gives the expected answer; with reading, how a person reads it
metrics         how good predicted labels are
registry        all tasks by name
all other files one family of tasks each: `TASKS`, from a name to its task; and `SUITES`, names for several

Other folders use the names below.
"""

from distlora.tasks.base import ROLES, LabelTask, Layout, ResponseTask, ScoreTask, Task, TextTask
from distlora.tasks.chat import ChatTask
from distlora.tasks.completion import CompletionTask
from distlora.tasks.images import ImageTask
from distlora.tasks.registry import SUITES, TASKS, families, get_task, is_correct, scored_tasks, try_judge

__all__ = [
    "ROLES",
    "SUITES",
    "TASKS",
    "CompletionTask",
    "ChatTask",
    "ImageTask",
    "LabelTask",
    "Layout",
    "ResponseTask",
    "ScoreTask",
    "Task",
    "TextTask",
    "families",
    "get_task",
    "is_correct",
    "scored_tasks",
    "try_judge",
]
