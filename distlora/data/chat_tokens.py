"""The assistant's turns of a conversation as tokens.

A turn goes to the token that ends it; what the template writes behind that, such as a line break, is not
learned, because generation has stopped there. To a last turn that the template does not end, the end of
sequence is added.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from distlora.data.chat_check import has_thoughts, without_thoughts
from distlora.data.chat_template import Message, text_of
from distlora.data.special_tokens import Place, TextEncoder, Tokenised, added_tokens


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
class Shown:
    """A conversation as the template shows it.

    own: the places that the template has written. turns: by message the places of its turn."""

    text: str
    own: list[Place]
    messages: list[Message]
    turns: dict[int, list[Place]]


class TurnFinder:
    """Finds the tokens of the turns. eos: the token that is added to a turn without an end."""

    def __init__(self, tokenizer, encoder: TextEncoder, eos: int):
        self.tokenizer, self.encoder, self.eos = tokenizer, encoder, eos
        added = added_tokens(tokenizer)
        self._added = {*added, eos}
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
        before = self.encoder.encode([shown.text[:position]], [shown.own])[0].ids
        return next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))

    def _ended(
        self, message: Message, index: int, ranges: list[tuple[int, int]], shown: Shown, tokens: Tokenised
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
            ends |= self.special & set(tokens.ids[begins:end])
        return Turn(index, [*ranges[:-1], (first, end)], frozenset(ends))

    def _first_behind_content(
        self, message: Message, place: Place, shown: Shown, tokens: Tokenised, first: int, end: int
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
