"""Tasks: which columns a data set has, how a prompt is made of them, and where the final answer stands.

Adding a task is adding one entry to `TASKS`. The recipe overrides an entry's columns by `data.fields`, its prompt by
`data.template`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from distlora.data import answers
from distlora.data.sources import nearest
from distlora.errors import UserError

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


@dataclass(frozen=True)
class Task:
    """One kind of data set.

    columns: the column of each role, before `data.fields`.
    template: the prompt, a format string of roles and columns; `template_with_input` replaces it for a row with an input.
    extract: the final answer in a text, or None if it has none. Without a column for `answer`, the expected answer is the
    extract of the response.
    path: the data set to read where the recipe names none. embedded: the rows are made by the project, there is no path.
    """

    columns: dict[str, str] = field(default_factory=dict)
    template: str = "{prompt}"
    template_with_input: str | None = None
    extract: Callable[[str], str | None] = answers.exact_text
    path: str | None = None
    embedded: bool = False


_INSTRUCT = Task(
    columns={"prompt": "instruction", "response": "output", "input": "input", "answer": "answer"},
    template=ALPACA,
    template_with_input=ALPACA_WITH_INPUT,
    extract=answers.choice_or_text,
)

TASKS: dict[str, Task] = {
    "arithmetic": Task(
        columns={"prompt": "question", "response": "answer"},
        template="Q: {prompt}\nAnswer:",
        extract=answers.number,
        embedded=True,
    ),
    "metamath": Task(
        columns={"prompt": "query", "response": "response"},
        template=ALPACA,
        extract=answers.after_the_answer_is,
        path="meta-math/MetaMathQA",
    ),
    "gsm8k": Task(
        columns={"prompt": "question", "response": "answer"},
        template=ALPACA,
        extract=answers.after_hashes,
        path="openai/gsm8k:main",
    ),
    "instruct": _INSTRUCT,
    "commonsense": _INSTRUCT,
    "text": Task(),
}


def get_task(name: str) -> Task:
    """The task of a name. Raises UserError with the nearest name."""
    if name not in TASKS:
        hint = nearest(name, TASKS) or f", choose one of {', '.join(TASKS)}"
        raise UserError(f"data.task: unknown task {name!r}{hint}")
    return TASKS[name]


def is_correct(task: str, generated_text: str, answer: str | None) -> bool:
    """Whether the final answer in a generated text is the expected one: as a number where both are numbers, else as text.

    Where no answer is known (None), nothing is correct.
    """
    return answers.same(get_task(task).extract(generated_text), answer)
