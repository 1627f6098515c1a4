"""Final answers: how they are found in a text, and when two of them are the same."""

import re
from decimal import Decimal

from distlora.tasks.reading.options import KINDS
from distlora.tasks.reading.plain_text import first_line

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
#: An answer that is a number, perhaps with a currency, a percent sign or a unit in words: `$1,000.00` and
#: `1 kid`, but not `5/6` or `5x`.
_WHOLE_NUMBER = re.compile(rf"(?:\\?\$)?\s*({_NUMBER})\s*(?:\\?%)?(?:\s+[A-Za-z ]+)?(?:\\?\$)?")
#: Labels of options in the LLM-Adapters data sets. Models often repeat the option's text after its label.
_LABEL = re.compile(rf"(?:true|false|(?:{'|'.join(KINDS)})\s?\d+)\b", re.IGNORECASE)


def after_hashes(text: str) -> str | None:
    """GSM8K: the line after the last `####`; without one, the answer of `after_the_answer_is`."""
    _, mark, tail = text.rpartition("####")
    return _line(tail) if mark else after_the_answer_is(text)


def after_the_answer_is(text: str) -> str | None:
    """MetaMathQA: the line after the last `The answer is:`, where the colon may be missing."""
    parts = re.split(r"the answer is\s*:?", text, flags=re.IGNORECASE)
    return _line(parts[-1]) if len(parts) > 1 else None


def choice_or_text(text: str) -> str | None:
    """LLM-Adapters: the line after `the correct answer is`; without these words, the whole text.

    Of an option, only its label.
    """
    parts = re.split(r"the (?:correct )?answer is\s*:?", text, flags=re.IGNORECASE)
    found = _line(parts[-1]) if len(parts) > 1 else exact_text(text)
    label = _LABEL.match(found) if found else None
    return label[0].replace(" ", "").lower() if label else found


def number(text: str) -> str | None:
    """Arithmetic: the first number after the last `=` of the first line with text, or the line's first
    one.
    """
    line = _line(text)
    found = re.search(_NUMBER, line.rpartition("=")[2]) if line else None
    return found[0] if found else None


def bare_number(text: str) -> str | None:
    """A text that is a number and nothing else, perhaps with a unit."""
    return text.strip() if _value(text) is not None else None


def exact_text(text: str) -> str | None:
    """The whole text."""
    return text.strip() or None


def same(found: str | None, expected: str | None) -> bool:
    """Whether two answers are equal: as numbers if both are numbers, else as texts.

    Case, spaces, dollar signs and a full stop at the end make no difference between texts.
    """
    if found is None or expected is None:
        return False
    numbers = [_value(found), _value(expected)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _plain(found) == _plain(expected)


def _line(text: str) -> str | None:
    """The first line that is not blank."""
    return first_line(text) or None


def _value(text: str) -> Decimal | None:
    match = _WHOLE_NUMBER.fullmatch(text.strip().rstrip("."))
    return Decimal(match[1].replace(",", "")) if match else None


def _plain(text: str) -> str:
    return re.sub(r"[\s$]+", "", text).rstrip(".").lower()
