"""Any prompts and responses: the recipe names the columns."""

from distlora.tasks.base import ResponseTask

TASKS = {"text": ResponseTask()}
