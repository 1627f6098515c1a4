"""Numbers in words: from the words of a phrase to the value of the number that it begins with."""

from collections.abc import Sequence
from fractions import Fraction

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SMALL = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
SMALL["fourty"] = 40  # the usual misspelling
#: What a number before it is multiplied by.
MAGNITUDES = {
    "dozen": 12,
    "dozens": 12,
    "hundred": 100,
    "hundreds": 100,
    "thousand": 10**3,
    "thousands": 10**3,
    "k": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "millions": 10**6,
    "mn": 10**6,
    "mil": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "billions": 10**9,
    "bn": 10**9,
    "trillion": 10**12,
    "trillions": 10**12,
    "quadrillion": 10**15,
}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
#: A part of a whole, in the singular and in the plural.
ONE_PART = {word: Fraction(1, value) for value, word in enumerate(_PARTS, 2)} | {
    "quarter": Fraction(1, 4),
    "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
}
PARTS = {("halves" if word == "half" else word + "s"): value for word, value in ONE_PART.items()}


def leading_number(words: Sequence[str]) -> tuple[Fraction, int] | None:
    """The number that the words begin with, and how many of them belong to it; None if they begin with none.

    words: in lower case, without hyphens. "twenty one", "one hundred and five", "a dozen", "two thirds",
    "half a million", "seven point five" are numbers; a word in digits may only follow a magnitude.
    """
    fraction = _leading_part(words)
    if fraction:
        return fraction
    whole = _leading_whole(words)
    if whole is None:
        return None
    value, used = whole
    rest = words[used:]
    if rest[:1] == ["point"]:
        digits = _digits_in_words(rest[1:])
        if digits:
            return value + Fraction(int(digits), 10 ** len(digits)), used + 1 + len(digits)
    if rest and value and (rest[0] in PARTS if value > 1 else rest[0] in ONE_PART):
        return value * (PARTS if value > 1 else ONE_PART)[rest[0]], used + 1
    return Fraction(value), used


def _leading_part(words: Sequence[str]) -> tuple[Fraction, int] | None:
    """ "half", "a third", "half a million"."""
    start = 1 if words[:1] in (["a"], ["an"]) else 0
    word = words[start] if len(words) > start else ""
    if word not in ONE_PART or not (start or word == "half"):
        return None
    value, used = ONE_PART[word], start + 1
    rest = list(words[used : used + 3])
    skipped = 2 if rest[:2] == ["of", "a"] else 1 if rest[:1] in (["a"], ["an"]) else 0
    if skipped and rest[skipped:] and rest[skipped] in MAGNITUDES:
        return value * MAGNITUDES[rest[skipped]], used + skipped + 1
    return value, used


def _leading_whole(words: Sequence[str]) -> tuple[int, int] | None:
    """The sum of groups below a thousand, each times its magnitude, in falling order of these."""
    total, group, used, place = 0, None, 0, 0
    if words[:1] in (["a"], ["an"]):
        if len(words) < 2 or words[1] not in MAGNITUDES:
            return None
        group, place = 1, 1
    room = 10**3  # the next word must be below it: a number goes on with smaller parts only
    while place < len(words):
        word = words[place]
        value = SMALL.get(word)
        if value is None and word.isdecimal() and used and int(word[:7]) < room:
            value = int(word[:7])
        if value is not None and value < room and (value or group is None):
            group = (group or 0) + value
            room = 10 if 20 <= value < 100 and not value % 10 else 0
        elif word in MAGNITUDES and group and (word != "k" or used):
            scale = MAGNITUDES[word]
            if scale == 100:
                group, room = group * 100, 100
            else:
                total, group, room = total + group * scale, None, min(scale, 10**3)
        elif word == "and" and used and words[used - 1] in MAGNITUDES and _goes_on(words[place + 1 :], room):
            place += 1
            continue
        else:
            break
        place += 1
        used = place
    return (total + (group or 0), used) if used else None


def _goes_on(words: Sequence[str], room: int) -> bool:
    """Whether a number smaller than `room` follows."""
    word = words[0] if words else ""
    return word in SMALL and SMALL[word] < room or word.isdecimal() and len(word) < 4 and int(word) < room


def _digits_in_words(words: Sequence[str]) -> str:
    digits = ""
    for word in words:
        if SMALL.get(word, 10) > 9:
            break
        digits += str(SMALL[word])
    return digits
