"""A tokenizer's chat template: what it makes of a conversation, on one date, and what it marks as generated.

A template is a program of somebody else. Whatever it raises becomes `TemplateProblem`.
"""

import re
from dataclasses import dataclass
from datetime import date as Date
from functools import cached_property, lru_cache
from typing import Any

from distlora.sentences import first_line

Message = dict[str, Any]

#: Around what a template puts between `{% generation %}` and `{% endgeneration %}`.
BEGIN, END = "\ufdd3", "\ufdd4"

_BLOCK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_MARKING = f"{{% macro generated_by_assistant() %}}{BEGIN}{{{{ caller() }}}}{END}{{% endmacro %}}\n"
#: What strftime can be asked for. `%-d` is glibc's.
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAwdbBmyYHIpMSfjUWcxXeFTDRGuV"]
#: A call of the clock whose format is written out, and the question whether there is a clock.
_KNOWN_USE = re.compile(r"strftime_now(\s*\(\s*('[^']*'|\"[^\"]*\")\s*\)|\s+is\s+(not\s+)?defined)")

#: Texts that stand in no template, for a trial.
_USER, _ASSISTANT = "Kwyjibo asks", "Quuxly answers"


@dataclass(frozen=True)
class Conversation:
    """messages: as a chat template takes them; the last is the assistant's. trained: of each message whether
    there is a loss on it. tools: descriptions of functions, None without any.
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    tools: list[dict] | None = None

    def learned(self) -> list[int]:
        """The numbers of the messages that there is a loss on."""
        return [number for number, trained in enumerate(self.trained) if trained]

    def with_loss_on_last(self) -> "Conversation":
        """With a loss on the last message only, if it has one."""
        *others, last = self.trained
        return Conversation(self.messages, (*(False for _ in others), last), self.tools)

    def up_to(self, number: int) -> "Conversation":
        """The messages up to one of them."""
        return Conversation(self.messages[: number + 1], self.trained[: number + 1], self.tools)

    @classmethod
    def of_texts(cls, prompt: str, response: str | None) -> "Conversation":
        """A question and its answer; None: the question alone."""
        user = {"role": "user", "content": prompt}
        if response is None:
            return cls((user,), (False,))
        return cls((user, {"role": "assistant", "content": response}), (False, True))


class TemplateProblem(Exception):
    """The message is the end of a sentence that begins "the chat template"."""


class ChatTemplate:
    """The chat template of a tokenizer.

    date: what the template sees as today, YYYY-MM-DD; None: the clock.
    """

    def __init__(self, tokenizer, date: str | None):
        self._tokenizer, self._date = tokenizer, date

    def render(self, messages: list[Message], tools: list | None = None, prompting: bool = False) -> str:
        """The text of a conversation; with prompting, up to where the assistant goes on. Raises
        TemplateProblem.
        """
        return self._render(self._source(tools), messages, tools, prompting)

    def render_marked(self, messages: list[Message], tools: list | None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the places in it that the template marks as generated; none if it marks nothing."""
        source = self._source(tools)
        if not _BLOCK.search(source):
            return self._render(source, messages, tools, False), []
        calls = _BLOCK.sub(
            lambda tag: f"{{%{tag[1]} {'endcall' if tag[2] else 'call generated_by_assistant()'} {tag[3]}%}}",
            source,
        )
        marked = self._render(_MARKING + calls, messages, tools, False)
        return _take_marks(marked)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether contents have to be lists of parts: the template shows no content that is a text."""
        return not self._shows(lambda text: text) and self.takes_parts

    @cached_property
    def takes_parts(self) -> bool:
        return self._shows(parts_of)

    def _shows(self, form) -> bool:
        trial = [
            {"role": "user", "content": form(_USER)},
            {"role": "assistant", "content": form(_ASSISTANT)},
        ]
        try:
            text = self.render(trial)
        except TemplateProblem:
            return False
        return _USER in text and _ASSISTANT in text and "'text'" not in text

    def _source(self, tools: list | None) -> str:
        try:
            source = self._tokenizer.get_chat_template(None, tools)
        except Exception as error:
            raise TemplateProblem(f"cannot be chosen ({first_line(error)})") from None
        if self._date is not None and "strftime_now" in source:
            return clock(self._date, source) + source
        return source

    def _render(self, source: str, messages: list[Message], tools: list | None, prompting: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompting
            )
        except Exception as error:
            raise TemplateProblem(f"fails ({first_line(error)})") from None
        if not isinstance(text, str):
            raise TemplateProblem(f"makes a {type(text).__name__} and no text")
        return text


@lru_cache(maxsize=16)
def clock(date: str, source: str) -> str:
    """Jinja for `strftime_now`, a name that transformers gives to templates, on one day at midnight.

    source: the template. If it writes out all its formats, no other directive than theirs is needed.
    """
    today = Date.fromisoformat(date)
    written = "strftime_now" not in _KNOWN_USE.sub("", source)
    found = "format"
    for directive in _DIRECTIVES:
        if not written or directive in source:
            value = today.strftime(directive).replace("\\", "").replace("'", "")
            found += f".replace('{directive}', '{value}')"
    return f"{{% macro strftime_now(format) %}}{{{{ {found}.replace('%%', '%') }}}}{{% endmacro %}}\n"


def parts_of(text: str) -> list[dict[str, str]]:
    """A content as a list of parts."""
    return [{"type": "text", "text": text}]


def text_of(message: Message) -> str:
    """The text of a message's content."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _take_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    places, parts, length, start = [], [], 0, None
    for piece in re.split(f"([{BEGIN}{END}])", marked):
        if piece == BEGIN:
            start = length
        elif piece == END:
            if start is not None:
                places.append((start, length))
            start = None
        else:
            parts.append(piece)
            length += len(piece)
    return "".join(parts), [(start, end) for start, end in places if end > start]
