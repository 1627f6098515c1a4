"""Conversations as tokens: the whole text that the chat template makes, and the assistant's turns in it.

A turn goes from where the prompt for the assistant ends to the token that ends the turn; what the template
writes behind that, such as a line break, is not learned, because generation has stopped there. To a last turn
that the template does not end, the end of sequence is added.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distlora.data.chat_check import THOUGHT_MARKERS, require_texts
from distlora.data.chat_template import (
    ChatTemplate,
    Conversation,
    Message,
    TemplateProblem,
    parts_of,
    text_of,
)
from distlora.data.chat_tokens import ChatTokens, Shown, TurnFinder
from distlora.data.chat_turns import Turns, marked_places
from distlora.data.conventions import NEWEST, Conventions
from distlora.data.seams import end_of_text, require_chat_template
from distlora.data.special_tokens import CLOSE, OPEN, Place, TextEncoder, Unreadable, added_tokens


class Chat:
    """A tokenizer with its chat template.

    Raises UserError if the tokenizer lacks what is needed. The methods raise Unreadable for a conversation
    that the template refuses or shows without one of its texts.
    """

    def __init__(self, tokenizer, conventions: Conventions = NEWEST):
        self.eos = end_of_text(tokenizer)
        require_chat_template(tokenizer)
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer, conventions.plain)
        self.template = ChatTemplate(tokenizer, conventions.date)
        self._finder = TurnFinder(tokenizer, self.encoder, self.eos)
        names = sorted((token.content for token in added_tokens(tokenizer).values()), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, filter(None, names))) or "(?!)")

    def encode(self, conversations: Sequence[Conversation], all_turns: bool = True) -> list[ChatTokens]:
        """all_turns: whether more than the last turn is wanted."""
        shown = [
            self._guarded(index, self._show, conversation, all_turns)
            for index, conversation in enumerate(conversations)
        ]
        texts, written = [each.text for each in shown], [each.written for each in shown]
        tokens = self.encoder.encode(texts, written, places=True)
        return [self._finder.find(*each) for each in zip(shown, tokens)]

    def before_answer(self, conversation: Conversation) -> tuple[str, list[int]]:
        """The text that asks for an answer to a conversation, and its tokens."""

        def show():
            messages, _ = next(self._forms(conversation))
            text = self.template.render(messages, conversation.tools, prompting=True)
            require_texts(text, messages, conversation.tools)
            return text, self._written_places(text, messages, conversation.tools, prompting=True)

        text, written = self._guarded(0, show)
        return text, self.encoder.encode([text], [written])[0].ids

    def _guarded(self, index: int, show: Callable, *arguments) -> Any:
        try:
            return show(*arguments)
        except TemplateProblem as problem:
            raise Unreadable(index, f"does not fit the chat template, which {problem}") from None

    # ------------------------------------------------------------------ texts

    def _show(self, conversation: Conversation, all_turns: bool) -> Shown:
        first: TemplateProblem | None = None
        for messages, removed in self._forms(conversation):
            try:
                text, marked = self.template.render_marked(messages, conversation.tools)
                require_texts(text, messages, conversation.tools)
                written = self._written_places(text, messages, conversation.tools)
            except TemplateProblem as problem:
                first = first or problem
                continue
            learned = [number - removed for number in conversation.learned()] if all_turns else []
            wanted = sorted({len(messages) - 1, *learned})
            places = self._places(text, marked, messages, conversation.tools, wanted)
            return Shown(text, written, messages, places, removed)
        raise first

    def _forms(self, conversation: Conversation) -> Iterator[tuple[list[Message], int]]:
        """The messages in the forms that templates want, the likeliest first, and how many are removed at
        the beginning.
        """
        yield from ((messages, 0) for messages in self._in_forms(conversation.messages))
        merged = _with_system_in_question(conversation.messages)
        if merged is not None and self._asks_alike(conversation.messages[:2], merged[:1], conversation.tools):
            yield from ((messages, 1) for messages in self._in_forms(merged))

    def _asks_alike(self, first: Sequence[Message], second: Sequence[Message], tools: list | None) -> bool:
        try:
            one, other = (
                self.template.render(next(self._in_forms(messages)), tools, prompting=True)
                for messages in (first, second)
            )
        except TemplateProblem:
            return False
        return one == other

    def _in_forms(self, given: Sequence[Message]) -> Iterator[list[Message]]:
        """The messages with contents and calls as templates want them, the likeliest first."""
        if self.template.wants_parts:
            messages = [_with(each, content=_as_parts(each.get("content"))) for each in given]
        elif any(isinstance(each.get("content"), list) for each in given) and not self.template.takes_parts:
            messages = [_with(each, content=text_of(each) if "content" in each else None) for each in given]
        else:
            messages = list(given)
        yield messages
        if any("tool_calls" in message for message in messages):
            empty = [{"content": "", **message} for message in messages]
            yield empty
            yield [_with_written_arguments(message) for message in messages]
            yield [_with_written_arguments(message) for message in empty]
        elif not self.template.wants_parts:  # it may want them of such a conversation only
            yield [_with(each, content=_as_parts(each.get("content"))) for each in messages]

    def _places(
        self, text: str, marked: list[Place], messages: list[Message], tools: list | None, wanted: list[int]
    ) -> dict[int, list[Place]]:
        """Of the wanted messages the places of their turns."""

        def render(some: list[Message], prompting: bool) -> str:
            return self.template.render(some, tools, prompting)

        found = marked_places(text, marked, render, messages) if marked else {}
        if found:
            return {index: self._with_end(text, found[index]) for index in wanted}
        turns = Turns(render, text, messages, self._named)
        return {index: [turns.place(index)] for index in wanted}

    def _named(self, text: str) -> list[Place]:
        return [match.span() for match in self._names.finditer(text)]

    def _with_end(self, text: str, places: list[Place]) -> list[Place]:
        """With the token that ends the turn, where the template does not mark it as generated."""
        start, end = places[-1]
        inside, behind = self._named(text[start:end]), self._named(text[end:])
        has_end = inside and not text[start + inside[-1][1] : end].strip()
        if has_end:  # a token such as </tool_call> ends no turn
            name = text[start + inside[-1][0] : start + inside[-1][1]]
            has_end = self.tokenizer.convert_tokens_to_ids(name) in self._finder.ending
        if not has_end and behind and not text[end : end + behind[0][0]].strip():
            end += behind[0][1]
        return [*places[:-1], (start, end)]

    def _written_places(
        self, text: str, messages: list[Message], tools: list | None, prompting: bool = False
    ) -> list[Place]:
        """The places of the text that are not special tokens which the data names."""
        marked = self._mark([messages, tools])
        if marked == [messages, tools]:
            return [(0, len(text))]
        shown, written = _outside_marks(self.template.render(*marked, prompting=prompting))
        if shown != text:
            raise TemplateProblem(
                "acts on a special token that is written in the data; remove it there, or set "
                "data.special_tokens to true"
            )
        return written

    def _mark(self, value: Any, special: Sequence[str] = ()) -> Any:
        """The same with marks around the names of special tokens in all texts, but for those around the
        thoughts of the assistant: the model writes them as tokens. special: names that get no marks.
        """
        if isinstance(value, dict):
            special = THOUGHT_MARKERS if value.get("role") == "assistant" else special
            return {key: each if key == "role" else self._mark(each, special) for key, each in value.items()}
        if isinstance(value, list):
            return [self._mark(each, special) for each in value]
        if not isinstance(value, str):
            return value
        for start, end in reversed(self.encoder.names_in(value)):
            if value[start:end] not in special:
                value = f"{value[:start]}{OPEN}{value[start:end]}{CLOSE}{value[end:]}"
        return value


def _with(message: Message, **changes: Any) -> Message:
    """The message with other values; None removes a key."""
    return {key: value for key, value in {**message, **changes}.items() if value is not None}


def _as_parts(content: Any) -> list | None:
    return parts_of(content) if isinstance(content, str) else content


def _with_system_in_question(messages: Sequence[Message]) -> list[Message] | None:
    """With the system's text in the first question, for templates such as Mistral's, which show it only in a
    prompt. None if the conversation does not begin with the two.
    """
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    system, question, *others = messages
    return [{**question, "content": f"{text_of(system)}\n\n{text_of(question)}"}, *others]


def _with_written_arguments(message: Message) -> Message:
    """With arguments of calls as JSON in a text, which some templates join to others."""
    calls = []
    for call in message.get("tool_calls", ()):
        inner = call.get("function", call)
        arguments = inner.get("arguments")
        if not isinstance(arguments, str):
            inner = {**inner, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return _with(message, tool_calls=calls or None)


def _outside_marks(marked: str) -> tuple[str, list[Place]]:
    """The text without marks, and the places outside them. A mark may be alone where the template has cut a
    text.
    """
    parts, written, length, inside = [], [], 0, False
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece in (OPEN, CLOSE):
            inside = piece == OPEN
            continue
        parts.append(piece)
        if not inside:
            written.append((length, length + len(piece)))
        length += len(piece)
    return "".join(parts), written


def ends_of_turn(tokenizer, conventions: Conventions = NEWEST) -> frozenset[int]:
    """The tokens with which the chat template ends a turn of the assistant, asked of a short conversation;
    none if the template ends no turn, or refuses this one. Raises UserError as `Chat` does.
    """
    asked, answered = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    try:
        (found,) = Chat(tokenizer, conventions).encode([Conversation((asked, answered), (False, True))])
    except Unreadable:
        return frozenset()
    return found.turns[-1].ends
