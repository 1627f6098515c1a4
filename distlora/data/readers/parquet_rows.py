"""Rows of parquet files."""

from pathlib import Path

from distlora.data.readers.rows import Rows, names_in
from distlora.errors import UserError
from distlora.sentences import first_line


def read_parquet(file: Path) -> Rows:
    """Errors: UserError."""
    from pyarrow import parquet  # slow to import, and not needed for the other formats

    try:
        table = parquet.ParquetFile(file).read()
    except MemoryError:
        raise
    except Exception as error:  # damage shows in any of pyarrow's exceptions, and in some of Python's
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"data.path: {file} cannot be read ({error.strerror}), check the file") from error
        raise UserError(
            f"data.path: {file} is not a parquet file, or is damaged ({first_line(error)})"
        ) from None
    names = table.column_names
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
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


def _unconvertible(table) -> str:
    for name in table.column_names:
        try:
            table.column(name).to_pylist()
        except Exception:  # whatever it is, the caller has it
            return f"column {name!r}"
    return "a column"
