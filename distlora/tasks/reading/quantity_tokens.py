"""The words, numbers and signs of a text, and a place among them."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from distlora.tasks.reading.number_words import leading_number
from distlora.tasks.reading.plain_text import plain

_TOKEN = re.compile(
    r"""(?P<number>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)   # 1,000 and 12,34,567
        | \d{1,3}(?:[ ]\d{3})+(?!\d)
        | \d{1,3}(?:['_]\d{3})+(?!\d)
        | \d{1,3}(?:\.\d{3}){2,}(?!\.?\d)
        | \d+)(?:\.\d+)?(?:e[+-]?\d{1,2}(?![\w.]))?
      | (?<![\w.])\.\d+)
    | (?P<word>[^\W\d_]+(?:'[^\W\d_]+)?\w*)
    | (?P<command>\\[a-z]+)
    | (?P<currency>[$€£¥₹₩₽₺₫])
    | (?P<sign>\S)""",
    re.VERBOSE,
)
#: Codes that stand directly in front of a number: `US$7`, `Rs.7`.
_CODES = re.compile(r"\b(?:us|ca|au|usd|eur|gbp|rs|inr|cad|aud|chf|jpy|cny|rmb)\.?(?=[\d$])")
_HYPHENS = re.compile(r"(?<=[a-z])-(?=[a-z])|(?<=\d)-(?=[a-z]{2})|–(?=[a-z])")
_TIMES = re.compile(r"(?<=\d)\s*x\s*(?=[\d$(])")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
#: Signs of numbers that are no fractions.
SYMBOLS = frozenset("√π∞")
#: Signs, currencies and parentheses in front of a number.
_MOST_SIGNS = 16
#: Signs between a quantity and another one, or between sets.
RELATIONS = frozenset("<>≤≥≠±∪∩")


Kind = Literal["number", "word", "command", "currency", "sign", "end"]


@dataclass(frozen=True)
class Token:
    """glued: no space is between it and the token before it."""

    kind: Kind
    text: str
    glued: bool

    @property
    def is_unknown(self) -> bool:
        """Whether it may stand for an unknown or an irrational number: a letter, a command, a root."""
        return self.kind == "command" or self.text in SYMBOLS or self.text in _LETTERS


def tokens(text: str) -> list[Token]:
    """The tokens of what stands behind the last arrow in a text, in lower case."""
    text = plain(text).rpartition("⇒")[2]
    text = _TIMES.sub(" * ", _HYPHENS.sub(" ", _CODES.sub(" ", text)))
    found, end = list[Token](), 0
    for match in _TOKEN.finditer(text):
        found.append(Token(cast(Kind, match.lastgroup), match[0], bool(found) and match.start() == end))
        end = match.end()
    return found


class Cursor:
    """A place among tokens. Ahead 0 is the token at the place, -1 the one before it."""

    def __init__(self, found: list[Token]):
        self.tokens, self.place = found, 0

    def at(self, ahead: int = 0) -> Token:
        place = self.place + ahead
        return self.tokens[place] if 0 <= place < len(self.tokens) else Token("end", "", False)

    def text(self, ahead: int = 0) -> str:
        return self.at(ahead).text

    def words(self, ahead: int = 0) -> list[str]:
        """The next words up to a token of another kind, with whole numbers among them."""
        found: list[str] = []
        for token in self.tokens[self.place + ahead : self.place + ahead + 16]:
            if token.kind != "word" and not (found and token.kind == "number" and token.text.isdecimal()):
                break
            found.append(token.text)
        return found

    def number_follows(self, ahead: int = 0) -> bool:
        """Whether a number begins there, perhaps with a sign, a currency or parentheses in front."""
        last = ahead + _MOST_SIGNS
        while ahead < last and (self.at(ahead).kind == "currency" or self.text(ahead) in ("(", "-", "+")):
            ahead += 1
        return self.at(ahead).kind == "number" or leading_number(self.words(ahead)) is not None

    def unknown_follows(self, ahead: int = 0) -> bool:
        """Whether an unknown number stands there: `x`, `a number`, `twice …`; but no article."""
        text, after = self.text(ahead), self.at(ahead + 1)
        if text in ("twice", "half", "double", "triple", "thrice"):
            return True
        if after.text in ("number", "value", "amount", "unknown"):
            return text in ("a", "the", "some", "another", "this", "that")
        return self.at(ahead).is_unknown and not (text in ("a", "i") and after.kind == "word")
