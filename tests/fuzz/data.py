"""Files of rows in every format, and what the tasks make of their cells."""

import contextlib
import csv
import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from distlora.data import ChatExamples, CompletionRows, LabelledRows
from distlora.data.examples import Examples
from distlora.data.sources import load_rows
from distlora.errors import UserError
from tests.fuzz.damage import damaged, damaged_text, values, written
from tests.fuzz.rule import Loader, problem_with

ROWS = [
    {"text": "a b", "label": 1, "question": "How much?", "answer": "It is 2.\n#### 2"},
    {"text": 'ü, "c"', "label": 0, "question": "And?", "answer": "#### 3"},
]
MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
SECTION = {
    "fields": None, "template": None, "labels": None, "max_length": 40, "split": "train", "train_on": "all",
    "think_step_by_step": None, "special_tokens": False, "max_new_tokens": 8,
}  # fmt: skip


LABELLED = {"text": "text", "label": "label"}


def section(task: str, path: Path, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(task=task, path=str(path), **(SECTION | more))


def _table(rows, **layout) -> str:
    stream = io.StringIO()
    table = csv.DictWriter(stream, rows[0], **layout)
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue()


def _parquet() -> bytes:
    stream = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS)
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), stream
    )
    return stream.getvalue()


def _read(path: Path) -> None:
    """The rows as they are, and as what several tasks want."""
    load_rows(str(path), "train[:100]")
    _as_tasks(path)


def _as_tasks(path: Path) -> None:
    for build in (
        lambda: CompletionRows(section("completion", path, fields={"text": "text"}), "train"),
        lambda: LabelledRows(section("classification", path, labels=["a", "b"], fields=LABELLED), "train"),
        lambda: Examples(section("gsm8k", path), "train"),
    ):
        with _passed_over():
            list(build())
    CompletionRows(section("completion", path, fields={"text": "label"}), "train")


@contextlib.contextmanager
def _passed_over():
    """Rows that one task refuses may be right for the next one."""
    try:
        yield
    except UserError as error:
        assert problem_with(str(error)) is None, str(error)


def _file(name: str):
    return lambda content, folder: _read(written(folder, content, name))


def _packed(given: tuple[bytes, bytes | None], folder: Path) -> None:
    inner, outer = given
    _read(written(folder, gzip.compress(inner) if outer is None else outer, "train.jsonl.gz"))


def _cells(rows: list[dict], folder: Path) -> None:
    _as_tasks(written(folder, "".join(json.dumps(row) + "\n" for row in rows), "train.jsonl"))


def _column(cells: list, folder: Path) -> None:
    lines = "".join(json.dumps({"text": "a", "label": cell}) + "\n" for cell in cells)
    path = written(folder, lines, "x.jsonl")
    list(LabelledRows(section("classification", path, labels=["0", "7"], fields=LABELLED), "train"))


def _chats(rows: list[dict], folder: Path) -> None:
    path = written(folder, "".join(json.dumps(row) + "\n" for row in rows), "train.jsonl")
    list(ChatExamples(section("chat", path, template="chat"), "train"))


def _named(given: tuple[str, str], folder: Path) -> None:
    """A path, and a split of it."""
    written(folder, json.dumps(ROWS), "rows.json")
    (folder / "link").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    written(folder, b"", "train-00001-of-00002.jsonl")
    path, split = given
    if not path.startswith(("/", "~", ".")):
        path = f"./{path}"
    load_rows(path, split)


JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
WORDS = ('"label": ', '"text"', "[", "]", "{", "}", ",", '"a":1')
BYTES = [word.encode() for word in WORDS]
TSV = _table(ROWS[:1], delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, escapechar="\\").encode()
PATHS = ("rows.json", "rows.json:a.b", "link", "loop", "link/x.jsonl", "~nobody/x.csv", "train.csv", ".")
_CELL = st.one_of(values(), st.sampled_from(("a", "b", 0, 1, -1, "0", "7", "", "true", 1e308, "9" * 5000)))
_ROLE = st.sampled_from(("user", "assistant", "tool", "system"))
_MESSAGE = st.fixed_dictionaries({"role": _CELL | _ROLE, "content": _CELL}, optional={"tool_calls": values()})
_MESSAGES = st.lists(st.one_of(_MESSAGE, st.sampled_from(MESSAGES), values()), max_size=4)
_CHAT = {"messages": st.one_of(_MESSAGES, _MESSAGES.map(lambda more: MESSAGES + more), values())}
_TEXTS = damaged_text([json.dumps(MESSAGES), json.dumps([{"name": "f", "parameters": {}}])], WORDS)
LOADERS = (
    Loader("JSON lines", damaged([JSON_LINES.encode()], BYTES), _file("train.jsonl")),
    Loader("JSON", damaged([json.dumps(ROWS, indent=1).encode()], BYTES), _file("train.json")),
    Loader("CSV", damaged([_table(ROWS).encode()], [b'"', b",", b"\r\n"]), _file("train.csv")),
    Loader("TSV", damaged([TSV]), _file("train.tsv"), share=0.5),
    Loader("UTF-16", damaged([JSON_LINES.encode("utf-16")]), _file("train.jsonl"), share=0.3),
    Loader(
        "gzip",
        st.tuples(damaged([JSON_LINES.encode()]), st.none() | damaged([gzip.compress(JSON_LINES.encode())])),
        _packed,
    ),
    Loader("parquet", damaged([_parquet()]), _file("train.parquet")),
    Loader("cells", st.lists(st.fixed_dictionaries(dict.fromkeys(ROWS[0], _CELL)), max_size=3), _cells),
    Loader("labels", st.lists(_CELL, max_size=5), _column),
    Loader(
        "conversations",
        st.lists(
            st.fixed_dictionaries(_CHAT, optional={"system": _CELL, "tools": values()}),
            min_size=1,
            max_size=2,
        ),
        _chats,
    ),
    Loader(
        "conversations in texts", _TEXTS.map(lambda text: [{"messages": text, "tools": text}]), _chats, 0.5
    ),
    Loader(
        "paths of data",
        st.tuples(damaged_text(PATHS, most=2), st.sampled_from(("train", "test", "train[:1]"))),
        _named,
    ),
)
