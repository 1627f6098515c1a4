"""The assistant's turns of a conversation as tokens.

A turn goes to the token that ends it; what the template writes behind that, such as a line break, is not
learned, because generation has stopped there. To a last turn that the template does not end, the end of
sequence is added.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from distlora.data.chat_check import THOUGHT_MARKERS, has_thoughts, without_thoughts
from distlora.data.chat_template import Message, text_of
from distlora.data.special_tokens import Place, TextEncoder, Tokenised, added_tokens

_CLOSING_TAG = re.compile(r"</[\w-]+>")


class Turn(NamedTuple):
    """One turn of the assistant. ranges: of its tokens, (first, behind the last). ends: the tokens that end
    it; none if only the end of sequence that was added does. message: which one of the data it is.
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
class Shown:
    """A conversation as the template shows it.

    written: the places that the template has written. turns: by message the places of its turn. removed: how
    many messages of the data are not among these messages, at the beginning.
    """

    text: str
    written: list[Place]
    messages: list[Message]
    turns: dict[int, list[Place]]
    removed: int = 0


class TurnFinder:
    """Finds the tokens of the turns.

    eos: the token that is added to a turn without an end. ending: the tokens that may end a turn.
    """

    def __init__(self, tokenizer, encoder: TextEncoder, eos: int):
        self.tokenizer, self.encoder, self.eos = tokenizer, encoder, eos
        added = added_tokens(tokenizer)
        self.ending = {number for number, token in added.items() if _may_end(token)} | {eos}
        self.special = {number for number, token in added.items() if token.special} | {eos}
        self._blank: dict[int, bool] = {}

    def find(self, shown: Shown, tokens: Tokenised) -> ChatTokens:
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
        turns = [turn._replace(message=turn.message + shown.removed) for turn in turns]
        asked = shown.text[: shown.turns[last][0][0]]
        return ChatTokens(ids, shown.text, asked, turns, has_thoughts(shown.text, shown.messages[last]))

    def _range(self, shown: Shown, tokens: Tokenised, place: Place) -> tuple[int, int]:
        """The tokens of a place. One that begins before it and ends in it belongs to it."""
        if tokens.places is None:
            return self._count(shown, tokens.ids, place[0]), self._count(shown, tokens.ids, place[1])
        start = bisect_right(tokens.places, place[0], key=lambda each: each[1])
        return start, max(start, bisect_left(tokens.places, place[1], key=lambda each: each[0]))

    def _count(self, shown: Shown, ids: list[int], position: int) -> int:
        """How many tokens stand before a position, for a tokenizer that does not tell where they stand."""
        before = self.encoder.encode([shown.text[:position]], [shown.written])[0].ids
        return next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))

    def _ended(
        self, message: Message, index: int, ranges: list[tuple[int, int]], shown: Shown, tokens: Tokenised
    ) -> Turn:
        """The turn up to the token that ends it, if there is one."""
        *before, (first, end) = ranges
        while end > first and tokens.ids[end - 1] not in self.ending and self._is_blank(tokens.ids[end - 1]):
            end -= 1
        content = without_thoughts(text_of(message)).strip()
        start = shown.turns[index][0][0]
        numbers = [number for part in (*before, (first, end)) for number in range(*part)]
        behind = list(
            takewhile(
                lambda number: not self._ends_content(content, shown.text, start, tokens, number),
                reversed(numbers),
            )
        )
        if end == first or not behind or tokens.ids[end - 1] not in self.ending:
            return Turn(index, ranges, frozenset())
        ends = {tokens.ids[end - 1]}
        if content and "tool_calls" not in message:
            ends |= self._special_run(tokens.ids[number] for number in behind)
        return Turn(index, [*before, (first, end)], frozenset(ends))

    def _ends_content(self, content: str, text: str, start: int, tokens: Tokenised, number: int) -> bool:
        """Whether the content of the turn that begins at start ends with a token."""
        if not content:
            return False
        if tokens.places is None:
            return content.endswith(self.tokenizer.convert_ids_to_tokens(tokens.ids[number]))
        return text.endswith(content, start, tokens.places[number][1])

    def _special_run(self, backwards: Iterable[int]) -> set[int]:
        """The special tokens with which a turn ends; there may be white space between them."""
        run = takewhile(lambda token: token in self.special or self._is_blank(token), backwards)
        return {token for token in run if token in self.special & self.ending}

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]


def _may_end(token) -> bool:
    """Whether an added token may end a turn; one such as </think> or </tool_call> does not."""
    is_tag = not token.special and _CLOSING_TAG.fullmatch(token.content)
    return not is_tag and token.content not in THOUGHT_MARKERS
