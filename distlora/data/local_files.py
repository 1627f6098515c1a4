"""The files of a split in a local place: a file, or a directory with a file for each split or its shards."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from distlora.data.readers import FORMATS, Row, is_read, read_file, stem
from distlora.errors import UserError
from distlora.sentences import nearest

_SHARD = re.compile(r"-\d+-of-\d+$")
_WITH_KEY = re.compile(r"(?P<file>.+\.json(?:\.gz)?):(?P<key>.+)", re.IGNORECASE | re.DOTALL)


def place_of(path: str) -> tuple[Path, str | None]:
    """The file or directory that a local path names, and the key of the rows in a JSON file, if there is one:
    `rows.json:data`.
    """
    named = _WITH_KEY.fullmatch(path)
    if named is None or Path(path).expanduser().exists():
        return Path(path).expanduser(), None
    return Path(named["file"]).expanduser(), named["key"]


def of_split(
    path: Path,
    split: str,
    key: str | None = None,
    header: Sequence[str] | None = None,
    local_names: Mapping[str, str] | None = None,
) -> list[Row]:
    """The rows of a whole split. key: of the rows in a JSON file that is one object. header, local_names: see
    `distlora.data.sources.load_rows`. Errors: UserError.
    """
    files = _files(path, split, local_names or {})
    return list(chain.from_iterable(read_file(file, header, key) for file in files))


def _files(path: Path, split: str, local_names: Mapping[str, str]) -> list[Path]:
    """The files of one split, shards in order. A single file is the split `train`, as on the hub."""
    if not path.exists():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"data.path: {path} does not exist{nearest(path.name, siblings) or ', check the path'}"
        )
    if path.is_file():
        if split != "train":
            raise UserError(
                f"data: {path} is a single file and has no split {split!r}, "
                f"take a slice of its only split, such as train[-10%:], "
                f"or name a directory that holds {split}{path.suffix}"
            )
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if is_read(file) and file.is_file():
            found.setdefault(_SHARD.sub("", stem(file)), []).append(file)
    name = split if split in found else local_names.get(split, split)
    if name not in found:
        have = f"it has {', '.join(found)}" if found else f"it has no {', '.join(FORMATS)} file"
        raise UserError(f"data: no file for split {split!r} in {path}{nearest(split, found) or ':'} ({have})")
    files = found[name]
    if len(files) > 1 and any(not _SHARD.search(stem(file)) for file in files):
        names = " and ".join(file.name for file in files)
        raise UserError(
            f"data: split {split!r} in {path} could be {names}, "
            "keep one of them or name the file in data.path"
        )
    return files
