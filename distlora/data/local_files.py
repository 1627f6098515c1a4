"""The files of a split in a local place: a file, or a directory with a file for each split or its shards."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from distlora.data.readers import FORMATS, Row, Rows, is_read, read_file, shared_names, stem
from distlora.errors import UserError
from distlora.files.problems import file_errors_explained
from distlora.files.user_paths import user_path
from distlora.sentences import listed, nearest

#: Behind the number of shards the hub used to write a hash.
_SHARD = re.compile(r"-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(-[0-9a-f]{16})?$")
#: How many missing shards are named.
_MOST = 5
_WITH_KEY = re.compile(r"(?P<file>.+\.json(?:\.gz)?):(?P<key>.+)", re.IGNORECASE | re.DOTALL)


def place_of(path: str) -> tuple[Path, str | None]:
    """The file or directory that a local path names, and the key of the rows in a JSON file, if there is one:
    `rows.json:data`.
    """
    named = _WITH_KEY.fullmatch(path)
    whole = user_path(path, "data.path")
    if named is None or whole.exists():
        return whole, None
    return user_path(named["file"], "data.path"), named["key"]


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
    with file_errors_explained(f"data.path: {path}"):
        files = _files(path, split, local_names or {})
    parts = {file.name: read_file(file, header, key) for file in files}
    return Rows(chain.from_iterable(parts.values()), shared_names(parts))


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
    if not path.is_dir():
        raise UserError(f"data.path: {path} is neither a file nor a directory, name one of these")
    found = _by_split(path)
    name = split if split in found else local_names.get(split, split)
    if name not in found:
        raise UserError(_no_file(split, path, found))
    return _in_order(found[name], split, path)


def _in_order(files: Sequence[Path], split: str, path: Path) -> list[Path]:
    """The one file of a split, or its shards by their numbers. Raises UserError unless each is there once."""
    shards = [_SHARD.search(stem(file)) for file in files]
    if len(files) > 1 and not all(shards):
        raise UserError(
            f"data: split {split!r} in {path} could be {_named(files, ' and ')}, "
            "keep one of them or name the file in data.path"
        )
    if not shards[0]:
        return list(files)
    problem = _problem_of_shards(files, shards)
    if problem:
        raise UserError(f"data: the shards of split {split!r} in {path} are no whole split: {problem}")
    return sorted(files, key=lambda file: int(_SHARD.search(stem(file))["number"]))


def _problem_of_shards(files: Sequence[Path], shards: Sequence[re.Match]) -> str | None:
    """What is missing among shards, or there twice, as the end of a sentence; None if nothing is."""
    by_total, by_number = _grouped(files, shards, "total"), _grouped(files, shards, "number")
    if len(by_total) > 1:
        names = " and ".join(group[0].name for group in by_total.values())
        return f"{names} belong to different sets; keep the files of one set"
    double = next((group for group in by_number.values() if len(group) > 1), None)
    if double:
        return f"{_named(double, ' and ')} are the same shard; keep one of them"
    formats = {file.name[shard.end() :]: file for file, shard in zip(files, shards)}
    if len(formats) > 1:
        return f"{_named(formats.values(), ' and ')} are in different formats; keep the files of one format"
    (total,) = by_total
    wanted = range(total) if 0 in by_number else range(1, total + 1)
    strange = next((group for number, group in by_number.items() if number not in wanted), None)
    if strange:
        return f"{strange[0].name} has a number that no shard of {total} has; rename or remove it"
    # The numbers are different, so as many of them as there should be are all of them.
    return None if len(by_number) == total else _missing(by_number, total)


def _missing(numbers: Collection[int], total: int) -> str:
    first = list(islice((number for number in range(total) if number not in numbers), _MOST))
    more = total - len(numbers) - len(first)
    verb = "is" if len(first) + more == 1 else "are"
    told = ", ".join(map(str, first)) + (f" and {more} more" if more else "")
    return f"of {total} shards, counted from 0, {told} {verb} missing; fetch what is missing"


def _grouped(files: Sequence[Path], shards: Sequence[re.Match], part: str) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for file, shard in zip(files, shards):
        found.setdefault(int(shard[part]), []).append(file)
    return found


def _named(files: Iterable[Path], between: str) -> str:
    return between.join(file.name for file in files)


def _no_file(split: str, path: Path, found: Iterable[str]) -> str:
    """The sentence for a split of which a directory has no file: where its rows may lie instead."""
    wanted = f"data: no file for split {split!r} in {path}"
    numbered = [name for name in found if re.fullmatch(rf"{re.escape(split)}[-_.]?\d+", name)]
    if len(numbered) > 1:
        return (
            f"{wanted}; for the rows of all of {', '.join(numbered)} write {'+'.join(numbered)} as the split"
        )
    folder = next((folder for folder in _folders(path) if split in _by_split(folder)), None)
    if folder is not None:
        return f"{wanted}; its files lie in {folder}, name that folder in data.path"
    have = f"it has {listed(found)}" if found else f"it has no {', '.join(FORMATS)} file"
    near = nearest(split, found)
    remedy = "; name one of these as the split" if found and not near else ""
    return f"{wanted}{near} ({have}){remedy}"


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _by_split(path: Path) -> dict[str, list[Path]]:
    """The files of a directory that are read, by the names of their splits."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if is_read(file) and file.is_file():
            found.setdefault(_SHARD.sub("", stem(file)), []).append(file)
    return found
