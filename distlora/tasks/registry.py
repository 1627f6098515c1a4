"""Tasks: which columns a data set has, and what is made of them.

A `ResponseTask` makes a prompt and its response of a row, a `LabelTask` makes texts and their label.
`distlora.training.objective` says what is trained for each of these kinds. A new task is one new entry in
`TASKS`. A recipe overrides the columns of an entry by `data.fields`, and its prompt by `data.template`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from distlora.errors import UserError
from distlora.sentences import nearest
from distlora.tasks import answers

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)

#: What a column can be used for. A row may lack `input` and `answer`.
ROLES = ("prompt", "response", "input", "answer")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds of tasks have.

    path: the data set to read if the recipe names none. embedded: the rows are made here, and there is no
    path. header: the columns of the data set's official TSV files, if these do not name them.
    """

    path: str | None = None
    embedded: bool = False
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ResponseTask(Task):
    """A prompt and the response to learn.

    columns: the column of each role, if `data.fields` does not name another. template: the prompt, a format
    string of roles and columns. template_with_input: the same for rows with an input. extract: finds the
    final answer in a text, None if there is none. Without a column for `answer`, the expected answer is the
    one that `extract` finds in the response.
    """

    columns: dict[str, str] = field(default_factory=dict)
    template: str = "{prompt}"
    template_with_input: str | None = None
    extract: Callable[[str], str | None] = answers.exact_text


@dataclass(frozen=True)
class LabelTask(Task):
    """A text or a pair of texts, and the label to predict.

    columns: for "text", "pair" (if there is one) and "label", the names that the column has in the various
    copies of the data set. labels: the names of the labels, in the order of their numbers; empty if the
    recipe names them. metrics: names from `distlora.tasks.metrics` that are reported beside the loss.
    """

    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)


_INSTRUCT = ResponseTask(
    columns={"prompt": "instruction", "response": "output", "input": "input", "answer": "answer"},
    template=ALPACA,
    template_with_input=ALPACA_WITH_INPUT,
    extract=answers.choice_or_text,
)

_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = {"text": ("sentence1",), "pair": ("sentence2",), "label": ("label",)}

#: GLUE, under its names on the hub. Where the official TSV files have other columns, those come second.
GLUE: dict[str, LabelTask] = {
    "cola": LabelTask(
        columns={"text": ("sentence",), "label": ("label",)},
        labels=("unacceptable", "acceptable"),
        metrics=("accuracy", "matthews"),
        header=("source", "label", "mark", "sentence"),
        path="nyu-mll/glue:cola",
    ),
    "sst2": LabelTask(
        columns={"text": ("sentence",), "label": ("label",)},
        labels=("negative", "positive"),
        path="nyu-mll/glue:sst2",
    ),
    "mrpc": LabelTask(
        columns={
            "text": ("sentence1", "#1 String"),
            "pair": ("sentence2", "#2 String"),
            "label": ("label", "Quality"),
        },
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        path="nyu-mll/glue:mrpc",
    ),
    "qqp": LabelTask(
        columns={"text": ("question1",), "pair": ("question2",), "label": ("label", "is_duplicate")},
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        path="nyu-mll/glue:qqp",
    ),
    "mnli": LabelTask(
        columns={
            "text": ("premise", "sentence1"),
            "pair": ("hypothesis", "sentence2"),
            "label": ("label", "gold_label"),
        },
        labels=("entailment", "neutral", "contradiction"),
        path="nyu-mll/glue:mnli",
    ),
    "qnli": LabelTask(
        columns={"text": ("question",), "pair": ("sentence",), "label": ("label",)},
        labels=_ENTAILMENT,
        path="nyu-mll/glue:qnli",
    ),
    "rte": LabelTask(columns=_SENTENCES, labels=_ENTAILMENT, path="nyu-mll/glue:rte"),
    "wnli": LabelTask(columns=_SENTENCES, labels=("not_entailment", "entailment"), path="nyu-mll/glue:wnli"),
}

TASKS: dict[str, Task] = {
    "arithmetic": ResponseTask(
        columns={"prompt": "question", "response": "answer"},
        template="Q: {prompt}\nAnswer:",
        extract=answers.number,
        embedded=True,
    ),
    "metamath": ResponseTask(
        columns={"prompt": "query", "response": "response"},
        template=ALPACA,
        extract=answers.after_the_answer_is,
        path="meta-math/MetaMathQA",
    ),
    "gsm8k": ResponseTask(
        columns={"prompt": "question", "response": "answer"},
        template=ALPACA,
        extract=answers.after_hashes,
        path="openai/gsm8k:main",
    ),
    "instruct": _INSTRUCT,
    "commonsense": _INSTRUCT,
    "text": ResponseTask(),
    **GLUE,
    "classification": LabelTask(),
}


def get_task(name: str) -> Task:
    """The task with this name. Raises UserError, which names the nearest one, if there is none."""
    if name not in TASKS:
        hint = nearest(name, TASKS) or f", choose one of {', '.join(TASKS)}"
        raise UserError(f"data.task: unknown task {name!r}{hint}")
    return TASKS[name]


def is_correct(task: str, generated_text: str, answer: str | None) -> bool:
    """Whether the final answer in a text that was generated for a `ResponseTask` is the expected one.

    Answers are compared by `answers.same`. If no answer is known (None), no text is correct.
    """
    return answers.same(get_task(task).extract(generated_text), answer)
