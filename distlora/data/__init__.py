"""Data: rows from files, from the hub or from a generator, made into samples and batches.

    sources ─► examples ─► encode ─► batches        prompts and responses (seams, special_tokens)
            │           └► questions                what is asked in an evaluation
            ├► completion                           texts
            ├► conversations                        several turns; encoded by chat, with chat_*
            ├► labelled                             texts and labels
            └► images (image_files)                 images and labels

`arrangement` says which samples of a step go together, `fingerprint` whether samples are those of before.
Other folders use the names below. `distlora.tasks` says what is made of a row and how an answer is judged.
"""

from distlora.data.arrangement import Arrangement, by_length, one_by_one, packed
from distlora.data.batches import TrainOrder, collate, in_a_row, micro_batches, shard
from distlora.data.chat import ends_of_turn
from distlora.data.completion import CompletionRows, EncodedDocuments, load_completion
from distlora.data.conventions import Conventions
from distlora.data.conversations import ChatExamples
from distlora.data.encode import Encoded, Sample, examples_of, load_split
from distlora.data.examples import Examples, download, is_at_hand
from distlora.data.fingerprint import Fingerprint, fingerprint_of
from distlora.data.images import (
    ImageRows,
    ImageSample,
    blank_images,
    collate_images,
    image_labels,
    load_images,
)
from distlora.data.labelled import LabelledRows, LabelledSample, collate_labelled, label_names, load_labelled
from distlora.data.questions import Question, Questions, load_questions

__all__ = [
    "Arrangement",
    "ChatExamples",
    "CompletionRows",
    "Conventions",
    "Encoded",
    "EncodedDocuments",
    "Examples",
    "Fingerprint",
    "ImageRows",
    "ImageSample",
    "LabelledRows",
    "LabelledSample",
    "Question",
    "Questions",
    "Sample",
    "TrainOrder",
    "blank_images",
    "by_length",
    "collate",
    "collate_images",
    "collate_labelled",
    "download",
    "ends_of_turn",
    "examples_of",
    "fingerprint_of",
    "image_labels",
    "in_a_row",
    "is_at_hand",
    "label_names",
    "load_completion",
    "load_images",
    "load_labelled",
    "load_questions",
    "load_split",
    "micro_batches",
    "one_by_one",
    "packed",
    "shard",
]
