"""Which part of a rendered conversation is the assistant's.

A chat template says so itself with `{% generation %}`. Where it does not, prefixes of the conversation are
rendered. The assistant's part begins where the prompt for it ends, and ends where the rendering ends of the
conversation up to it. Templates may show a turn differently once others follow (Qwen3 drops its thoughts,
Mistral moves the system's text). There, the assistant's content is replaced by a mark, and what stands before
and behind the mark is compared.
"""

import re
from collections.abc import Callable

from distlora.data.chat_check import without_space, without_thoughts
from distlora.data.chat_template import Message, TemplateProblem, parts_of, text_of

#: (messages, whether the prompt for the assistant follows) to the text. Raises TemplateProblem.
Render = Callable[[list[Message], bool], str]

Place = tuple[int, int]

#: In the place of a content. The first is the assistant's, the second that of the message before.
MARK, MARK_BEFORE = "\ufdd5", "\ufdd6"

#: In the name of a token that begins an assistant's turn.
_NAMES = re.compile("assistant|model|gpt|bot", re.IGNORECASE)
_WORD = re.compile(r"\w")
_THOUGHTS = re.compile(r"<think>.*</think>|\[THINK\].*\[/THINK\]", re.DOTALL)
_THOUGHT_MARKER = re.compile(r"[<\[](?P<closing>/?)(think|THINK)[>\]]")

_UNCLEAR = "does not let tell which tokens are the assistant's; mark them in it with {% generation %}"


class Turns:
    """The assistant's turns of one conversation.

    text: the whole conversation as the template shows it. names: finds the names of added tokens, as
    `TextEncoder.names_in` does.
    """

    def __init__(
        self, render: Render, text: str, messages: list[Message], names: Callable[[str], list[Place]]
    ):
        self._render, self._text, self._messages, self._names = render, text, messages, names

    def place(self, index: int) -> Place:
        """Where the turn of one message stands in the text, with its end of turn. Raises TemplateProblem if
        that cannot be told.
        """
        start, end = self._found(index)
        return start, start + len(self._without_opening(index, self._text[start:end]))

    def _found(self, index: int) -> Place:
        prompt = self._prompt(index)
        until = self._until(index, self._messages)
        start = len(prompt) if prompt and self._text.startswith(prompt) else self._parting(prompt)
        if start and until and self._text.startswith(until) and start < len(until):
            return start, len(until)
        return self._by_marks(index, prompt)

    def _parting(self, prompt: str | None) -> int | None:
        """Where the turn begins if its thoughts stand where the prompt has an empty block of them, or the
        beginning of one with other white space; None if they do not.
        """
        if not prompt or self._text.startswith(prompt):
            return None
        shared = _shared(self._text, prompt)
        opened = [marker for marker in _THOUGHT_MARKER.finditer(prompt, 0, shared)][-1:]
        if not opened or opened[0]["closing"] or _THOUGHT_MARKER.match(self._text[shared:].lstrip()):
            return None
        begins = opened[0].end()
        empty = _THOUGHT_MARKER.sub("", prompt[begins:])
        return begins if not empty.strip() else None

    def _without_opening(self, index: int, turn: str) -> str:
        """The text of a turn that ends a conversation, or its end, without the opening of the next turn,
        which some templates write behind all that they show as they do in the prompt.
        """
        names = self._closing_names(turn)
        asked = next((i for i in reversed(range(index)) if self._messages[i]["role"] != "assistant"), None)
        if len(names) < 2 or asked is None:
            return turn
        prompt = self._attempt(self._messages[: asked + 1], True) or ""
        opening = [prompt[slice(*name)] for name in self._closing_names(prompt)]
        closing = [turn[slice(*name)] for name in names]
        for number in range(len(closing) - 1):
            if _opens(closing[number:], opening):
                return turn[: names[number][1]]
        return turn

    def _closing_names(self, text: str) -> list[Place]:
        """The added tokens at the end of a text; there may be white space between them."""
        found, until = [], len(text)
        for start, end in reversed(self._names(text)):
            if text[end:until].strip():
                break
            found, until = [(start, end), *found], start
        return found

    def _prompt(self, index: int) -> str | None:
        """The text that asks for the turn; None if the template has none."""
        if not index:
            return None
        prompt = self._attempt(self._messages[:index], True)
        if prompt and self._text.startswith(prompt):
            content = without_thoughts(text_of(self._messages[index])).strip()
            lead = self._text[len(prompt) : max(self._text.find(content, len(prompt)), len(prompt))]
            if self._has_head(lead) and prompt == self._attempt(self._messages[:index], False):
                return None  # the template knows no prompt, and the head of the turn is nothing to learn
        return prompt

    def _has_head(self, lead: str) -> bool:
        """Whether what stands between the prompt and a content says who speaks. Thoughts do not, and an added
        token only with a name of the assistant in it: it may as well begin a response.
        """
        lead = _THOUGHTS.sub("", lead)
        words = lead
        for start, end in reversed(self._names(lead)):
            words = words[:start] + words[end:]
        return bool(_WORD.search(words) or _NAMES.search(lead))

    def _until(self, index: int, messages: list[Message]) -> str | None:
        """The conversation up to one message."""
        if messages is self._messages and index == len(messages) - 1:
            return self._text
        return self._attempt(messages[: index + 1], False)

    def _attempt(self, messages: list[Message], prompting: bool) -> str | None:
        try:
            return self._render(messages, prompting)
        except TemplateProblem:
            return None

    # ------------------------------------------------------------------ by marks

    def _by_marks(self, index: int, prompt: str | None) -> Place:
        messages = _with_content(self._messages, index, MARK)
        marked = self._attempt(messages, False)
        if marked is None or marked.count(MARK) != 1:
            raise TemplateProblem(_UNCLEAR)
        at = marked.index(MARK)
        start = self._start(index, marked, prompt)
        end = self._end(index, messages, marked, prompt)
        parting = self._parting(prompt)
        begins = self._text.startswith(marked[:start]) or parting is not None
        found = start if parting is None else parting, len(self._text) - (len(marked) - end)
        same = begins and self._text.endswith(marked[end:])
        if not (same and start <= at < end and found[0] < found[1]):
            raise TemplateProblem(_UNCLEAR)
        return found

    def _start(self, index: int, marked: str, prompt: str | None) -> int:
        """Where the assistant's part begins in the marked text."""
        at = marked.index(MARK)
        if prompt is None:
            return at
        shared = _shared(marked, prompt)
        if shared == len(prompt):
            return shared
        before = self._attempt(self._messages[:index], False)
        opened = before is not None and prompt.startswith(before) and shared >= len(before)
        behind = None if opened else self._behind_message_before(index)
        if behind is None:
            return at  # the prompt may open what the template does not show, such as thoughts
        shown, asked = behind
        return at - len(shown) + len(asked) if shown.startswith(asked) else at

    def _behind_message_before(self, index: int) -> tuple[str, str] | None:
        """What follows the content before the assistant's: in the conversation, and in the prompt."""
        messages = _with_content(self._messages, index - 1, MARK_BEFORE)
        whole = self._attempt(_with_content(messages, index, MARK), False)
        prompt = self._attempt(messages[:index], True)
        if whole is None or prompt is None or whole.count(MARK_BEFORE) != 1 or prompt.count(MARK_BEFORE) != 1:
            return None
        return whole.partition(MARK_BEFORE)[2].partition(MARK)[0], prompt.partition(MARK_BEFORE)[2]

    def _end(self, index: int, messages: list[Message], marked: str, prompt: str | None) -> int:
        """Where the assistant's part ends in the marked text."""
        if index == len(messages) - 1:
            return len(marked)
        at = marked.index(MARK) + 1
        until = self._until(index, messages)
        tail = until.partition(MARK)[2] if until is not None and until.count(MARK) == 1 else ""
        tail = self._without_opening(index, tail)
        if tail and marked.startswith(tail, at):
            return at + len(tail)
        return at + self._end_token(index, marked[at:], tail, prompt)

    def _end_token(self, index: int, following: str, tail: str, prompt: str | None) -> int:
        """The end of the token that closes a turn, where the template closes the last one otherwise: gpt-oss
        with another token, Phi-3 with one more.

        following, tail: what stands behind the content, in the conversation and where it ends with the turn.
        """
        for start, end in self._names(following)[:1]:
            if following[:start].strip():
                break
            if tail.startswith(following[:end]) or not self._opens_turns(index, following[start:end], prompt):
                return end
        raise TemplateProblem(_UNCLEAR)

    def _opens_turns(self, index: int, token: str, prompt: str | None) -> bool:
        before = self._attempt(self._messages[:index], False)
        if prompt is None or before is None:
            return True
        return token in prompt[_shared(prompt, before) :]


def marked_places(
    text: str, places: list[Place], render: Render, messages: list[Message]
) -> dict[int, list[Place]]:
    """Which of the places that a template marks as generated belong to which of the assistant's messages.

    A turn has the places behind the text that the template makes of the messages before it, so far as that
    is the same in the conversation. Behind the last turn a template may mark one place more. {} where the
    marks cannot be told apart.
    """
    assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        starts = [_shared(text, render(messages[:index], False)) if index else 0 for index in assistant]
    except TemplateProblem:
        return {}
    found = {}
    for index, start, end in zip(assistant, starts, [*starts[1:], len(text)]):
        found[index] = [place for place in places if start <= place[0] < end]
    is_whole = all(_shows(messages[index], text, its) for index, its in found.items())
    return found if is_whole and sum(map(len, found.values())) == len(places) else {}


def _shows(message: Message, text: str, places: list[Place]) -> bool:
    """Whether there are places, and the content of a message that calls no tool is in them."""
    shown = without_space("".join(text[slice(*place)] for place in places))
    content = without_space(without_thoughts(text_of(message)))
    return bool(places) and (content in shown or "tool_calls" in message)


def _opens(run: list[str], opening: list[str]) -> bool:
    """Whether a run of tokens is the opening of a turn. Behind it a prompt may go on, as with the beginning
    of a response; two tokens with others behind them may as well end any message.
    """
    size = len(run)
    found = [at for at in range(len(opening) - size + 1) if opening[at : at + size] == run]
    return bool(found) and (size > 2 or found[-1] + size == len(opening))


def _with_content(messages: list[Message], index: int, text: str) -> list[Message]:
    """The messages with another content in one of them, in the form that it had."""
    content = messages[index].get("content")
    changed = {**messages[index], "content": parts_of(text) if isinstance(content, list) else text}
    return [*messages[:index], changed, *messages[index + 1 :]]


def _shared(first: str, second: str) -> int:
    """The length of the text with which both begin."""
    if first.startswith(second):
        return len(second)
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
