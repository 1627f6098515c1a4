"""Numbers on the command line. Every mistake becomes one sentence that names the option."""

import math

from distlora.errors import UserError


def whole_number(option: str, text: str) -> int:
    """A whole number above 0. Raises UserError for anything else, as the other functions here do."""
    return _number(int, text) or _refused(option, text, "a whole number above 0")


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0 with commas between them."""
    numbers = [_number(int, part) for part in text.split(",")]
    return (
        numbers if all(numbers) else _refused(option, text, "whole numbers above 0 with commas between them")
    )


def size(option: str, text: str) -> float:
    """A number above 0 that may have decimals."""
    return _number(float, text) or _refused(option, text, "a number above 0")


def _number(kind: type, text: str):
    """The number, or None if the text is no number above 0."""
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _refused(option: str, text: str, wanted: str):
    raise UserError(f"{option} {text!r}: wanted {wanted}")
