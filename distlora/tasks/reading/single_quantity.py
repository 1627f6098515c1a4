"""One number with all that belongs to it: `2.5 million dollars per day`, `7 and a half hours`, `50 %`."""

import re
from dataclasses import dataclass
from fractions import Fraction

from distlora.tasks.reading.number_words import MAGNITUDES, ONE_PART, PARTS, leading_number
from distlora.tasks.reading.quantity_tokens import SYMBOLS, Cursor
from distlora.tasks.reading.units import parts_of, unit_name

#: Letters directly behind a number that stand for an unknown one, and not for a unit.
_UNKNOWN_BEHIND = frozenset("xyznabcijopqreu")
#: Words that are no part of a unit.
_CONNECTORS = frozenset(
    "and or to more less fewer greater times of out than per plus minus is are was equals equal divided over "
    "by squared cubed mod point percent but so because since which for through".split()
)
_GROUPED_BY_POINTS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}")
_LONGEST, _WORDS_OF_A_UNIT = 300, 4


class Unreadable(Exception):
    """The number is part of something else than a complete quantity: `5x`, `7 or 8`, `3 more than x`."""


@dataclass
class Single:
    """A number with its unit. bare: nothing was computed. others: what else it may mean."""

    value: Fraction
    unit: str = ""
    percent: bool = False
    bare: bool = True
    others: frozenset[Fraction] = frozenset()

    @property
    def number(self) -> Fraction:
        """What is computed with: of `50 %` that is 0.5."""
        return self.value / 100 if self.percent else self.value

    @property
    def values(self) -> frozenset[Fraction]:
        """All that it may mean by itself: of `50 %` that is 50 and 0.5."""
        return self.others | {self.value, self.number}


class SingleReader(Cursor):
    """Reads single quantities. Raises Unreadable."""

    def single(self) -> Single:
        """The quantity at the place, which then is behind it."""
        unit = "dollar" if self.at(-1).kind == "currency" else ""
        return self.completed(Single(self._plain_number(), unit))

    def completed(self, single: Single) -> Single:
        """The quantity with all that follows and belongs to it."""
        self._magnitudes(single)
        self._half_more(single)
        self._magnitudes(single)
        self._check_no_unknown()
        self._percent(single)
        self._parts(single)
        self._unit(single)
        self._half_more(single)
        self._smaller_unit(single)
        return single

    # ------------------------------------------------------------------ the number itself

    def _plain_number(self) -> Fraction:
        if self.at().kind == "number":
            return self._digits()
        found = leading_number(self.words())
        if found is None:
            raise Unreadable
        self.place += found[1]
        return found[0]

    def _digits(self) -> Fraction:
        text, after, behind = self.text(), self.at(1), self.at(2)
        goes_on = after.glued and after.text in (",", ".", ":") and behind.glued
        if len(text) > _LONGEST or goes_on and behind.kind in ("number", "command") or after.text == "_":
            raise Unreadable
        self.place += 1
        if _GROUPED_BY_POINTS.fullmatch(text):
            text = text.replace(".", "")
        try:
            value = Fraction(re.sub(r"[,' _]", "", text))
        except ValueError as error:
            raise Unreadable from error
        mixed = value.denominator == 1 and not self.at().glued and self._proper_fraction()
        return value + mixed if mixed else value

    def _proper_fraction(self, ahead: int = 0) -> Fraction | None:
        """The fraction below 1 that stands there in digits, which is taken; else None."""
        over, line, under = (self.text(ahead + place) for place in range(3))
        if line != "/" or not (over.isdecimal() and under.isdecimal()) or len(over + under) > 10:
            return None
        if int(over) >= int(under):
            return None
        self.place += ahead + 3
        return Fraction(int(over), int(under))

    # ------------------------------------------------------------------ what multiplies it or adds to it

    def _magnitudes(self, single: Single) -> None:
        """`7 million`, `7k`, `$7M`."""
        while True:
            ahead = 1 if self.at().kind == "currency" else 0
            word, glued = self.text(ahead), self.at(ahead).glued
            scale = MAGNITUDES.get(word)
            if glued and single.unit == "dollar":
                scale = {"m": 10**6, "b": 10**9}.get(word, scale)
            if scale is None or word == "k" and not glued:
                return
            self.place += ahead + 1
            single.value *= scale
            self._smaller_magnitude(single, scale)

    def _smaller_magnitude(self, single: Single, scale: int) -> None:
        """`2 thousand 5 hundred`, `7 hundred and 50`."""
        joined = 1 if self.text() == "and" else 0
        digits, after = self.text(joined), self.text(joined + 1)
        if not digits.isdecimal() or len(digits) > 6 or after in ("/", "*", "%"):
            return
        times = MAGNITUDES.get(after, 1)
        if int(digits) * times < scale and (times > 1 or scale <= 1000):
            single.value += int(digits) * times
            self.place += joined + (2 if times > 1 else 1)

    def _half_more(self, single: Single) -> None:
        """`7 and a half`, `7 and 1/2`, `a million and a half`."""
        if self.text() != "and" or single.value.denominator != 1 and not single.unit:
            return
        fraction = self._proper_fraction(1)
        if fraction:
            single.value += fraction
            return
        found = leading_number(self.words(1))
        if found and 0 < found[0] < 1:
            rounded = self.text(-1) in MAGNITUDES and single.value in (10**3, 10**6, 10**9)
            single.value += found[0] * (single.value if rounded else 1)
            self.place += 1 + found[1]

    def _check_no_unknown(self) -> None:
        token = self.at()
        if token.kind == "command" or token.text in SYMBOLS:
            raise Unreadable
        if token.text in _UNKNOWN_BEHIND and (token.glued or token.text in ("x", "y", "z")):
            raise Unreadable
        if token.kind == "word" and token.glued and set(token.text) <= set("abxyz"):
            raise Unreadable

    def _percent(self, single: Single) -> None:
        words = 2 if (self.text(), self.text(1)) == ("per", "cent") else 1
        if words == 2 or self.text() in ("%", "percent"):
            self.place += words
            single.percent = True

    def _parts(self, single: Single) -> None:
        """`2 thirds`, `3 quarters`; the latter may be coins as well."""
        word = self.text()
        part = ONE_PART.get(word) if single.value == 1 and word != "half" else PARTS.get(word)
        if part is None or self.at(-1).kind != "number":
            return
        if word.startswith("quarter"):
            single.others |= {single.value}
        single.value *= part
        self.place += 1

    # ------------------------------------------------------------------ its unit

    def _unit(self, single: Single) -> None:
        """Passes by `apples`, `km/h`, `square feet`, `m^2`, `dollars per day`, `€`."""
        words = 0
        while self._is_of_unit(words):
            single.unit = single.unit if words else unit_name(self.text())
            self.place, words = self.place + 1, words + 1
            self._power_of_unit()
            while self.text() in ("/", "*") and self.at(1).kind == "word" and self.at(1).glued:
                self.place += 2
                self._power_of_unit()
        if self.at().kind == "currency":
            single.unit = "dollar"
            self.place += 1
        if self.text() == "¢":
            single.unit = "cent"
            self.place += 1
        if single.unit == "cent":
            single.others |= {single.value / 100}
        a_unit_below = self.at(1).kind == "word" and len(self.text(1)) > 1 and not self.number_follows(1)
        if self.text() in ("/", "per") and a_unit_below:
            self.place += 2

    def _is_of_unit(self, words: int) -> bool:
        word = self.text()
        if self.at().kind != "word" or word in _CONNECTORS or words == _WORDS_OF_A_UNIT:
            return False
        if word in ("x", "y", "z"):
            raise Unreadable
        a_number = words and leading_number(self.words()) is not None
        return not a_number and not (len(word) == 1 and self.text(1) == "=")

    def _power_of_unit(self) -> None:
        if self.text() == "^":
            self.place += 2

    def _smaller_unit(self, single: Single) -> None:
        """`5 dollars and 50 cents`, `2 hours 15 minutes`: in the larger unit or in the smaller one."""
        start = self.place
        if self.text() in ("and", ","):
            self.place += 1
        while self.at().kind == "currency":
            self.place += 1
        count = None
        if single.unit and self.number_follows() and self.text() not in ("(", "-", "+"):
            smaller = self._plain_number()
            count = parts_of(single.unit, unit_name(self.text()))
        if not count:
            self.place = start
            return
        self.place += 1
        single.others |= {single.value * count + smaller}
        single.value += smaller / count
        single.bare = False
