"""Rows that know the names of the numbers in a column, as the parquet files of the hub do."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distlora.data.readers.values import Row
from distlora.errors import UserError

#: From a column to the names of the numbers 0, 1, … in it.
Names = dict[str, tuple[str, ...]]


class Rows(list[Row]):
    def __init__(self, rows: Iterable[Row], names: Names):
        super().__init__(rows)
        self.names = names


def names_in(metadata: Mapping[bytes, bytes] | None) -> Names:
    """Those in the metadata of a parquet file that `datasets` has written; none in any other file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {column: tuple(map(str, names)) for column, names in map(_names, features.items()) if names}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _names(item: tuple[str, Any]) -> tuple[str, list]:
    column, feature = item
    is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return column, feature["names"] if is_label else []


def shared_names(parts: Mapping[str, Sequence[Row]]) -> Names:
    """The names that hold for the rows of all parts. Raises UserError where they contradict each other."""
    found, first = {}, {}
    for place, rows in parts.items():
        for column, names in getattr(rows, "names", {}).items():
            if found.setdefault(column, names) != names:
                raise UserError(
                    f"data: column {column!r} has other names for its numbers in {first[column]} than in "
                    f"{place}; write the names themselves into the data, or read only one of them"
                )
            first.setdefault(column, place)
    return found
