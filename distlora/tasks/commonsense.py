"""Commonsense reasoning in the format of LLM-Adapters: a question, its options, and the right one."""

from dataclasses import replace

from distlora.tasks import judging
from distlora.tasks.instruct import INSTRUCT

#: The word of the labels of each data set: `solution1`, `ending3`; "truth" for true and false.
LABELS = {
    "boolq": "truth",
    "piqa": "solution",
    "siqa": "answer",
    "hellaswag": "ending",
    "winogrande": "option",
    "arc_easy": "answer",
    "arc_challenge": "answer",
    "openbookqa": "answer",
}

TASKS = {"commonsense": INSTRUCT} | {
    name: replace(INSTRUCT, judge=judging.by_option(kind)) for name, kind in LABELS.items()
}
