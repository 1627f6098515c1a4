"""Tasks: which columns a data set has, what is made of a row, and how an answer or a label is judged.

base            the kinds of tasks
answers         how an answer is found in a text, and when two are the same
metrics         how good predicted labels are
registry        all tasks by name
all other files one family of tasks each: `TASKS`, from a name to its task

Other folders use the names below.
"""

from distlora.tasks.base import ROLES, LabelTask, ResponseTask
from distlora.tasks.images import ImageTask
from distlora.tasks.metrics import METRICS
from distlora.tasks.registry import TASKS, get_task, is_correct

__all__ = ["METRICS", "ROLES", "TASKS", "ImageTask", "LabelTask", "ResponseTask", "get_task", "is_correct"]
