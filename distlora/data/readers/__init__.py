"""Local files as rows, by their suffix: a file of this folder for each family of formats.

packed      files as bytes, packed by gzip or not, and what a small file may become
text        what the text formats share: encoding, lines
npz_arrays  NumPy archives, for images
rows        rows with the names of the numbers in a column
values      what cells hold, in words
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from distlora.data.readers.json_rows import read_json, read_json_lines
from distlora.data.readers.packed import is_packed
from distlora.data.readers.parquet_rows import read_parquet
from distlora.data.readers.rows import Rows, shared_names
from distlora.data.readers.table_rows import read_csv, read_tsv
from distlora.data.readers.values import Row, is_finite_number, kind_of, plain
from distlora.errors import UserError

__all__ = [
    "FORMATS",
    "Row",
    "Rows",
    "is_finite_number",
    "is_read",
    "kind_of",
    "plain",
    "read_file",
    "shared_names",
    "stem",
]

_READERS: dict[str, Callable[..., list[Row]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
#: The suffixes of the files that are read. Texts may be packed by gzip, with .gz behind.
FORMATS = tuple(_READERS)


def _unpacked(file: Path) -> Path:
    """The name without .gz."""
    return file.with_suffix("") if is_packed(file) else file


def is_read(file: Path) -> bool:
    """Whether the name says that the file is in one of the formats."""
    suffix = _unpacked(file).suffix.lower()
    return suffix in FORMATS and not (is_packed(file) and suffix == ".parquet")


def stem(file: Path) -> str:
    """The name without what says the format."""
    return _unpacked(file).stem


def read_file(file: Path, header: Sequence[str] | None = None, key: str | None = None) -> list[Row]:
    """All rows of one local file. Its suffix says how it is read.

    header: the columns of a TSV file whose first line is already a row. key: of the rows in a JSON file that
    is one object. Raises UserError that names the file and, if possible, the line.
    """
    if not is_read(file):
        raise UserError(
            f"data.path: {file} is none of {', '.join(FORMATS)}; unpack it or convert it to one of these"
        )
    reader = _READERS[_unpacked(file).suffix.lower()]
    more = {read_tsv: (header,), read_json: (key,)}.get(reader, ())
    try:
        return reader(file, *more)
    except MemoryError:
        raise UserError(f"data.path: {file} needs more memory than there is; take a part of it") from None
