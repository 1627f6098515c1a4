"""Rows: local files, split expressions, the hub's answers, and the sentence for each mistake."""

import json
import os
import subprocess
import sys

import pytest

from distlora.data import sources
from distlora.data.sources import load_rows, parse_split
from distlora.errors import UserError

ROWS = [{"question": f'q{i}, "quoted"\u2028', "answer": str(i)} for i in range(10)]


def write(file, rows=ROWS):
    """Write rows in the format of the file's suffix."""
    import pandas

    if file.suffix == ".jsonl":
        file.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8"
        )
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif file.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(file, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(file)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    file = write(tmp_path / f"train{suffix}")
    assert load_rows(str(file), "train") == ROWS
    assert load_rows(str(tmp_path), "train[2:4]") == ROWS[2:4]


def test_json_file_with_one_object_a_line_is_read(tmp_path):
    write(tmp_path / "rows.jsonl").rename(tmp_path / "rows.json")
    assert load_rows(str(tmp_path / "rows.json"), "train") == ROWS


def test_directory_holds_one_file_a_split_and_shards_in_order(tmp_path):
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS[6:])
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:6])
    write(tmp_path / "test.csv", ROWS[:1])
    (tmp_path / "README.md").write_text("about")
    assert load_rows(str(tmp_path), "train") == ROWS
    assert load_rows(str(tmp_path), "test") == ROWS[:1]


@pytest.mark.parametrize("count", [7, 10, 3260])
@pytest.mark.parametrize(
    "split",
    [
        "train",
        "train[:3]",
        "train[-3:]",
        "train[2:5]",
        "train[4:2]",
        "train[1:-1]",
        "train[:50000]",
        "train[:33%]",
        "train[-15%:]",
        "train[10%:20%]",
        "train[90%:]+train[:2]",
    ],
)
def test_slices_mean_what_they_mean_to_datasets(split, count):
    from datasets import ReadInstruction

    theirs = ReadInstruction.from_spec(split).to_absolute({"train": count})
    expected = [
        row for part in theirs for row in range(part.from_ or 0, count if part.to is None else part.to)
    ]
    assert [row for part in parse_split(split) for row in part.rows(count)] == expected


@pytest.mark.parametrize(
    "split", ["", "train[", "train[5]", "train[a:b]", "train[:5%%]", "train[1.5%:]", "train[::2]"]
)
def test_unreadable_split_is_named(split):
    with pytest.raises(UserError, match="cannot be read; write it like"):
        parse_split(split)


def error(path, split="train"):
    with pytest.raises(UserError) as caught:
        load_rows(str(path), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl")
    assert "does not exist, did you mean train.jsonl?" in error(tmp_path / "tain.jsonl")
    assert "does not exist; check the path" in error(tmp_path / "no" / "such.json")
    assert "does not exist" in error("nothing-here.jsonl"), "a known suffix is never looked up on the hub"


def test_unknown_split_names_the_nearest_and_the_known(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl")
    assert "no file for split 'tset'" in error(tmp_path, "tset[:3]")
    assert "did you mean test? (it has test, train)" in error(tmp_path, "tset")
    assert "it has no .jsonl" in error(_empty(tmp_path))
    assert "is a single file and has no split 'test'" in error(tmp_path / "train.jsonl", "test")


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_two_files_for_one_split_are_not_chosen_between(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.csv")
    assert "could be train.csv and train.jsonl" in error(tmp_path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 of"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', "line 3 of"),
        ("a.json", b'[{"a": 1},\n 2,]', "is not valid JSON (line 2"),
        ("a.json", b"[1, 2]", "entry 0 of"),
        ("a.jsonl", b'{"a": "\xff"}\n', "is not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3\n", "row 1 of"),
        ("a.csv", b"a,b\n1,2,3\n", "row 0 of"),
        ("a.csv", b'a,b\n1,"2\n', "is not valid CSV"),
        ("a.parquet", b"PAR?", "is not a parquet file"),
        ("a.xlsx", b"", "is none of .jsonl"),
    ],
)
def test_damaged_file_is_named_with_the_place(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = error(tmp_path / name)
    assert expected in message and name in message


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffq,a\nx,y\n".encode())
    assert load_rows(str(tmp_path / "a.csv"), "train") == [{"q": "x", "a": "y"}]


def test_local_rows_are_read_without_the_hub_library(tmp_path):
    """Neither the network nor the cache can matter to who has not even imported the library."""
    write(tmp_path / "train.jsonl")
    code = (
        "import sys; from distlora.data.sources import load_rows, fetch; fetch(sys.argv[1], 'train');"
        "assert len(load_rows(sys.argv[1], 'train[:50%]')) == 5; assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_offline_hub_is_named(tmp_path):
    """In a process of its own, since the hub's libraries read the variable when they are imported."""
    code = (
        "from distlora.data.sources import load_rows\n"
        "from distlora.errors import UserError\n"
        "try: load_rows('meta-math/MetaMathQA', 'train[:3]')\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (
        "meta-math/MetaMathQA is no local path and not in the local cache, and HF_HUB_OFFLINE is set"
        in run.stdout
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose only data set is a local file: the real loader, with the name replaced. Returns the calls
    it has seen.
    """
    import datasets

    real, calls = datasets.load_dataset, []
    files = {
        "train": str(write(tmp_path / "train.jsonl")),
        "test": str(write(tmp_path / "test.jsonl", ROWS[:4])),
    }

    def load(path, name=None, split=None):
        calls.append((path, name, split))
        return real("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub_rows_equal_local_rows(hub):
    assert list(load_rows("org/name:main", "train[20%:40%]")) == ROWS[2:4]
    assert hub == [("org/name", "main", "train")]
    assert list(load_rows("org/name", "test[-1:]+train[:1]")) == [ROWS[3], ROWS[0]]


def test_fetch_asks_the_hub_for_every_split(hub):
    sources.fetch("org/name", "train[:1]+test")
    assert hub == [("org/name", None, "train"), ("org/name", None, "test")]


def test_unknown_split_of_the_hub_names_the_nearest(hub):
    assert "org/name has no split 'tset', did you mean test? (it has train, test)" in error(
        "org/name", "tset"
    )


def _raising(exception):
    def load(*args, **kwargs):
        raise exception

    return load


def test_what_the_hub_refuses_is_one_sentence(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    cases = [
        (DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub. Log in."), "set HF_TOKEN"),
        (
            DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub."),
            "is neither a local path nor a data set",
        ),
        (ConnectionError("Couldn't reach 'org/name' on the Hub (ConnectError)"), "the hub cannot be reached"),
        (
            ValueError("Config name is missing.\nPick one among: ['main', 'socratic']\nUsage"),
            "['main', 'socratic']",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            "(Dataset scripts are no longer supported)",
        ),
    ]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for exception, expected in cases:
        monkeypatch.setattr(datasets, "load_dataset", _raising(exception))
        assert expected in error("org/name")
