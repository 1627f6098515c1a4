"""Rows of parquet files."""

from pathlib import Path

from distlora.data.readers.values import Row
from distlora.errors import UserError
from distlora.sentences import first_line


def read_parquet(file: Path) -> list[Row]:
    """Errors: UserError."""
    from pyarrow import parquet  # slow to import, and not needed for the other formats

    try:
        table = parquet.ParquetFile(file).read()
        names = table.column_names
        rows = table.to_pylist()
    except MemoryError:
        raise
    except Exception as error:  # damage shows in any of pyarrow's exceptions, and in some of Python's
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"data.path: {file} cannot be read ({error.strerror}), check the file") from error
        raise UserError(
            f"data.path: {file} is not a parquet file, or is damaged ({first_line(error)})"
        ) from None
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise UserError(f"data.path: {file} has two columns called {twice!r}, rename one of them")
    return rows
