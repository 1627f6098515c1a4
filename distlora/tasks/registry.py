"""Tasks: which columns a data set has, and what is made of them: a prompt and its response, or texts and
their label.

Adding a task is adding one entry to `TASKS`. The recipe overrides an entry's columns by `data.fields`, its
prompt by `data.template`. The kinds of tasks are the classes; what is trained for each kind,
`distlora.training.objective` says.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from distlora.errors import UserError
from distlora.sentences import nearest
from distlora.tasks import answers

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)

#: What a column can be used for. `input` and `answer` are optional: a row may lack them.
ROLES = ("prompt", "response", "input", "answer")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds have. path: the data set to read where the recipe names none. embedded: the rows are
    made by the project, there is no path. header: the columns of the data set's official TSV files, where
    these do not name them."""

    path: str | None = None
    embedded: bool = False
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ResponseTask(Task):
    """A prompt and the response to learn.

    columns: the column of each role, before `data.fields`.
    template: the prompt, a format string of roles and columns; `template_with_input` replaces it for a row
    with an input. extract: the final answer in a text, or None if it has none. Without a column for `answer`,
    the expected answer is the extract of the response.
    """

    columns: dict[str, str] = field(default_factory=dict)
    template: str = "{prompt}"
    template_with_input: str | None = None
    extract: Callable[[str], str | None] = answers.exact_text


@dataclass(frozen=True)
class LabelTask(Task):
    """A text or a pair of texts, and the label to predict.

    columns: for "text", "pair" (if there is one) and "label", the names that the column goes by in the data
    set's various copies. labels: the names of the labels, in the order of the numbers that stand for them;
    empty: the recipe names them. metrics: names from `distlora.tasks.metrics` that are reported beside the
    loss.
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

#: GLUE under its hub names. The official TSV files have other columns for some tasks; these stand behind.
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
    """The task of a name. Raises UserError with the nearest name."""
    if name not in TASKS:
        hint = nearest(name, TASKS) or f", choose one of {', '.join(TASKS)}"
        raise UserError(f"data.task: unknown task {name!r}{hint}")
    return TASKS[name]


def is_correct(task: str, generated_text: str, answer: str | None) -> bool:
    """Whether the final answer in a text generated for a `ResponseTask` is the expected one: as a number
    where both are numbers, else as text.

    Where no answer is known (None), nothing is correct.
    """
    return answers.same(get_task(task).extract(generated_text), answer)
