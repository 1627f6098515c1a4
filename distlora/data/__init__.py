"""Data: rows from files, the hub or a generator, made into samples, batches and answers.

sources ─► examples (tasks, arithmetic) ─► encode ─► batches        answers: judging what a model generated
        └► labelled (tasks): classification
"""

from distlora.data.batches import TrainOrder, collate, collate_prompts, micro_batches, shard
from distlora.data.encode import IGNORE, Encoded, Sample, load_split
from distlora.data.examples import Examples, download, is_at_hand
from distlora.data.labelled import LabelledRows, LabelledSample, collate_labelled, label_names, load_labelled
from distlora.data.tasks import TASKS, LabelTask, ResponseTask, get_task, is_correct

__all__ = [
    "IGNORE",
    "TASKS",
    "Encoded",
    "Examples",
    "LabelTask",
    "LabelledRows",
    "LabelledSample",
    "ResponseTask",
    "Sample",
    "TrainOrder",
    "collate",
    "collate_labelled",
    "collate_prompts",
    "download",
    "get_task",
    "is_at_hand",
    "is_correct",
    "label_names",
    "load_labelled",
    "load_split",
    "micro_batches",
    "shard",
]
