"""Any texts with labels: the recipe names the columns and the labels."""

from distlora.tasks.base import LabelTask

TASKS = {"classification": LabelTask()}
