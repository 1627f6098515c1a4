"""Columns and cells of rows, and the sentences for those that are missing or hold no text."""

from collections.abc import Iterable, Sequence
from itertools import chain

from distlora.data.readers import Row, is_finite_number, kind_of, plain
from distlora.errors import UserError
from distlora.sentences import listed, nearest


def row_name(position: int, origin: str) -> str:
    """How messages call a row. origin: the data set."""
    return f"row {position} of {origin}, counted from 0,"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of a data set, in the order in which they come up. Rows may differ (JSON)."""
    columns = getattr(rows, "column_names", None)
    return list(dict.fromkeys(chain.from_iterable(rows))) if columns is None else columns


def has_column(rows: Sequence[Row], column: str) -> bool:
    """Whether any row has such a column."""
    columns = getattr(rows, "column_names", None)
    return any(column in row for row in rows) if columns is None else column in columns


def cells_of(rows: Sequence[Row], column: str) -> Iterable[object]:
    """The cells of one column, None where a row has none; of rows of the hub without their other columns."""
    return rows[column] if hasattr(rows, "column_names") else (row.get(column) for row in rows)


def require_column(rows: Sequence[Row], column: str, where: str, origin: str) -> None:
    """Raises UserError if there is no such column. where: what asks for it."""
    if not has_column(rows, column):
        available = columns_of(rows)
        hint = nearest(column, map(str, available)) or "; name another in data.fields"
        raise UserError(f"{where}: {origin} has no column {column!r}{hint} (it has {listed(available)})")


def cell_text(row: Row, column: str, position: int, origin: str) -> str:
    """A cell as text. Raises UserError if it holds neither text nor a finite number, or an unpaired
    surrogate.

    position, origin: the row's number and the data set, for the error.
    """
    value = plain(row.get(column))
    if not isinstance(value, str | bool) and not is_finite_number(value):
        raise UserError(
            f"data: {row_name(position, origin)} has {found_in(value)} in column {column!r}, "
            "make it text or a number"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair, and no text can hold it
        raise UserError(
            f"data: {row_name(position, origin)} has an unpaired surrogate ({text[error.start]!a}) in column "
            f"{column!r}; correct it"
        ) from None
    return text


def found_in(value: object) -> str:
    """What a cell holds, as a part of a sentence."""
    return "no value" if value is None else kind_of(value)


def is_not_finite(value: object) -> bool:
    """Whether a value is NaN or an infinity, which no text and no label is."""
    value = plain(value)
    return isinstance(value, float) and not is_finite_number(value)
