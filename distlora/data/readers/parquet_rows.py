"""Rows of parquet files."""

from pathlib import Path

from distlora.data.readers.packed import most_bytes, too_large
from distlora.data.readers.rows import Rows, names_in
from distlora.errors import UserError
from distlora.sentences import first_line, given_twice

#: Cells that any file may have.
_FREE_CELLS = 1 << 24


def read_parquet(file: Path) -> Rows:
    """Errors: UserError."""
    from pyarrow import parquet  # slow to import, and not needed for the other formats

    try:
        found = parquet.ParquetFile(file)
        _refuse_bomb(found.metadata, file)
        table = found.read()
    except (MemoryError, UserError):
        raise
    except Exception as error:  # damage shows in any of pyarrow's exceptions, and in some of Python's
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"data.path: {file} cannot be read ({error.strerror}); check the file") from error
        raise UserError(
            f"data.path: {file} is not a parquet file, or is damaged ({first_line(error)})"
        ) from None
    names = table.column_names
    twice = given_twice(names)
    if twice is not None:
        raise UserError(f"data.path: {file} has two columns called {twice!r}, rename one of them")
    try:
        return Rows(table.to_pylist(), names_in(table.schema.metadata))
    except MemoryError:
        raise
    except Exception as error:  # a time in an unknown zone, a text that is not UTF-8
        raise UserError(
            f"data.path: {_unconvertible(table)} of {file} cannot be converted ({first_line(error)}), "
            "make it text or numbers, or remove that column"
        ) from error


def _refuse_bomb(metadata, file: Path) -> None:
    """Raises UserError for more cells than a file of this size has, unless it is made to fill the memory:
    those of a column with one value take no space at all."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    cells = metadata.num_rows * metadata.num_columns
    if cells > max(_FREE_CELLS, 8 * file.stat().st_size) or sum(
        group.total_byte_size for group in groups
    ) > most_bytes(file):
        raise too_large(file)


def _unconvertible(table) -> str:
    for name in table.column_names:
        try:
            table.column(name).to_pylist()
        except Exception:  # whatever it is, the caller has it
            return f"column {name!r}"
    return "a column"
