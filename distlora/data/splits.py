"""Split expressions: the name of a split with an optional slice, in the hub's syntax.

`train`, `train[:50000]`, `train[10%:20%]`, `train[-500:]`, or several of these joined by `+`. Slices mean the
same as for `datasets.load_dataset`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from distlora.data.readers import Row, Rows, shared_names
from distlora.errors import UserError

_PART = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<slice>[^\]]*)\])?")
#: Bounds of up to 18 digits, more than any number of rows.
_SLICE = re.compile(r"(?P<start>-?\d{1,18}%?)?:(?P<stop>-?\d{1,18}%?)?", re.ASCII)
#: Splits that are joined.
_MOST = 1000


@dataclass(frozen=True)
class SplitPart:
    """One split with its bounds as they are written: None, `50000` or `10%`.

    A negative bound counts from the end.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    def rows(self, count: int) -> range:
        """The positions of this part's rows in a split of `count` rows."""
        start = 0 if self.start is None else _position(self.start, count)
        stop = count if self.stop is None else _position(self.stop, count)
        return range(start, max(start, stop))


def _position(bound: str, count: int) -> int:
    """A bound as a position of 0 … count. A percentage means the closest row."""
    position = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(max(position + count, 0) if position < 0 else position, count)


def parse_split(expression: str) -> list[SplitPart]:
    """The parts of a split expression. Raises UserError if the text is none."""
    parts = []
    if expression.count("+") >= _MOST:
        raise UserError(f"data: split {expression[:100]!r} joins more than {_MOST} splits; name fewer")
    for text in expression.split("+"):
        part = _PART.fullmatch(text.strip())
        has_slice = part is not None and part["slice"] is not None
        bounds = _SLICE.fullmatch(re.sub(r"[\s_]", "", part["slice"])) if has_slice else None
        if part is None or (has_slice and bounds is None):
            raise UserError(
                f"data: split {expression[:100]!r} cannot be read; write it like train[:50000] or "
                "train[10%:20%]"
            )
        parts.append(SplitPart(part["name"], *(bounds.group("start", "stop") if bounds else ())))
    return parts


def select(parts: list[SplitPart], read_split: Callable[[str], list[Row]]) -> list[Row]:
    """The rows of all parts in order; each split is read once."""
    whole = {name: read_split(name) for name in dict.fromkeys(part.name for part in parts)}
    rows = (whole[part.name][position] for part in parts for position in part.rows(len(whole[part.name])))
    return Rows(rows, shared_names(whole))
