"""Where rows come from: local JSON, JSONL, CSV, TSV or parquet files, or a data set of the Hugging Face hub.

A row is a mapping from column to value; `distlora.data.splits` says what a split expression is.

    readers (one file a format) ─► local_files (the files of a split) ─► sources
                                                  hub ─► sources
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from distlora.data.hub import hub_split, select_from_hub
from distlora.data.local_files import of_split, place_of
from distlora.data.readers import Row, is_read
from distlora.data.splits import parse_split, select

__all__ = ["Row", "fetch", "is_local", "load_rows", "parse_split", "select"]

#: Names that splits may have as local files, by their names on the hub, whatever the data set.
_LOCAL_NAMES = {
    "validation": "dev",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
}


def load_rows(
    path: str,
    split: str,
    header: Sequence[str] | None = None,
    local_names: Mapping[str, str] | None = None,
) -> Sequence[Row]:
    """The rows of a split expression, from a local path if there is one, else from the hub.

    path: a file, perhaps packed by gzip; a JSON file that holds its rows under a key of one object, with the
    key after a colon (`rows.json:data`, `rows.json:data.train`); a directory with a file for each split
    (`train.jsonl`) or its shards (`train-00000-of-00002.parquet`); or a data set of the hub, with its
    configuration after a colon if it has several (`openai/gsm8k:main`). header: the columns of TSV files
    whose first line is already a row. local_names: the names that splits may have in a directory, by their
    names on the hub.

    Rows of the hub are memory-mapped and not copied. Raises UserError, in one sentence, for what is missing,
    unreadable or out of reach.
    """
    parts = parse_split(split)
    if is_local(path):
        file, key = place_of(path)
        names = _LOCAL_NAMES | dict(local_names or {})
        return select(parts, partial(of_split, file, key=key, header=header, local_names=names))
    return select_from_hub(path, parts)


def is_local(path: str, folder: Path = Path()) -> bool:
    """Whether a path means files on this machine: they exist, or no data set of the hub can have that
    name, or they would lie in a folder that exists. folder: where a relative path begins.
    """
    file, key = place_of(path)
    file = folder / file
    looks_local = path.startswith((".", "~", "/")) or path.count("/") > 1 or is_read(file)
    in_a_folder = "/" in path and ":" not in path and file.parent.is_dir()
    return looks_local or key is not None or path.endswith("/") or in_a_folder or file.exists()


def fetch(path: str, split: str) -> None:
    """Brings a data set of the hub into the local cache. Does nothing for local files.

    This writes to the disk: one process of each node should call it before the others call `load_rows`.
    """
    if not is_local(path):
        for part in parse_split(split):
            hub_split(path, part.name)
