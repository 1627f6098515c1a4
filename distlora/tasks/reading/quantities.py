"""Quantities in free text: what number a person reads in `$1,000`, `7 and a half km/h` or `3 + 4 = 7`."""

from fractions import Fraction

from distlora.tasks.reading.number_words import SMALL, leading_number
from distlora.tasks.reading.quantity_tokens import RELATIONS, SYMBOLS, Token, tokens
from distlora.tasks.reading.single_quantity import Single, SingleReader, Unreadable
from distlora.tasks.reading.units import is_abbreviation

Values = frozenset[Fraction]

_DEEPEST, _LARGEST_EXPONENT, _LARGEST_BASE = 30, 64, 10**9
#: Numbers that differ by less are the same to six decimals.
_CLOSE = Fraction(1, 2_000_000)
_COMPARATIVES = ("more", "less", "fewer", "greater")
#: Words directly in front of a number that make another one of it.
_FUNCTIONS = frozenset("twice double triple thrice log ln sin cos tan sqrt".split())
_OF_FUNCTIONS = frozenset("root square cube factorial double log logarithm power".split())
_PERHAPS = frozenset("maybe perhaps possibly even about".split())


def quantity(text: str) -> Values:
    """What the first quantity in a text may mean; empty if there is none, or if it is not complete.

    Of `50%` that is 50 and 0.5, of `5 dollars and 50 cents` 5.5 and 550. A quantity is complete if nothing
    beside it makes another number of it: `7 million` is no 7, and `3 more than x` is no number at all.
    """
    try:
        return _Reader(tokens(text)).first_quantity()
    except (Unreadable, ZeroDivisionError):
        return frozenset()


def is_quantity(text: str) -> bool:
    """Whether a text is one quantity and nothing else, but for an unknown in front: `18 inches`, `x = 5`."""
    try:
        return _Reader(tokens(text)).is_whole()
    except (Unreadable, ZeroDivisionError):
        return False


def names_number(text: str) -> bool:
    """Whether any number stands in a text, in digits, in words, or as an expression in LaTeX."""
    return _Reader(tokens(text)).finds_number()


def equal(some: Values, others: Values) -> bool:
    """Whether two texts may mean the same number, to six decimals."""
    return any(abs(one - other) < _CLOSE for one in some for other in others)


class _Reader(SingleReader):
    """Reads sums and products of single quantities, and what is compared with them."""

    def __init__(self, found: list[Token]):
        super().__init__(found)
        self._depth, self._labelled = 0, False

    def first_quantity(self) -> Values:
        """Of `7 = 3 + 4` and of `3 + 4 = 7` that is 7."""
        if not self._seek():
            return frozenset()
        self._labelled = self.text(-1) == ":"
        return self._compared()

    def is_whole(self) -> bool:
        """Whether nothing stands in front of the first quantity but `x =`, and nothing behind it."""
        if not self._seek():
            return False
        front = [token for token in self.tokens[: self.place] if token.kind != "currency"]
        if front and not (len(front) == 2 and front[0].is_unknown and front[1].text == "="):
            return False
        self._compared()
        return all(token.text in (")", ".", "$") for token in self.tokens[self.place :])

    def finds_number(self) -> bool:
        """Whether a number stands behind the place, which may be part of something else."""
        while (token := self.at()).kind != "end":
            if token.kind in ("number", "command") or token.text in SYMBOLS or self._is_number_in_words():
                return True
            self.place += 1
        return False

    def _compared(self) -> Values:
        """The quantity at the place, with what is equal to it."""
        side = self._sum()
        values = side.values
        while self.text() in ("=", "≈"):
            self.place += 1
            if side.bare and not self.number_follows():
                return values
            before, side = side, self._sum()
            if not before.bare:
                values = side.values
            elif side.bare:
                values |= side.values
        self._check_end(values)
        return values

    # ------------------------------------------------------------------ where it begins

    def _seek(self) -> bool:
        """Goes to the first number, or to the sign or the parenthesis in front; False if there is none."""
        while (token := self.at()).kind != "end":
            if self._is_argument():
                of_unknown = self.at(-1).is_unknown
                self._pass_group()
                if self.text() in ("+", "-", "*", "/", "^") or of_unknown and self.text() == ",":
                    raise Unreadable
            elif token.text in SYMBOLS or token.text in ("∪", "∩") or self._is_first_element():
                raise Unreadable
            elif token.kind == "number" or self._is_number_in_words():
                self._check_front()
                self._take_sign()
                return True
            elif token.text == "(" and self.number_follows(1):
                self._take_sign()
                return True
            else:
                self.place += 1
        return False

    def _is_first_element(self) -> bool:
        """Whether an unknown number or a matrix begins here that has other elements: `a, 3`, `(e, 3)`."""
        if self.text() == "\\begin" and self.text(2).endswith("matrix"):
            return True
        opens = self.text(-1) in ("", "(", "[", "{", ",")
        return opens and self.at().is_unknown and self.text(1) == ","

    def _is_argument(self) -> bool:
        """Whether a group begins here that belongs to a function: `f(3)`, `\\sqrt(3)`."""
        before = self.at(-1)
        if self.text() != "(" or before.text in SMALL:
            return False
        return before.kind == "command" or before.kind == "word" and self.at().glued

    def _pass_group(self) -> None:
        depth = 0
        while self.at().kind != "end":
            depth += {"(": 1, ")": -1}.get(self.text(), 0)
            self.place += 1
            if depth == 0:
                return

    def _is_number_in_words(self) -> bool:
        if self.text() == "one" and (
            self.text(-1) in ("the", "this", "that", "each", "no", "which", "any", "every")
            or self.text(1) in ("of", "who", "that", "which", "with", "where")
        ):
            return False
        return leading_number(self.words()) is not None

    def _check_front(self) -> None:
        before = self.at(-1)
        if before.kind == "command" or before.text in SYMBOLS or before.text in RELATIONS:
            raise Unreadable
        if before.text in _FUNCTIONS or before.text == "of" and self.text(-2) in _OF_FUNCTIONS:
            raise Unreadable
        if before.text == "than" and self.text(-2) in _COMPARATIVES:
            raise Unreadable

    def _take_sign(self) -> None:
        """Steps back onto a sign in front. Unreadable where it is an operator with something before it. A
        dash (`Total - 7`) is neither.
        """
        back = 1
        while self.at(-back).kind == "currency":
            back += 1
        sign, before, number = self.at(-back), self.at(-back - 1), self.at(1 - back)
        if sign.text in ("minus", "negative"):
            self.place -= back
        if sign.text not in ("+", "-", "*", "/", "^"):
            return
        behind_operand = before.kind in ("word", "command") or before.text == ")"
        if behind_operand and (sign.text != "-" or sign.glued or before.is_unknown or before.text == ")"):
            raise Unreadable
        if sign.text == "-" and (not behind_operand or number.glued):
            self.place -= back

    # ------------------------------------------------------------------ arithmetic

    def _sum(self) -> Single:
        left = self._product()
        while (sign := self.text()) in ("+", "-", "–", "plus", "minus"):
            if sign == "–" and self.at().glued and self.at(1).glued and self.number_follows(1):
                raise Unreadable  # a range
            if not self._operand_follows(1):
                break
            self.place += 1
            right = self._product().number
            left = Single(left.number + (right if sign in ("+", "plus") else -right), bare=False)
        return left

    def _product(self) -> Single:
        left = self._power()
        while (sign := self.text()) in ("*", "/", "times", "over", "divided"):
            ahead = 2 if (sign, self.text(1)) == ("divided", "by") else 1
            if not self._operand_follows(ahead):
                break
            self.place += ahead
            right = self._power().number
            left = Single(left.number * right if sign in ("*", "times") else left.number / right, bare=False)
        if self.text() == "(" and self.at().glued:
            raise Unreadable
        return left

    def _operand_follows(self, ahead: int) -> bool:
        """Whether an operator has a number behind it. Unreadable if it has an unknown there."""
        if self.number_follows(ahead):
            return True
        per_unit = self.text(ahead - 1) == "/" and is_abbreviation(self.text(ahead))
        if not per_unit and self.at(ahead).is_unknown and self.unknown_follows(ahead):
            raise Unreadable
        return False

    def _power(self) -> Single:
        base = self._signed()
        if self.text() not in ("^", "squared", "cubed"):
            return base
        word = self.text()
        self.place += 1
        exponent = self._signed().number if word == "^" else Fraction(2 if word == "squared" else 3)
        small = abs(exponent) <= _LARGEST_EXPONENT and abs(base.value) <= _LARGEST_BASE
        if exponent.denominator != 1 or not small:
            raise Unreadable
        sign = -1 if base.value < 0 else 1  # -2^2 is -(2^2)
        return Single(sign * abs(base.number) ** int(exponent), bare=False)

    def _signed(self) -> Single:
        negative = False
        while self.text() in ("-", "+", "–", "minus", "negative", "plus") or self.at().kind == "currency":
            negative ^= self.text() in ("-", "–", "minus", "negative")
            self.place += 1
        single = self._group() if self.text() == "(" else self.single()
        if negative:
            single.value, single.others = -single.value, frozenset(-value for value in single.others)
        self._relation(single)
        return single

    def _group(self) -> Single:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Unreadable
        self.place += 1
        inside = self._sum()
        if self.text() not in (")", ""):
            raise Unreadable
        self.place += 1
        self._depth -= 1
        return self.completed(inside)

    # ------------------------------------------------------------------ in relation to another number

    def _relation(self, single: Single) -> None:
        """`3 more than 4`, `half of 10`, `3 out of 4`. Unreadable in relation to an unknown number."""
        first = self.text()
        if first in _COMPARATIVES:
            self._more_or_less(single, first)
        elif first == "of" and single.unit:
            return  # `3 boxes of 12 pencils`
        elif first == "of" or (first, self.text(1)) == ("out", "of"):
            self._part_of(single, 1 if first == "of" else 2)
        elif first == "mod" or first == "times" and self.unknown_follows(1):
            raise Unreadable

    def _more_or_less(self, single: Single, word: str) -> None:
        than = next((ahead for ahead in (1, 2, 3) if self.text(ahead) == "than"), 0)
        if not than:
            if self.at(1).is_unknown and self.unknown_follows(1):
                raise Unreadable
            return
        if self.unknown_follows(than + 1):
            raise Unreadable
        if than == 1 and self.number_follows(2):
            self.place += 2
            other = self._product().number
            self._become(single, other + single.number * (1 if word in ("more", "greater") else -1))

    def _part_of(self, single: Single, ahead: int) -> None:
        if self.unknown_follows(ahead):
            raise Unreadable
        if self.number_follows(ahead):
            self.place += ahead
            other = self._product().number
            counted = single.value.denominator == 1 and not single.percent
            self._become(single, single.number / other if counted else single.number * other)

    def _become(self, single: Single, value: Fraction) -> None:
        single.value, single.others, single.percent, single.bare = value, frozenset(), False, False

    # ------------------------------------------------------------------ where it ends

    def _check_end(self, values: Values) -> None:
        """Unreadable if a second number stands beside the first: `7 or 8`, `7, 8`, `3:1`, `x = 7, y = 8`."""
        token = self.at()
        if token.kind in ("command", "number") or token.text in SYMBOLS | RELATIONS | {"_"}:
            raise Unreadable
        if (token.text, self.text(1)) == ("\\", "\\") and self.number_follows(2):
            raise Unreadable
        if token.text in (":", "by") and self.number_follows(1):
            raise Unreadable
        if token.text not in (",", ";", "&", "and", "or", "to", "through"):
            return
        if self.at(1).kind == "word" and self.text(2) == "=":
            raise Unreadable
        ahead = 2 if token.text == "," and self.text(1) in ("and", "or") else 1
        ahead += self.text(ahead) in _PERHAPS
        if self._is_last_element(ahead) or self._labelled and self._label_follows(ahead):
            raise Unreadable
        if self.number_follows(ahead):
            self._check_second(values, token.text, ahead)

    def _is_last_element(self, ahead: int) -> bool:
        """Whether an unknown number stands there as the next of several: `3, b`, `3 or \\sqrt(2)`."""
        token, closing = self.at(ahead), ("", ",", ";", ")", "]", "}", "and", "or")
        if token.text in ("-", "+"):
            token, ahead = self.at(ahead + 1), ahead + 1
        symbol = token.kind == "command" or token.text in SYMBOLS
        return symbol or token.is_unknown and self.text(ahead + 1) in closing

    def _label_follows(self, ahead: int) -> bool:
        """Whether another labelled number follows: `Amy: 7, Bob: 8`."""
        words = len(self.words(ahead))
        return self.text(ahead + words) == ":" and self.number_follows(ahead + words + 1)

    def _check_second(self, values: Values, joint: str, ahead: int) -> None:
        self.place += ahead
        second = self._sum()
        lists = ("", ",", "and", "or", ".", ")", "]", "$", ";")
        if joint in (",", ";") and ahead == 1 and (second.unit or self.text() not in lists):
            return  # a clause: `7 apples, 3 red ones`
        if joint == "and" and self.text() in ("of", "are", "is", "were", "was"):
            return
        if not equal(values, second.values):
            raise Unreadable
