"""Numbers on the command line: each mistake is one sentence that names the option."""

import math

from distlora.errors import UserError


def whole_number(option: str, text: str) -> int:
    """Above 0. Raises UserError, as the others here."""
    return _number(int, text) or _refused(option, text, "a whole number above 0")


def whole_numbers(option: str, text: str) -> list[int]:
    """Numbers above 0 with commas between them."""
    numbers = [_number(int, part) for part in text.split(",")]
    return (
        numbers if all(numbers) else _refused(option, text, "whole numbers above 0 with commas between them")
    )


def size(option: str, text: str) -> float:
    """Above 0, perhaps with decimals."""
    return _number(float, text) or _refused(option, text, "a number above 0")


def _number(kind: type, text: str):
    """None for what is no number above 0."""
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _refused(option: str, text: str, wanted: str):
    raise UserError(f"{option} {text!r}: wanted {wanted}")
