"""Local files as people bring them: what is read, and the sentence with the place for what cannot be."""

import csv
import gzip
import json
import math
import sys

import pyarrow
import pytest
from pyarrow import parquet

from distlora.data.readers import kind_of
from distlora.data.sources import is_local, load_rows
from distlora.errors import UserError

ROWS = [{"q": "a é", "a": "1"}, {"q": "b", "a": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "q,a\na é,1\nb,2\n"


def saved(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refused(path, split="train"):
    with pytest.raises(UserError) as caught:
        load_rows(str(path), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("a.csv", TABLE.encode("utf-16")),
        ("a.tsv", TABLE.replace(",", "\t").encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-32")),
        ("a.json", json.dumps(ROWS).encode("utf-8-sig")),
        ("a.json", LINES),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("a.csv", TABLE.replace("\n", "\r\n")),
        ("a.csv", TABLE.replace("\n", "\r")),
        ("a.csv", "\n" + TABLE.replace("\n", "\n\n")),
    ],
)
def test_the_same_rows_in_every_packing_and_encoding(tmp_path, name, content):
    file = saved(tmp_path, name, content)
    assert load_rows(str(file), "train") == ROWS
    file.rename(tmp_path / name.replace("a.", "train."))
    assert load_rows(str(tmp_path), "train") == ROWS, "packed files are found in a folder, too"


@pytest.mark.parametrize(("name", "layout"), [("a.csv", "q,a\n{},1\n"), ("a.tsv", "q\ta\n{}\t1\n")])
def test_a_cell_may_be_of_any_length_and_the_limit_of_the_process_stays(tmp_path, name, layout):
    limit, long = csv.field_size_limit(), "x" * 200_000
    file = saved(tmp_path, name, layout.format(long))
    assert load_rows(str(file), "train") == [{"q": long, "a": "1"}]
    assert csv.field_size_limit() == limit
    saved(tmp_path, name, layout.format(long) + "1")
    refused(file)
    assert csv.field_size_limit() == limit, "also after an error"


@pytest.mark.parametrize("key", ["data", "splits.train"])
def test_rows_under_a_key_of_one_object(tmp_path, key):
    content = {"version": 1, "data": ROWS, "splits": {"train": ROWS, "test": []}}
    file = saved(tmp_path, "a.json", json.dumps(content, indent=1))
    assert is_local(f"{file}:{key}") and load_rows(f"{file}:{key}", "train[-1:]") == ROWS[1:]
    assert f"name the list of rows after a colon, as in data.path={file}:data" in refused(file)


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"data": [{}]}, ":dta", "has no key 'dta', did you mean data?"),
        ({"data": {"train": [{}]}}, ":data", "lies an object, wanted a list of objects; name"),
        ({"data": [{}]}, ":data.train", "has a list where an object with the key 'train' is named"),
        ({"data": [1]}, ":data", "entry 0 of .*, counted from 0, is a number and not an object"),
        ([{"a": 1}], ":data", "has a list where an object with the key 'data' is named"),
        ({"q": ["a", "b"], "a": ["1", "2"]}, "", "is one object, with the keys q, a; wanted a list of obj"),
        ({"q": {"0": "a"}, "a": {"0": "1"}}, "", "is one object, with the keys q, a; wanted a list of obj"),
        (["a", "b"], "", "entry 0 of .*, counted from 0, is a text and not an object"),
        ([{"a": 1}, None], "", "entry 1 of .*, counted from 0, is null and not an object"),
        (5, "", "entry 0 of .*, counted from 0, is a number"),
    ],
)
def test_what_a_json_file_holds_instead_of_rows(tmp_path, content, key, expected):
    file = saved(tmp_path, "a.json", json.dumps(content))
    with pytest.raises(UserError, match=expected):
        load_rows(f"{file}{key}", "train")


def test_one_object_with_texts_is_one_row(tmp_path):
    assert load_rows(str(saved(tmp_path, "a.json", json.dumps(ROWS[0], indent=2))), "train") == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2 of .*the key 'a' is given twice"),
        ("a.json", '[{"a": 1},\n{"b": 1, "b": 2}]', "the key 'b' is given twice"),
        ("a.csv", "a,b,a\n1,2,3\n", "has two columns called 'a'"),
        ("a.csv", "q;a\n1;2\n", "only one column, called 'q;a'; commas divide the cells of a CSV file"),
        ("a.csv", "q\ta\n1\t2\n", "commas divide the cells of a CSV file"),
        ("a.tsv", "q,a\n1,2\n", "only one column, called 'q,a'; tabs divide the cells of a TSV file"),
        ("a.jsonl", '{"a": 1,}\n', r"line 1 of .* is not valid JSON \(.*\); correct it"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1 of .* nested too deeply"),
        ("a.json", "[" * 100_000, "line 1: .*nested too deeply"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}\n", "line 2 of .*a number has too many digits"),
        ("a.json", '{\n"a": ' + "1" * 5000 + "}\n", "begins on line 1: a number has too many digits"),
        ("a.jsonl", json.dumps(ROWS, indent=1), "line 1 of .* belongs in a file called .json"),
        ("a.jsonl", json.dumps(ROWS), "line 1 of .* is a list .* belongs in a file called .json"),
        ("a.jsonl", json.dumps(ROWS[0], indent=1), "line 1 of .* belongs in a file called .json"),
        ("a.jsonl", '{"a": 1}\n"b"\n', "line 2 of .* is a text and not an object"),
        ("a.csv", "a,b\n1,x\0y\n", "NUL byte in line 2"),
        ("a.tsv", "a\tb\n1\tx\n".encode("utf-16-le"), "NUL byte in line 1: .* UTF-16"),
        ("a.jsonl", LINES.encode("utf-16-le"), "NUL byte in line 1|is not UTF-8"),
        ("a.json", '[{"a":\n"x\0"}]', "NUL byte in line 2"),
        ("a.csv", "a,b\n1,2\n\xe9,2\n".encode("latin-1"), r"is not UTF-8 text \(line 3\)"),
        ("a.json", "[\n\xe9".encode("latin-1"), r"is not UTF-8 text \(line 2\)"),
        ("a.csv", "\xff\xfea".encode("latin-1"), "is not UTF-8 text"),
        ("a.csv", 'a,b\n1,"x"y\n', r"is not valid CSV \(line 2: "),
        ("a.csv", 'a,b\n1,"x\ny\n', r"is not valid CSV \(line 3: "),
        ("a.tsv", "a\tb\n1\t2\n\n3\n", r"row 1 of .* \(1 cell and 2 columns, line 4\)"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "is damaged"),
        ("a.jsonl.gz", LINES, "is damaged"),
        ("a.jsonl.gz", gzip.compress(b"\xff\n", mtime=0), r"is not UTF-8 text \(line 1\)"),
        ("a.parquet.gz", b"", "unpack it or convert it"),
        ("a.jsonl.zst", b"", "unpack it or convert it"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_the_place(tmp_path, name, content, expected):
    file = saved(tmp_path, name, content)
    with pytest.raises(UserError, match=expected) as caught:
        load_rows(str(file), "train")
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    assert load_rows(str(saved(tmp_path, name, "")), "train") == []
    assert load_rows(str(saved(tmp_path, name, "\ufeff\n")), "train") == []


def _parquet(file, table, **options):
    parquet.write_table(table, file, **options)
    return file.read_bytes()


def test_parquet_that_is_damaged_anywhere_is_one_sentence(tmp_path):
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"q": [f"text {number}" for number in range(500)], "n": list(range(500))})
    whole = _parquet(file, table, compression="snappy")
    outcomes = set()
    for start in range(0, len(whole), max(1, len(whole) // 60)):
        for damage in (b"\xff" * 8, b"\0" * 8):
            file.write_bytes(whole[:start] + damage + whole[start + 8 :])
            try:
                load_rows(str(file), "train")
                outcomes.add("read")
            except UserError as error:
                assert "a.parquet" in str(error) and "\n" not in str(error)
                outcomes.add("refused")
    assert "refused" in outcomes
    for length in (0, 3, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "is not a parquet file, or is damaged" in refused(file)


def test_parquet_with_what_python_cannot_hold_is_one_sentence(tmp_path):
    file = tmp_path / "a.parquet"
    text = pyarrow.array([b"\xff\xfe"]).view(pyarrow.binary()).cast(pyarrow.string(), safe=False)
    _parquet(file, pyarrow.table({"q": text}))
    assert "a.parquet" in refused(file)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["q", "q"])
    _parquet(file, twice)
    assert "has two columns called 'q'" in refused(file)


def test_values_are_named_in_the_words_of_data_files():
    values = [None, True, math.nan, -math.inf, sys.maxsize, "x", [1], {"a": 1}, b"x"]
    named = ["null", "true", "NaN", "-infinity", "a number", "a text", "a list", "an object", "bytes"]
    assert list(map(kind_of, values)) == named
