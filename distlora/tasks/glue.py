"""GLUE (arXiv 1804.07461), under its names on the hub."""

from distlora.tasks.base import LabelTask, ScoreTask, TextTask

_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = {"text": ("sentence1",), "pair": ("sentence2",), "label": ("label",)}

#: Where the official TSV files have other columns than the hub, those come second.
TASKS: dict[str, TextTask] = {
    "cola": LabelTask(
        columns={"text": ("sentence",), "label": ("label",)},
        labels=("unacceptable", "acceptable"),
        metrics=("accuracy", "matthews"),
        header=("source", "label", "mark", "sentence"),
        eval_split="validation",
        path="nyu-mll/glue:cola",
        folder="CoLA",
    ),
    "sst2": LabelTask(
        columns={"text": ("sentence",), "label": ("label",)},
        labels=("negative", "positive"),
        eval_split="validation",
        path="nyu-mll/glue:sst2",
        folder="SST-2",
    ),
    "mrpc": LabelTask(
        columns={
            "text": ("sentence1", "#1 String"),
            "pair": ("sentence2", "#2 String"),
            "label": ("label", "Quality"),
        },
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        eval_split="validation",
        path="nyu-mll/glue:mrpc",
        folder="MRPC",
    ),
    "qqp": LabelTask(
        columns={"text": ("question1",), "pair": ("question2",), "label": ("label", "is_duplicate")},
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        eval_split="validation",
        path="nyu-mll/glue:qqp",
        folder="QQP",
    ),
    "mnli": LabelTask(
        columns={
            "text": ("premise", "sentence1"),
            "pair": ("hypothesis", "sentence2"),
            "label": ("label", "gold_label"),
        },
        labels=("entailment", "neutral", "contradiction"),
        eval_split="validation_matched",
        path="nyu-mll/glue:mnli",
        folder="MNLI",
    ),
    "qnli": LabelTask(
        columns={"text": ("question",), "pair": ("sentence",), "label": ("label",)},
        labels=_ENTAILMENT,
        eval_split="validation",
        path="nyu-mll/glue:qnli",
        folder="QNLI",
    ),
    "rte": LabelTask(
        columns=_SENTENCES,
        labels=_ENTAILMENT,
        eval_split="validation",
        path="nyu-mll/glue:rte",
        folder="RTE",
    ),
    "wnli": LabelTask(
        columns=_SENTENCES,
        labels=("not_entailment", "entailment"),
        eval_split="validation",
        path="nyu-mll/glue:wnli",
        folder="WNLI",
    ),
    "stsb": ScoreTask(
        columns={"text": ("sentence1",), "pair": ("sentence2",), "label": ("label", "score")},
        lowest=0.0,
        highest=5.0,
        eval_split="validation",
        path="nyu-mll/glue:stsb",
        folder="STS-B",
    ),
}

SUITES = {"glue": tuple(TASKS)}
