"""Data files that are made to fill the memory or to break a parser: one sentence each, in bounded memory."""

import gzip
import io
import json
import os
import re
import zipfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from distlora.data import load_images
from distlora.data.readers import packed, text
from distlora.data.sources import load_rows, parse_split
from distlora.errors import UserError
from distlora.evaluation.judge_file import judge_file
from distlora.files.user_paths import user_path
from distlora.tasks import TASKS
from tests.fuzz.data import section
from tests.fuzz.rule import Loader, outcome


def refused(read) -> str:
    """The sentence, which came within the limits of time and memory."""
    sentence = outcome(Loader("test", None, lambda example, folder: read(folder)), None)
    assert sentence is not None
    return sentence


def _bomb(piece: bytes, times: int) -> bytes:
    """Of many members, which unpack to a text that goes on and on."""
    return gzip.compress(piece) * times


MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    ("name", "piece", "told"),
    [
        ("x.jsonl.gz", b'{"a": 1}  \n' * (MEBIBYTE // 11), "more than 50 times its own size"),
        ("x.jsonl.gz", b"a" * MEBIBYTE, "characters, divide it"),
        ("x.jsonl.gz", b"\0" * MEBIBYTE, "NUL"),
        ("x.json.gz", b" " * MEBIBYTE, "more than 50 times its own size"),
        ("x.csv.gz", b'"' + b"a" * MEBIBYTE, "characters, divide it|not valid CSV"),
        ("x.tsv.gz", b"a\t" * (MEBIBYTE // 2), "characters, divide it"),
    ],
)  # fmt: skip
def test_archives_that_unpack_without_end_are_refused(name, piece, told, monkeypatch):
    monkeypatch.setattr(packed, "FREE", 8 * MEBIBYTE)
    monkeypatch.setattr(text, "LONGEST_LINE", 4 * MEBIBYTE)

    def read(folder):
        (folder / name).write_bytes(_bomb(piece, 24))
        load_rows(str(folder / name), "train")

    assert re.search(told, refused(read))


def test_a_bomb_of_ten_gibibytes_takes_no_memory():
    """In the packed labels of a folder of images, and as rows."""

    def read(folder):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(_bomb(bytes(16 * MEBIBYTE), 640))
        (folder / "train-labels-idx1-ubyte").write_bytes(b"")
        load_images(section("mnist", folder), "train")

    assert "more than 50 times its own size" in refused(read)


def test_packed_files_that_are_none_are_read_as_before(tmp_path):
    rows = [{"text": "a" * 1000, "n": number} for number in range(2000)]
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert load_rows(str(file), "train") == rows, "however small it is packed"


def test_more_rows_than_a_parquet_file_can_hold_are_refused():
    def read(folder):
        table = pyarrow.table({"a": pyarrow.repeat(7, (1 << 24) + 1)})
        parquet.write_table(table, folder / "x.parquet")
        assert (folder / "x.parquet").stat().st_size < MEBIBYTE
        load_rows(str(folder / "x.parquet"), "train")

    assert "more than 50 times its own size" in refused(read)


def _npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 28, 28), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 28, 28), }",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (999999999999,), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "-" * 5000 + "1,), }",
        "(" * 9000, "x", "",
    ],
    ids=range(8),
)  # fmt: skip
def test_headers_of_arrays_that_promise_too_much_are_refused(header):
    def read(folder):
        with zipfile.ZipFile(folder / "train.npz", "w") as archive:
            archive.writestr("images.npy", _npy(header))
            archive.writestr("labels.npy", _npy(header))
        load_images(section("images", folder, labels=["a", "b"]), "train")

    assert "train.npz" in refused(read)


def test_an_archive_of_arrays_that_unpacks_to_much_more_is_refused():
    def read(folder):
        images = np.zeros((2000, 200, 200), np.uint8)
        np.savez_compressed(folder / "train.npz", images=images, labels=np.zeros(2000, np.int64))
        load_images(section("images", folder, labels=["a", "b"]), "train")

    assert "more than 50 times its own size" in refused(read)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"BUFR" + bytes(9), b""]
)
def test_images_that_programs_beside_pillow_would_read_are_none(content):
    def read(folder):
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "1.png").write_bytes(content)
        load_images(section("images", folder), "train")

    assert "cannot be read (it is none)" in refused(read)


def test_a_picture_of_many_pixels_is_refused():
    def read(folder):
        stream = io.BytesIO()
        Image.new("1", (30_000, 30_000)).save(stream, "png")
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "1.png").write_bytes(stream.getvalue())
        load_images(section("images", folder), "train")

    assert "cannot be read" in refused(read)


@pytest.mark.parametrize(
    "split", ["+".join(["train"] * 5000), "train[:" + "9" * 5000 + "]", "train[١:٢]", "train[0:1e9]"]
)
def test_splits_that_no_data_set_has(split):
    assert "data: split" in refused(lambda folder: parse_split(split))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300, "x/" * 3000])
def test_paths_that_no_file_can_have(name):
    assert refused(lambda folder: user_path(name, "data.path")).startswith("data.path: ")
    if "/" not in name:
        assert refused(lambda folder: load_rows(f"./{name}", "train"))


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), lambda path: path.touch()]
)
@pytest.mark.parametrize("name", ["x", "x.jsonl.gz", "x.npz"])
def test_what_is_no_file_of_rows_is_not_waited_for(name, make):
    def read(folder):
        make(folder / name)
        if name == "x.npz":
            load_images(section("mnist", folder / name), "train")
        load_rows(str(folder / name), "train")
        raise UserError("data.path: no rows")

    assert "data.path: " in refused(read)


@pytest.mark.parametrize(
    "line",
    ['{"output": "x", "answer": ' + "9" * 5000 + "}", "[" * 100_000, '{"output": 1, "answer": "x"}', "\x00"],
    ids=range(4),
)
def test_answers_that_are_none(line):
    def read(folder):
        (folder / "in").write_text(line)
        judge_file("gsm8k", folder / "in", folder / "out")

    assert "line 1" in refused(read)


@pytest.mark.parametrize("task", ["gsm8k", "math"])
@pytest.mark.parametrize("piece", ["(", "-", "\\frac{1", "\\boxed{", "1,", "$", "one ", "((1", "{"])
def test_long_answers_are_judged_in_time(task, piece):
    long = piece * (4000 // len(piece))

    def read(folder):
        TASKS[task].judge(long, "7")
        TASKS[task].judge("#### 7", long)
        raise UserError("read")

    assert refused(read) == "read"
