"""Numbers on the command line, in plain digits. Every mistake becomes one sentence that names the option."""

import argparse
import re
from typing import NoReturn, TypeAlias

from distlora.errors import UserError

#: What `add_subparsers` gives: to it each verb adds itself.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
#: Below 10¹⁸, so that nothing that counts overflows.
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_DECIMAL = re.compile(r"(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(?:[eE][-+]?\d{1,2})?", re.ASCII)


def whole_number(option: str, text: str) -> int:
    """A whole number above 0. Raises UserError for anything else, as the other functions here do."""
    return _whole(text) or _refused(option, text, "a whole number above 0")


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0 with commas between them."""
    numbers = [_whole(part) for part in text.split(",")]
    return (
        numbers if all(numbers) else _refused(option, text, "whole numbers above 0 with commas between them")
    )


def size(option: str, text: str) -> float:
    """A number above 0 that may have decimals."""
    number = float(text) if _DECIMAL.fullmatch(text.strip()) else 0.0
    return number or _refused(option, text, "a number above 0, without a unit")


def whole(text: str) -> int:
    """For argparse: a whole number of any sign."""
    if _WHOLE.fullmatch(text.strip().removeprefix("-")) is None:
        raise argparse.ArgumentTypeError(f"{_shortened(text)} is no whole number")
    return int(text)


def decimal(text: str) -> float:
    """For argparse: a finite number of any sign."""
    if _DECIMAL.fullmatch(text.strip().removeprefix("-")) is None:
        raise argparse.ArgumentTypeError(f"{_shortened(text)} is no number")
    return float(text)


def _whole(text: str) -> int:
    return int(text) if _WHOLE.fullmatch(text.strip()) else 0


def _refused(option: str, text: str, wanted: str) -> NoReturn:
    raise UserError(f"{option} {_shortened(text)}: wanted {wanted}")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
