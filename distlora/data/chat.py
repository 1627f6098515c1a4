"""Conversations as tokens: the whole text that the chat template makes, and the assistant's turns in it.

A turn goes from where the prompt for the assistant ends to the token that ends the turn; what the template
writes behind that, such as a line break, is not learned, because generation has stopped there. To a last turn
that the template does not end, the end of sequence is added.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distlora.data.chat_check import has_thoughts, require_texts, without_thoughts
from distlora.data.chat_template import (
    ChatTemplate,
    Conversation,
    Message,
    TemplateProblem,
    parts_of,
    text_of,
)
from distlora.data.chat_turns import Turns, marked_places
from distlora.data.conventions import NEWEST, Conventions
from distlora.data.seams import end_of_text, require_chat_template
from distlora.data.special_tokens import CLOSE, OPEN, Place, TextEncoder, Tokenised, Unreadable, added_tokens


class Turn(NamedTuple):
    """One turn of the assistant. ranges: of its tokens, (first, behind the last). ends: the tokens that end
    it; none if only the end of sequence that was added does.
    """

    message: int
    ranges: list[tuple[int, int]]
    ends: frozenset[int]

    @property
    def start(self) -> int:
        return self.ranges[0][0]

    @property
    def stop(self) -> int:
        return self.ranges[-1][1]


@dataclass(frozen=True)
class ChatTokens:
    """text: as the template renders it. asked: the text before the last turn. turns: the last one, and all
    others that were wanted. keeps_thoughts: whether the last turn has the thoughts that the data has in it.
    """

    ids: list[int]
    text: str
    asked: str
    turns: list[Turn]
    keeps_thoughts: bool = True

    @property
    def answer(self) -> list[int]:
        """The tokens of the last turn without its end."""
        last = self.turns[-1]
        return self.ids[last.start : last.stop - 1]


@dataclass(frozen=True)
class _Shown:
    """own: the places that the template has written. turns: by message the places of its turn."""

    text: str
    own: list[Place]
    messages: list[Message]
    turns: dict[int, list[Place]]


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
        added = added_tokens(tokenizer)
        self._added = {*added, self.eos}
        self._special = {number for number, token in added.items() if token.special} | {self.eos}
        names = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, filter(None, names))) or "(?!)")
        self._blank: dict[int, bool] = {}

    def encode(self, talks: Sequence[Conversation], all_turns: bool = True) -> list[ChatTokens]:
        """all_turns: whether more than the last turn is wanted."""
        shown = [self._guarded(index, self._show, talk, all_turns) for index, talk in enumerate(talks)]
        texts, own = [each.text for each in shown], [each.own for each in shown]
        return [self._found(*each) for each in zip(shown, self.encoder.encode(texts, own, places=True))]

    def before_answer(self, talk: Conversation) -> tuple[str, list[int]]:
        """The text that asks for an answer to a conversation, and its tokens."""

        def show():
            messages = next(self._forms(talk.messages))
            text = self.template.render(messages, talk.tools, prompting=True)
            require_texts(text, messages, talk.tools)
            return text, self._own(text, messages, talk.tools, prompting=True)

        text, own = self._guarded(0, show)
        return text, self.encoder.encode([text], [own])[0].ids

    def _guarded(self, index: int, show: Callable, *arguments) -> Any:
        try:
            return show(*arguments)
        except TemplateProblem as problem:
            raise Unreadable(index, f"does not fit the chat template, which {problem}") from None

    # ------------------------------------------------------------------ texts

    def _show(self, talk: Conversation, all_turns: bool) -> _Shown:
        first: TemplateProblem | None = None
        for messages in self._forms(talk.messages):
            try:
                text, marked = self.template.render_marked(messages, talk.tools)
                require_texts(text, messages, talk.tools)
                own = self._own(text, messages, talk.tools)
            except TemplateProblem as problem:
                first = first or problem
                continue
            wanted = {len(messages) - 1, *(talk.learned() if all_turns else ())}
            return _Shown(
                text, own, messages, self._places(text, marked, messages, talk.tools, sorted(wanted))
            )
        raise first

    def _forms(self, given: Sequence[Message]) -> Iterator[list[Message]]:
        """The messages in the forms that templates want, the likeliest first."""
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
        if marked:
            found = marked_places(marked, lambda some: self.template.render_marked(some, tools), messages)
            if found:
                return {index: self._with_end(text, found[index]) for index in wanted}
        turns = Turns(
            lambda some, prompting: self.template.render(some, tools, prompting), text, messages, self._named
        )
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
            has_end = self.tokenizer.convert_tokens_to_ids(name) in self._special
        if not has_end and behind and not text[end : end + behind[0][0]].strip():
            end += behind[0][1]
        return [*places[:-1], (start, end)]

    def _own(
        self, text: str, messages: list[Message], tools: list | None, prompting: bool = False
    ) -> list[Place]:
        """The places of the text that are not special tokens which the data names."""
        marked = self._mark([messages, tools])
        if marked == [messages, tools]:
            return [(0, len(text))]
        shown, own = _outside_marks(self.template.render(*marked, prompting=prompting))
        if shown != text:
            raise TemplateProblem(
                "acts on a special token that is written in the data; remove it there, or set "
                "data.special_tokens to true"
            )
        return own

    def _mark(self, value: Any) -> Any:
        """The same with marks around the names of special tokens in all texts."""
        if isinstance(value, dict):
            return {key: each if key == "role" else self._mark(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._mark(each) for each in value]
        if not isinstance(value, str):
            return value
        for start, end in reversed(self.encoder.names_in(value)):
            value = f"{value[:start]}{OPEN}{value[start:end]}{CLOSE}{value[end:]}"
        return value

    # ------------------------------------------------------------------ tokens

    def _found(self, shown: _Shown, tokens: Tokenised) -> ChatTokens:
        ids, last = tokens.ids, len(shown.messages) - 1
        turns = []
        for index, places in sorted(shown.turns.items()):
            ranges = [self._range(shown, tokens, place) for place in places]
            ranges = [(first, stop) for first, stop in ranges if first < stop]
            if ranges:
                turns.append(self._ended(shown.messages[index], index, ranges, shown, tokens))
        if not turns or turns[-1].message != last:
            turns.append(Turn(last, [(len(ids), len(ids))], frozenset()))
        if not turns[-1].ends:
            *before, (first, _) = turns[-1].ranges
            ids = [*ids, self.eos]
            turns[-1] = Turn(last, [*before, (first, len(ids))], frozenset())
        asked = shown.text[: shown.turns[last][0][0]]
        return ChatTokens(ids, shown.text, asked, turns, has_thoughts(shown.text, shown.messages[last]))

    def _range(self, shown: _Shown, tokens: Tokenised, place: Place) -> tuple[int, int]:
        """The tokens of a place. One that begins before it and ends in it belongs to it."""
        if tokens.places is None:
            return self._count(shown, tokens.ids, place[0]), self._count(shown, tokens.ids, place[1])
        start = bisect_right(tokens.places, place[0], key=lambda each: each[1])
        return start, max(start, bisect_left(tokens.places, place[1], key=lambda each: each[0]))

    def _count(self, shown: _Shown, ids: list[int], position: int) -> int:
        """How many tokens stand before a position, for a tokenizer that does not tell where they stand."""
        before = self.encoder.encode([shown.text[:position]], [shown.own])[0].ids
        return next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))

    def _ended(
        self, message: Message, index: int, ranges: list[tuple[int, int]], shown: _Shown, tokens: Tokenised
    ) -> Turn:
        """The turn up to the token that ends it, if there is one."""
        first, end = ranges[-1]
        while end > first and not self._is_end(tokens.ids[end - 1]) and self._is_blank(tokens.ids[end - 1]):
            end -= 1
        begins = self._first_behind_content(message, shown.turns[index][-1], shown, tokens, first, end)
        if begins >= end or not self._is_end(tokens.ids[end - 1]):
            return Turn(index, ranges, frozenset())
        ends = {tokens.ids[end - 1]}
        if "tool_calls" not in message:
            ends |= self._special & set(tokens.ids[begins:end])
        return Turn(index, [*ranges[:-1], (first, end)], frozenset(ends))

    def _first_behind_content(
        self, message: Message, place: Place, shown: _Shown, tokens: Tokenised, first: int, end: int
    ) -> int:
        """The first token that stands behind the content of a turn, which goes from first to end."""
        content = without_thoughts(text_of(message)).strip()
        if tokens.places is None:
            token = self.tokenizer.convert_ids_to_tokens(tokens.ids[end - 1])
            return end if content.endswith(token) else end - 1
        at = shown.text.find(content, *place)
        behind = place[0] if at < 0 else at + len(content)
        return next((i for i in range(first, end) if tokens.places[i][0] >= behind), end)

    def _is_end(self, token: int) -> bool:
        return token in self._added

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]


def _with(message: Message, **changes: Any) -> Message:
    """The message with other values; None removes a key."""
    return {key: value for key, value in {**message, **changes}.items() if value is not None}


def _as_parts(content: Any) -> list | None:
    return parts_of(content) if isinstance(content, str) else content


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
    parts, own, length, inside = [], [], 0, False
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece in (OPEN, CLOSE):
            inside = piece == OPEN
            continue
        parts.append(piece)
        if not inside:
            own.append((length, length + len(piece)))
        length += len(piece)
    return "".join(parts), own


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
