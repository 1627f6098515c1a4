"""Tasks: which columns a data set has, what is made of a row, and how an answer or a label is judged."""

from distlora.tasks.metrics import METRICS
from distlora.tasks.registry import ROLES, TASKS, LabelTask, ResponseTask, get_task, is_correct

__all__ = ["METRICS", "ROLES", "TASKS", "LabelTask", "ResponseTask", "get_task", "is_correct"]
