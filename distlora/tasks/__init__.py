"""Tasks: which columns a data set has, what is made of a row, and how an answer or a label is judged.

A new task is an entry in `registry.TASKS`. A new metric is a function in `metrics`, and a new way to find the
answer in a text is one in `answers`. Other folders use the names below, and `arithmetic.rows`, which makes
the rows of the task that needs no file.
"""

from distlora.tasks.metrics import METRICS
from distlora.tasks.registry import ROLES, TASKS, LabelTask, ResponseTask, get_task, is_correct

__all__ = ["METRICS", "ROLES", "TASKS", "LabelTask", "ResponseTask", "get_task", "is_correct"]
