"""Rows of CSV and TSV files. The first line names the columns."""

import csv
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distlora.data.readers.text import LONGEST_LINE, lines_of, opened_text
from distlora.data.readers.values import Row
from distlora.errors import UserError
from distlora.sentences import counted, given_twice

#: GLUE's format: tabs divide cells, and quotation marks are text.
_TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
_LOCK = threading.Lock()

log = logging.getLogger(__name__)


def read_csv(file: Path) -> list[Row]:
    """Errors: UserError with the row, counted from 0, and the line, counted from 1."""
    return _read(file, None, {"strict": True}, "CSV")


def read_tsv(file: Path, header: Sequence[str] | None = None) -> list[Row]:
    """header: the columns, if the first line is already a row. Errors: as for `read_csv`."""
    rows = _read(file, header, _TSV, "TSV")
    if _are_quoted(rows):
        log.warning(
            "data: %s has cells in quotation marks, with doubled ones inside, as pandas writes them; "
            "in a TSV file all these marks are text and are kept: write it as CSV, or without quoting",
            file,
        )
    return rows


def _are_quoted(rows: Iterable[Row]) -> bool:
    """Whether a program has put cells in quotation marks: all that begin with one end with one, and some hold
    doubled ones."""
    doubled = False
    for cell in (cell for row in rows for cell in row.values() if cell[:1] == '"'):
        if len(cell) < 2 or cell[-1] != '"' or '"' in cell[1:-1].replace('""', ""):
            return False
        doubled = doubled or '""' in cell[1:-1]
    return doubled


@contextmanager
def _long_cells() -> Iterator[None]:
    """A cell may be longer than the 131,072 characters that the csv module allows, as long as a line. The
    limit belongs to the whole process, so it is put back."""
    with _LOCK:
        limit = csv.field_size_limit(LONGEST_LINE)
        try:
            yield
        finally:
            csv.field_size_limit(limit)


def _read(file: Path, header: Sequence[str] | None, layout: dict, name: str) -> list[Row]:
    with opened_text(file, newline="") as stream, _long_cells():
        table = csv.reader(lines_of(stream, file), **layout)
        try:
            return _rows(table, file, header, name)
        except csv.Error as error:
            raise UserError(
                f"data.path: {file} is not valid {name} (line {table.line_num}: {error}); correct it"
            ) from None


def _rows(table, file: Path, header: Sequence[str] | None, name: str) -> list[Row]:
    first = next((cells for cells in table if cells), None)
    if first is None:
        return []
    names_columns = header is None or bool(set(header) & set(first))
    columns = first if names_columns else list(header)
    _refuse_other_marks(columns, file, name)
    _refuse_twice(columns, file)
    rows = [] if names_columns else [_row(columns, first, 0, table.line_num, file)]
    for cells in table:
        if cells:
            rows.append(_row(columns, cells, len(rows), table.line_num, file))
    return rows


def _refuse_other_marks(columns: Sequence[str], file: Path, name: str) -> None:
    """Raises UserError for a file whose cells something else divides, such as the semicolons of spreadsheets
    in countries with a decimal comma."""
    own, others = ("tabs", ",;|") if name == "TSV" else ("commas", ";\t|")
    if len(columns) == 1 and any(mark in columns[0] for mark in others):
        raise UserError(
            f"data.path: {file} has only one column, called {columns[0]!r}; {own} divide the cells of a "
            f"{name} file; write it with these"
        )


def _refuse_twice(columns: Sequence[str], file: Path) -> None:
    """Raises UserError for two columns of one name. Columns without a name, as spreadsheets write behind the
    last one, may be several: nobody can ask for them."""
    twice = given_twice(filter(None, columns))
    if twice is not None:
        raise UserError(f"data.path: {file} has two columns called {twice!r}, rename one of them")


def _row(columns: Sequence[str], cells: list[str], position: int, line: int, file: Path) -> Row:
    if len(cells) != len(columns):
        raise UserError(
            f"data.path: row {position} of {file} has not as many cells as the header "
            f"({counted(len(cells), 'cell')} and {counted(len(columns), 'column')}, line {line}); correct it"
        )
    return dict(zip(columns, cells))
