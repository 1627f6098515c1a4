"""Prompts as format strings: those of the recipe, of the task and of the LoRA-SB paper."""

from dataclasses import dataclass
from string import Formatter
from typing import NamedTuple

from distlora.errors import UserError
from distlora.tasks import ResponseTask

#: The value of `data.template` that asks for the tokenizer's chat template.
CHAT = "chat"
#: The one that asks for the prompts and tokens of the LoRA-SB paper.
PAPER = "paper"

#: What a question ends in if it asks for a derivation (zero-shot chain of thought, arXiv 2205.11916).
BY_STEPS = "Let's think step by step."


class Prompt(NamedTuple):
    """A prompt, and the places (start, end) in it that a template has written and not the data."""

    text: str
    own: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Template:
    """A parsed format string: pairs of literal text and the name that follows it, None if none follows."""

    pieces: list[tuple[str, str | None]]

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.pieces if name is not None]

    def fill(self, values: dict[str, str]) -> Prompt:
        parts, own, length = [], [], 0
        for text, name in self.pieces:
            value = "" if name is None else values[name]
            parts += [text, value]
            own.append((length, length + len(text)))
            length += len(text) + len(value)
        return Prompt("".join(parts), tuple(own))


def parse_template(template: str) -> Template:
    """Parses `data.template`. Only plain names may stand in braces: they are looked up, never evaluated."""
    pieces = []
    try:
        for text, name, spec, conversion in Formatter().parse(template):
            if spec or conversion or name == "":
                raise ValueError("only names may stand in braces")
            pieces.append((text, name))
    except ValueError as error:
        raise UserError(
            f"data.template: {error}, write {{name}} for a column and {{{{ }}}} for braces as text"
        ) from None
    return Template(pieces)


def choose_templates(
    template: str | None, task: ResponseTask, name: str, scoring: bool
) -> tuple[Template, Template]:
    """The templates that `data.template` stands for: of a row without an input, and of a row with one.

    name: of the task. scoring: whether a question is asked, and nothing trained.
    """
    if template == CHAT:
        return Template([("", "prompt")]), Template([("", "prompt"), ("\n\n", "input")])
    if template == PAPER:
        texts = _of_the_paper(task, name, scoring)
    elif template is not None:
        texts = (template, None)
    else:
        texts = (task.template, task.template_with_input)
    return parse_template(texts[0]), parse_template(texts[1] or texts[0])


def _of_the_paper(task: ResponseTask, name: str, scoring: bool) -> tuple[str, str | None]:
    if task.paper is None:
        raise UserError(
            f"data.template: the task {name} has no prompt of the paper, "
            "write a template or leave data.template out"
        )
    if scoring and task.paper.scoring is not None:
        return task.paper.scoring, task.paper.scoring_with_input
    return task.paper.training, task.paper.training_with_input


def ask_by_steps(template: str | None, setting: bool | None, task: ResponseTask) -> bool:
    """Whether questions end in BY_STEPS. setting: `data.think_step_by_step`; None: as the template has it."""
    if setting is not None:
        return setting
    return template == PAPER and task.paper is not None and task.paper.by_steps


def joined(prompt: str, following: str) -> str:
    """What follows a prompt, after a space unless there is white space or one of them is empty."""
    is_apart = not prompt or not following or prompt[-1].isspace() or following[0].isspace()
    return following if is_apart else f" {following}"
