"""Where rows come from: local JSON, JSONL, CSV, TSV or parquet files, or a data set of the Hugging Face hub.

A row is a mapping from column to value. A *split expression* is the name of a split with an optional slice,
in the hub's syntax: `train`, `train[:50000]`, `train[10%:20%]`, `train[-500:]`, or several of these joined by
`+`. Slices mean the same as for `datasets.load_dataset`, also for local files.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.sentences import first_line, nearest

Row = dict[str, Any]

_PART = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<slice>[^\]]*)\])?")
_SLICE = re.compile(r"(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?")
_SHARD = re.compile(r"-\d+-of-\d+$")

#: Names that splits may have as local files, by their names on the hub, whatever the data set.
_LOCAL_NAMES = {
    "validation": "dev",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
}


@dataclass(frozen=True)
class SplitPart:
    """One split with its bounds as they are written: None, `50000` or `10%`.

    A negative bound counts from the end.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    def rows(self, count: int) -> range:
        """The positions of this part's rows in a split of `count` rows."""
        start = 0 if self.start is None else _position(self.start, count)
        stop = count if self.stop is None else _position(self.stop, count)
        return range(start, max(start, stop))


def _position(bound: str, count: int) -> int:
    """A bound as a position of 0 … count. A percentage means the closest row."""
    position = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(max(position + count, 0) if position < 0 else position, count)


def parse_split(expression: str) -> list[SplitPart]:
    """The parts of a split expression. Raises UserError if the text is none."""
    parts = []
    for text in expression.split("+"):
        part = _PART.fullmatch(text.strip())
        has_slice = part is not None and part["slice"] is not None
        bounds = _SLICE.fullmatch(re.sub(r"[\s_]", "", part["slice"])) if has_slice else None
        if part is None or (has_slice and bounds is None):
            raise UserError(
                f"data: split {expression!r} cannot be read, write it like train[:50000] or train[10%:20%]"
            )
        parts.append(SplitPart(part["name"], *(bounds.group("start", "stop") if bounds else ())))
    return parts


def load_rows(
    path: str,
    split: str,
    header: Sequence[str] | None = None,
    local_names: Mapping[str, str] | None = None,
) -> Sequence[Row]:
    """The rows of a split expression, from a local path if there is one, else from the hub.

    path: a file; a directory with a file for each split (`train.jsonl`) or its shards
    (`train-00000-of-00002.parquet`); or a data set of the hub, with its configuration after a colon if it has
    several (`openai/gsm8k:main`). header: the columns of TSV files whose first line is already a row.
    local_names: the names that splits may have in a directory, by their names on the hub.

    Rows of the hub are memory-mapped and not copied. Raises UserError, in one sentence, for what is missing,
    unreadable or out of reach.
    """
    parts = parse_split(split)
    if is_local(path):
        names = _LOCAL_NAMES | dict(local_names or {})
        return select(parts, partial(_read_local, Path(path).expanduser(), header, names))
    return _select_hub(path, parts)


def is_local(path: str) -> bool:
    """Whether a path means files on this machine: they exist, or no data set of the hub can have that
    name, or they would lie in a folder that exists.
    """
    file = Path(path).expanduser()
    looks_local = path.startswith((".", "~", "/")) or path.count("/") > 1 or file.suffix.lower() in READERS
    in_a_folder = "/" in path and ":" not in path and file.parent.is_dir()
    return looks_local or path.endswith("/") or in_a_folder or file.exists()


def fetch(path: str, split: str) -> None:
    """Brings a data set of the hub into the local cache. Does nothing for local files.

    This writes to the disk: one process of each node should call it before the others call `load_rows`.
    """
    if not is_local(path):
        for part in parse_split(split):
            _hub_split(path, part.name)


def select(parts: list[SplitPart], read_split: Callable[[str], list[Row]]) -> list[Row]:
    """The rows of all parts in order; each split is read once."""
    whole = {name: read_split(name) for name in dict.fromkeys(part.name for part in parts)}
    return [whole[part.name][position] for part in parts for position in part.rows(len(whole[part.name]))]


def _read_local(
    path: Path, header: Sequence[str] | None, local_names: Mapping[str, str], split: str
) -> list[Row]:
    files = _split_files(path, split, local_names)
    return list(chain.from_iterable(read_file(file, header) for file in files))


def _split_files(path: Path, split: str, local_names: Mapping[str, str]) -> list[Path]:
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
        if file.suffix.lower() in READERS and file.is_file():
            found.setdefault(_SHARD.sub("", file.stem), []).append(file)
    name = split if split in found else local_names.get(split, split)
    if name not in found:
        have = f"it has {', '.join(found)}" if found else f"it has no {', '.join(READERS)} file"
        raise UserError(f"data: no file for split {split!r} in {path}{nearest(split, found) or ':'} ({have})")
    files = found[name]
    if len(files) > 1 and any(not _SHARD.search(file.stem) for file in files):
        names = " and ".join(file.name for file in files)
        raise UserError(
            f"data: split {split!r} in {path} could be {names}, "
            "keep one of them or name the file in data.path"
        )
    return files


def read_file(file: Path, header: Sequence[str] | None = None) -> list[Row]:
    """All rows of one local file. Its suffix says how it is read.

    Raises UserError that names the file and, if possible, the line.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"data.path: {file} is none of {', '.join(READERS)}, convert it to one of these")
    try:
        return reader(file, header) if reader is _read_tsv else reader(file)
    except UnicodeDecodeError:
        raise UserError(f"data.path: {file} is not UTF-8 text, convert it to UTF-8") from None
    except OSError as error:
        raise UserError(
            f"data.path: {file} cannot be read ({error.strerror or error}), check the file"
        ) from error


def _read_json(file: Path) -> list[Row]:
    """A list of objects. A `.json` file that does not start with a bracket holds an object on each line."""
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_json_lines(file)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"data.path: {file} is not valid JSON (line {error.lineno}: {error.msg}), correct it"
        ) from None
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"data.path: entry {position} of {file} is not an object, write a list of objects"
            )
    return rows


def _read_json_lines(file: Path) -> list[Row]:
    rows = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data.path: line {number} of {file} is not valid JSON ({error.msg}), correct it"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"data.path: line {number} of {file} is not an object, write one object a line"
                )
            rows.append(row)
    return rows


def _read_csv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            rows = list(table)
        except csv.Error as error:
            raise UserError(
                f"data.path: {file} is not valid CSV (line {table.line_num}: {error}), correct it"
            ) from None
    return _of_equal_length(rows, file)


def _read_tsv(file: Path, header: Sequence[str] | None = None) -> list[Row]:
    """GLUE's format: tabs divide cells, and quotation marks are text.

    header: the columns, if the first line is already a row.
    """
    layout = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if header is not None and set(header) & set(next(csv.reader(lines, **layout), [])):
            header = None  # this copy of the data set names its columns
        lines.seek(0)
        return _of_equal_length(list(csv.DictReader(lines, header, **layout)), file)


def _of_equal_length(rows: list[Row], file: Path) -> list[Row]:
    for position, row in enumerate(rows):
        # DictReader puts surplus cells under the key None, and gives None to the cells that a short line
        # lacks.
        if None in row or None in row.values():
            raise UserError(
                f"data.path: row {position} of {file} has not as many cells as the header, correct it"
            )
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"data.path: {file} is not a parquet file, or is damaged ({first_line(error)})"
        ) from None


READERS: dict[str, Callable[..., list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _select_hub(path: str, parts: list[SplitPart]) -> Sequence[Row]:
    import datasets

    chosen = []
    for part in parts:
        whole = _hub_split(path, part.name)
        chosen.append(whole.select(part.rows(len(whole))))
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _hub_split(path: str, split: str):
    """One whole split of the hub as a `datasets.Dataset`, downloaded to the cache unless it is there."""
    import datasets  # slow to import, and not needed to read local files

    name, _, configuration = path.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                f"data.path: {name} is a gated data set, ask for access on its page of the hub, "
                "then set HF_TOKEN or run `hf auth login`"
            ) from error
        raise UserError(
            f"data.path: {name} is no local path and no data set of the hub open to you, correct it"
        ) from error
    except ConnectionError as error:
        if datasets.config.HF_HUB_OFFLINE:
            raise UserError(
                f"data.path: {name} is no local path and not in the local cache, and HF_HUB_OFFLINE is set, "
                "unset it to download, or name local files"
            ) from error
        raise UserError(
            f"data.path: {name} is no local path, and the hub cannot be reached; correct it, or the network"
        ) from error
    except Exception as error:  # a download may raise anything, also from HTTP clients
        raise UserError(_hub_problem(path, split, error)) from error


def _hub_problem(path: str, split: str, error: Exception) -> str:
    """A sentence for what `datasets` reports without an exception class of its own."""
    reason = first_line(error)
    if "Unknown split" in str(error):
        known = re.findall(r"'([\w.\-]+)'", reason.partition("Should be one of")[2])
        hint = nearest(split, known) or ", choose another"
        return f"data: {path} has no split {split!r}{hint} (it has {', '.join(known)})"
    if "onfig name is missing" in str(error) or "BuilderConfig" in str(error):
        # `datasets` lists the configurations on the lines after the first.
        listed = " ".join(str(error).split())
        return (
            f"data.path: {path}: name the configuration after a colon, "
            f"as in name:configuration ({listed[:300]})"
        )
    return (
        f"data.path: {path} cannot be loaded from the hub ({reason}), "
        "correct the name, or save it as local files"
    )
