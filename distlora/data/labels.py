"""What a cell says as a label or as a score: numbers and truth values as the various formats write them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from distlora.data.readers import is_finite_number, kind_of, plain
from distlora.sentences import listed

#: What the column of the label holds in a row without one, as in the hub's test splits and in MNLI's files.
_UNLABELLED = ("", "-", "-1")

#: Of no more digits than Python makes a number of.
_WHOLE = re.compile(r"(?P<sign>[+-]?)(?P<digits>0|[1-9]\d{,4000})(?:\.0*)?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TRUTH = ("false", "true")


def shown(value: Any) -> str:
    """A cell as messages show it: texts in quotation marks, and others as data files write them."""
    value = plain(value)
    if isinstance(value, str):
        return repr(value.strip())
    return str(value) if is_finite_number(value) else kind_of(value)


def is_unlabelled(value: Any) -> bool:
    """Whether a cell that holds no name of a label stands for a row without one."""
    value = plain(value)
    return value is None or whole_number(value) == "-1" or (_text(value) in _UNLABELLED)


def whole_number(value: Any) -> str | None:
    """A whole number, whether it is written 1, 1.0 or +1, in its shortest form; None for anything else."""
    if is_finite_number(value):
        return str(int(value)) if value == int(value) else None
    match = _WHOLE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    return "-" * (match["sign"] == "-" and match["digits"] != "0") + match["digits"]


def number_in(value: Any) -> float | None:
    """The number that a cell holds, perhaps an infinity; None if it holds none. A comma is no part of one."""
    value = plain(value)
    if is_finite_number(value):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    text = _text(value)
    return float(text) if text is not None and _DECIMAL.fullmatch(text) else None


def truth_in(value: Any) -> str | None:
    """ "false" or "true" if the cell says one of these, as a truth value or as a word."""
    text = str(value) if isinstance(value, bool) else _text(value)
    return text.lower() if text is not None and text.lower() in _TRUTH else None


def _text(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) else None


class LabelNames:
    """Labels by what a cell may hold: the name; a true or false for a name of that word; a whole number,
    however it is written, for a name that is this number. Where no name begins with a digit, cells may hold
    the number of the label itself, from 0 on.

    stored: the same names in the order in which the data set numbers them, if it does.
    """

    def __init__(self, names: Sequence[str], stored: Sequence[str] | None = None):
        self.names = tuple(names)
        self._by_name = {name: number for number, name in enumerate(names)}
        self._by_whole = _first_of_each(whole_number(name) for name in names)
        self.are_numbers = len(self._by_whole) == len(self.names)
        self._by_truth = _first_of_each(truth_in(name) for name in names)
        self.are_counted = stored is not None or not (self._by_whole or any(map(_begins_with_digit, names)))
        if self.are_counted:
            order = self.names if stored is None else stored
            self._by_whole = {str(number): self._by_name[name] for number, name in enumerate(order)}

    def number(self, value: Any) -> int | None:
        """The number of the label that a cell names; None if it names none."""
        value = plain(value)
        text = _text(value)
        if text in self._by_name:
            return self._by_name[text]
        truth = truth_in(value)
        if truth is not None:
            return self._by_truth.get(truth)
        return self._by_whole.get(whole_number(value))

    def known(self) -> str:
        """What a cell may hold, as a part of a sentence."""
        names = ", ".join(self.names)
        return f"{names} or 0 to {len(self.names) - 1}" if self.are_counted else names

    def advice(self, value: Any) -> str:
        """The end of a sentence about a cell that names no label."""
        if truth_in(value):
            return (
                '; name the labels "false" and "true" in data.labels, in quotes, or write names into the data'
            )
        if whole_number(plain(value)) is not None and not (self.are_counted or self._by_whole):
            return (
                "; names that begin with a digit are not counted: write them into the data, or list the "
                "labels as numbers"
            )
        if kind_of(value) in ("NaN", "infinity", "-infinity"):
            return "; leave it empty, or null, where a row has no label"
        return ""

    def doubt(self, cells: Iterable[Any]) -> str | None:
        """What the cells of a column without names of its own hold, if it cannot be told which name each
        number stands for: whether -1 is a label, or whether numbers begin with 1. None without a doubt.
        """
        if not self.are_counted:
            return None
        numbers = set()
        for value in map(plain, cells):
            number = whole_number(value)
            if _text(value) in self._by_name or (number is None and not is_unlabelled(value)):
                return None
            numbers.add(number)
        return _doubt({int(number) for number in numbers - {None}}, len(self.names))


def _doubt(numbers: set[int], count: int) -> str | None:
    """numbers: all that a column holds. count: of the names."""
    labels = numbers - {-1}
    if not labels or labels == set(range(count)) or max(labels) >= count or min(labels) < 0:
        return None
    if -1 in numbers and (count - 1 not in labels or len(numbers) == count):
        return f"the numbers {listed(sorted(numbers))}, and -1 may be a label or stand for no label"
    if -1 not in numbers and count > 2 and labels == set(range(1, count)):
        return f"the numbers {listed(sorted(numbers))}, which may be counted from 0 or from 1"
    return None


def stored_names(rows: Sequence[Any], column: str) -> tuple[str, ...] | None:
    """The names that a data set of the hub, or its copy, has for the numbers 0, 1, … in a column; None if it
    has none."""
    feature = (getattr(rows, "features", None) or {}).get(column)
    names = getattr(feature, "names", None) or getattr(rows, "names", {}).get(column)
    return tuple(names) if names else None


def _begins_with_digit(name: str) -> bool:
    return name.strip()[:1].isdigit()


def _first_of_each(keys) -> dict[str, int]:
    """From a key to the first number that has it; without None."""
    found: dict[str, int] = {}
    for number, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, number)
    return found
