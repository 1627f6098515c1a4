"""Tokenising texts in which the names of special tokens are text.

`</s>` in a row of the data is four characters, and no end of sequence: a text about HTML would end in its
middle otherwise. Only what stands in a template is a special token. The tokens of a text that names none are
those that the tokenizer makes by itself.
"""

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from distlora.sentences import first_line

#: Where characters stand in a text: from the first to behind the last.
Place = tuple[int, int]

#: Noncharacters, which Unicode keeps for the use within a program.
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"


class Unreadable(Exception):
    """A text or a conversation that cannot be made into tokens.

    index: which of those that were given. reason: the end of a sentence that begins "row 3 of x.json".
    """

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index, self.reason = index, reason


class Tokenised(NamedTuple):
    """places: where each token stands in the text; None if the tokenizer does not tell."""

    ids: list[int]
    places: list[Place] | None


class TextEncoder:
    """A tokenizer that adds nothing to a text.

    plain: whether names of special tokens are text, but for the places that are said to be a template's.
    """

    def __init__(self, tokenizer, plain: bool = True):
        self.tokenizer, self.plain = tokenizer, plain
        self._names = special_names(tokenizer) if plain else {}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def names_in(self, text: str) -> list[Place]:
        """Where special tokens are named in a text."""
        return [match.span() for match in self._pattern.finditer(text)]

    def encode(
        self, texts: Sequence[str], own: Sequence[Sequence[Place]] | None = None, places: bool = False
    ) -> list[Tokenised]:
        """own: of each text the places where special tokens are special; None: nowhere. places: whether
        they are wanted. Raises Unreadable.
        """
        found: dict[int, Tokenised] = {}
        plain: list[int] = []
        for index, text in enumerate(texts):
            named = self.names_in(text)
            inside = own[index] if own else ()
            if all(_within(place, inside) for place in named):
                plain.append(index)
            else:
                kept = [place for place in named if _within(place, inside)]
                written = [place for place in named if not _within(place, inside)]
                found[index] = self._as_text(index, text, kept, written, places)
        for index, ids in zip(plain, self._run(self.tokenizer, texts, plain, places)):
            found[index] = ids
        return [found[index] for index in range(len(texts))]

    # ------------------------------------------------------------------ texts that name special tokens

    def _as_text(
        self, index: int, text: str, kept: list[Place], written: list[Place], places: bool
    ) -> Tokenised:
        ways = [self._broken] if kept and not self.tokenizer.is_fast else [self._split, self._broken]
        for way in ways:
            tokens = way(index, text, kept, written, places)
            if self._has_only(tokens.ids, text, kept):
                return tokens
        names = ", ".join(dict.fromkeys(text[start:end] for start, end in written))
        raise Unreadable(
            index,
            f"has {names} in its text, of which the tokenizer makes a special token; "
            "remove it, or set data.special_tokens to true",
        )

    def _split(self, index, text, kept, written, places) -> Tokenised:
        """All names are text; in the place of those that are kept stand other tokens."""
        marked, moves = text, _Moves()
        if kept:
            marked, moves = _replaced(text, [(place, self._stand_in(text[slice(*place)])) for place in kept])
        tokenizer = self.twin if kept else self.tokenizer
        (tokens,) = self._run(tokenizer, [marked], [0], places, row=index, split_special_tokens=True)
        ids = [self._standing_for.get(token, token) for token in tokens.ids] if kept else tokens.ids
        return Tokenised(ids, moves.back(tokens.places))

    def _broken(self, index, text, kept, written, places) -> Tokenised:
        """Names that are text are broken in two, by a token that is taken away."""
        marked, moves = _with_breaks(text, written)
        (tokens,) = self._run(self.twin, [marked], [0], places, row=index)
        left = [position for position, token in enumerate(tokens.ids) if token != self.break_id]
        where = moves.back(tokens.places)
        return Tokenised([tokens.ids[i] for i in left], where and [where[i] for i in left])

    def broken(self, text: str) -> str:
        """A text in which `twin` finds no special token; it has the token `break_id` in each name."""
        return _with_breaks(text, self.names_in(text))[0]

    @cached_property
    def break_id(self) -> int:
        return self.twin.convert_tokens_to_ids(BREAK)

    def count_special(self, ids: Sequence[int]) -> int:
        """How many tokens are special. The unknown token is what any text may have."""
        special = set(self._names.values()) - {self.tokenizer.unk_token_id}
        return sum(token in special for token in ids)

    def _has_only(self, ids: list[int], text: str, kept: list[Place]) -> bool:
        """Whether the special tokens are those that are kept. The unknown token is what a text may have."""
        special = set(self._names.values()) - {self.tokenizer.unk_token_id}
        wanted = [self._names[text[start:end]] for start, end in kept]
        return [token for token in ids if token in special] == [id_ for id_ in wanted if id_ in special]

    @cached_property
    def twin(self):
        """The tokenizer with a stand-in for each special token, which is not split, and a token that breaks
        a name."""
        from tokenizers import AddedToken

        twin = copy.deepcopy(self.tokenizer)
        known = {token.content: token for token in twin.added_tokens_decoder.values()}
        added = [AddedToken(BREAK, normalized=False, special=False)]
        for name in self._names:
            flags = {key: getattr(known.get(name), key, False) for key in ("lstrip", "rstrip", "single_word")}
            added.append(AddedToken(self._stand_in(name), normalized=False, special=False, **flags))
        twin.add_tokens(added)
        return twin

    @cached_property
    def _standing_for(self) -> dict[int, int]:
        return {
            self.twin.convert_tokens_to_ids(self._stand_in(name)): number
            for name, number in self._names.items()
        }

    def _stand_in(self, name: str) -> str:
        return f"{OPEN}{self._names[name]}{CLOSE}"

    # ------------------------------------------------------------------ the tokenizer

    def _run(
        self, tokenizer, texts: Sequence[str], chosen: list[int], places: bool, row: int | None = None, **more
    ) -> list[Tokenised]:
        """row: which text an error means; None: the chosen one that it is of."""
        if not chosen:
            return []
        if places and tokenizer.is_fast:
            more["return_offsets_mapping"] = True
        # Without verbose=False, transformers would warn of texts beyond the model's length. They are cut
        # later.
        options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False, **more)
        whole = call(
            tokenizer, [[texts[index] for index in chosen]], options, chosen if row is None else [row]
        )
        where = whole.get("offset_mapping") or [None] * len(chosen)
        return [Tokenised(ids, place) for ids, place in zip(whole["input_ids"], where)]


def call(tokenizer, columns: Sequence[list[str]], options: dict[str, Any], numbers: Sequence[int]):
    """What a tokenizer says to a column of texts, or to two with pairs. numbers: of the texts, for errors.

    Raises Unreadable with the number of the first text that the tokenizer raises for, whatever it raises.
    """
    whole, error = _attempt(tokenizer, columns, options)
    if error is None and all(None not in ids for ids in whole["input_ids"]):
        return whole
    for number, *texts in zip(numbers, *columns):
        alone, problem = _attempt(tokenizer, [[text] for text in texts], options)
        if problem is None and None in alone["input_ids"][0]:
            problem = ValueError("a token without a number")
        if problem is not None:
            raise Unreadable(number, f"cannot be read by the tokenizer ({first_line(problem)}); correct it")
    raise Unreadable(numbers[0], f"cannot be read by the tokenizer ({first_line(error)}); correct it")


def _attempt(tokenizer, columns, options) -> tuple[Any, BaseException | None]:
    try:
        return tokenizer(*columns, **options), None
    except Exception as error:  # code of others: it may raise anything
        return None, error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust's panics become; no Exception
            raise
        return None, error


def special_names(tokenizer) -> dict[str, int]:
    """The special tokens by name. A single character is none: it would be every text's own."""
    names = {token.content: number for number, token in added_tokens(tokenizer).items() if token.special}
    for token in map(str, tokenizer.all_special_tokens if names else ()):
        names.setdefault(token, tokenizer.convert_tokens_to_ids(token))
    return {name: number for name, number in names.items() if len(name) > 1 and number is not None}


def added_tokens(tokenizer) -> dict:
    """The tokens that are found in a text before it is split, by number."""
    try:
        return tokenizer.added_tokens_decoder
    except NotImplementedError:  # mistral-common's, which finds none in a text
        return {}


def _within(place: Place, others: Sequence[Place]) -> bool:
    return any(start <= place[0] and place[1] <= end for start, end in others)


class _Moves:
    """Where the characters of a changed text stood before: pieces (start, end, start before, end before)."""

    def __init__(self):
        self.pieces: list[tuple[int, int, int, int]] = []

    def back(self, places: list[Place] | None) -> list[Place] | None:
        if places is None or not self.pieces:
            return places
        return [(self._before(start, 2), self._before(end, 3)) for start, end in places]

    def _before(self, position: int, side: int) -> int:
        moved = position
        for piece in self.pieces:
            start, end, start_before, end_before = piece
            if position <= start:
                break
            if position < end:
                return piece[side]
            moved = position - end + end_before
        return moved


def _with_breaks(text: str, names: list[Place]) -> tuple[str, _Moves]:
    return _replaced(text, [((start + 1, start + 1), BREAK) for start, _ in names])


def _replaced(text: str, changes: list[tuple[Place, str]]) -> tuple[str, _Moves]:
    """The text with other strings at some places, in their order, and where its characters stood."""
    moves, parts, at, length = _Moves(), [], 0, 0
    for (start, end), string in changes:
        parts += [text[at:start], string]
        length += start - at
        moves.pieces.append((length, length + len(string), start, end))
        length, at = length + len(string), end
    return "".join([*parts, text[at:]]), moves
