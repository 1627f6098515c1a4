"""Commonsense reasoning in the format of LLM-Adapters: a question, its options, and the right one."""

from distlora.tasks.instruct import INSTRUCT

TASKS = {"commonsense": INSTRUCT}
