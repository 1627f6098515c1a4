"""Values of rows, and how messages call them: in the words of data files, not of Python."""

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

Row = dict[str, Any]


def plain(value: Any) -> Any:
    """The value without a type of NumPy's own: a number, text or truth value; others as they are."""
    return value.item() if isinstance(value, np.generic) else value


def kind_of(value: Any) -> str:
    """What a value is, such as "a list" or "NaN"."""
    value = plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}infinity"
    if isinstance(value, Real | Decimal):
        return "a number"
    kinds = ((str, "a text"), (bytes, "bytes"), (Mapping, "an object"), (list | tuple | np.ndarray, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def is_finite_number(value: Any) -> bool:
    """Whether a plain value is a number that has a place on the line; true and false are none."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return is_number and (isinstance(value, int) or math.isfinite(value))  # an int may be beyond every float
