"""The files of a split in a directory: every shard once, and where the rows lie if they are elsewhere."""

from types import SimpleNamespace

import pytest

from distlora.data import load_images
from distlora.data.sources import load_rows
from distlora.errors import UserError


def folder_of(path, *names):
    """Files with one row each, which holds the file's name."""
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text(f'[{{"text": "{name}"}}]' if ".json" in name else f"text\n{name}\n")
    return path


def refused(path, split="train"):
    with pytest.raises(UserError) as caught:
        load_rows(str(path), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.json", "train-00001-of-00002.json"],
        ["train-00001-of-00002.json", "train-00002-of-00002.json"],
        [f"train-{number}-of-12.csv" for number in range(12)],
        ["train-00000-of-00001-0123456789abcdef.json"],
    ],
)
def test_whole_sets_of_shards_are_read_in_order(tmp_path, names):
    folder_of(tmp_path, *names, "test-00000-of-00003.json")
    assert load_rows(str(tmp_path), "train") == [{"text": name} for name in names]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train-00000-of-00003.json", "train-00002-of-00003.json"], "of 3 shards, counted from 0, 1 is mis"),
        (["train-00002-of-00003.json"], "counted from 0, 0, 1 are missing"),
        (["train-0-of-100000099.json"], "counted from 0, 1, 2, 3, 4, 5 and 100000093 more are missing"),
        (
            ["train-00000-of-00001.json", "train-00000-of-00001.csv"],
            "train-00000-of-00001.csv and train-00000-of-00001.json are the same shard",
        ),
        (
            ["train-0-of-1.json", "train-00000-of-00001.json"],
            "train-0-of-1.json and train-00000-of-00001.json are the same shard",
        ),
        (
            ["train-00000-of-00001.json", "train-00000-of-00002.json", "train-00001-of-00002.json"],
            "train-00000-of-00001.json and train-00000-of-00002.json belong to different sets",
        ),
        (["train-00000-of-00002.json", "train-00001-of-00002.csv"], "are in different formats"),
        (
            ["train-00000-of-00002.json", "train-00002-of-00002.json"],
            "train-00002-of-00002.json has a number",
        ),
        (["train-00000-of-00000.json"], "train-00000-of-00000.json has a number that no shard of 0 has"),
        (["train.json", "train-00000-of-00001.json"], "could be"),
    ],
)
def test_shards_that_are_missing_or_double_are_named(tmp_path, names, told):
    assert told in refused(folder_of(tmp_path, *names))


def test_folder_below_with_the_files_of_the_split_is_named(tmp_path):
    folder_of(tmp_path / "data", "train-00000-of-00001.json", "test-00000-of-00001.json")
    folder_of(tmp_path / "docs", "other.json")
    assert f"its files lie in {tmp_path / 'data'}; name that folder in data.path" in refused(tmp_path)
    assert refused(tmp_path, "dev").endswith("(it has no .jsonl, .json, .csv, .tsv, .parquet file)")


def test_numbered_files_of_a_split_are_all_named(tmp_path):
    folder_of(tmp_path, "train-1.json", "train-2.json", "test.json")
    assert "for the rows of all of train-1, train-2 write train-1+train-2 as the split" in refused(tmp_path)
    assert len(load_rows(str(tmp_path), "train-1+train-2")) == 2


def test_folder_below_with_tables_of_images_is_named(tmp_path):
    folder_of(tmp_path / "data", "train-00000-of-00001.json")
    section = SimpleNamespace(
        task="cifar10",
        path=str(tmp_path),
        split="train",
        fields=None,
        template=None,
        labels=None,
        max_length=9,
    )
    with pytest.raises(
        UserError, match=r"data holds .*train-00000-of-00001.json; name that folder in data.p"
    ):
        load_images(section, "train")
