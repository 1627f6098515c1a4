"""Data: rows from files, the hub or a generator, made into samples, batches and answers.

sources ─► examples (tasks, arithmetic) ─► encode ─► batches        answers: judging what a model generated
"""

from distlora.data.batches import TrainOrder, collate, collate_prompts, micro_batches, shard
from distlora.data.encode import IGNORE, Encoded, Sample, load_split
from distlora.data.examples import check_columns, download
from distlora.data.tasks import TASKS, is_correct

__all__ = [
    "IGNORE",
    "TASKS",
    "Encoded",
    "Sample",
    "TrainOrder",
    "check_columns",
    "collate",
    "collate_prompts",
    "download",
    "is_correct",
    "load_split",
    "micro_batches",
    "shard",
]
