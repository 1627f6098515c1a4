"""Labels that the data hold as numbers: by the data set's own names for them, and never by a guess."""

import json
from types import SimpleNamespace

import pytest

from distlora.data import LabelledRows
from distlora.errors import UserError


def section(path, labels, task="classification", fields=None):
    return SimpleNamespace(
        task=task, path=str(path), template=None, labels=labels, max_length=40,
        fields={"text": "text", "label": "label"} if labels else fields,
    )  # fmt: skip


def labels_of(tmp_path, cells, labels, **more):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "label": cell}) + "\n" for cell in cells))
    return [row[2] for row in LabelledRows(section(file, labels, **more), "train")]


THREE = ["negative", "neutral", "positive"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([-1, 0, 1], THREE),
        (["-1", "0", "1", "1"], THREE),
        ([-1.0, 0.0, 1.0, None], THREE),
        ([-1, 0], THREE),
        ([-1, 1], ["negative", "positive"]),
        ([1, 2], THREE),
        (["1", "2", "3", "4"], ["a", "b", "c", "d", "e"]),
    ],
)
def test_numbers_that_may_be_shifted_are_refused(tmp_path, cells, labels):
    with pytest.raises(UserError, match=r"data.labels: column 'label' of .* list the labels as numbers"):
        labels_of(tmp_path, cells, labels)


@pytest.mark.parametrize(
    ("cells", "labels", "expected"),
    [
        ([-1, 0, 1, 2], THREE, [None, 0, 1, 2]),
        ([-1, -1], THREE, [None, None]),
        ([-1, 0, 1], ["-1", "0", "1"], [0, 1, 2]),
        ([-1, 0, 1], ["0", "1", "2"], [None, 0, 1]),
        ([1, 2, 3], ["1", "2", "3"], [0, 1, 2]),
        ([-1, "negative", "neutral"], THREE, [None, 0, 1]),
        ([1, 1], ["negative", "positive"], [1, 1]),
        ([0, 1], THREE, [0, 1]),
    ],
)
def test_numbers_that_say_what_they_mean_are_read(tmp_path, cells, labels, expected):
    assert labels_of(tmp_path, cells, labels) == expected


def test_own_labels_of_a_task_have_its_own_numbers(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"sentence": "a", "label": label} for label in (-1, 0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row[2] for row in LabelledRows(section(file, None, "sst2"), "train")] == [None, 0]


@pytest.mark.parametrize("names", [["1 star", "2 stars", "3 stars"], ["18-24", "25-34", "35+"]])
@pytest.mark.parametrize("cell", [0, 1, "2"])
def test_names_that_begin_with_a_digit_are_not_counted(tmp_path, names, cell):
    with pytest.raises(UserError, match="which is none of .*; names that begin with a digit are not counted"):
        labels_of(tmp_path, [cell], names)
    assert labels_of(tmp_path, [names[1], -1], names) == [1, None]


@pytest.fixture
def hub(monkeypatch):
    """Sets the names that the only data set of the hub has for its labels 0, 1, …"""
    import datasets

    def holding(names, labels=None):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        cells = [*range(len(names)), -1]
        rows = datasets.Dataset.from_dict({"text": ["a"] * len(cells), "label": cells}, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, split=None: rows)

    return holding


def of_hub(labels, task="classification", **more):
    return [row[2] for row in LabelledRows(section("org/name", labels, task, **more), "train")]


def test_names_of_the_data_set_count_whatever_the_order_of_the_labels(hub):
    hub(["positive", "negative"])
    assert of_hub(["negative", "positive"]) == [1, 0, None]
    assert of_hub(["positive", "negative"]) == [0, 1, None]
    hub(["1 star", "2 star", "3 stars"])
    assert of_hub(["1 star", "2 star", "3 stars"]) == [0, 1, 2, None]
    hub(["1", "2", "3"])
    assert of_hub(["3", "2", "1"]) == [2, 1, 0, None]


def test_other_names_than_those_of_the_data_set_are_refused(hub):
    hub(["positive", "negative"])
    for labels in (["bad", "good"], ["negative", "neutral", "positive"]):
        with pytest.raises(UserError, match=r"data.labels: .* \(positive, negative\); list these names"):
            of_hub(labels)
    assert of_hub(["0", "1"]) == [0, 1, None], "numbers mean the numbers in the column"


def test_own_labels_of_a_task_follow_the_names_of_the_data_set(hub):
    names = {"text": "text", "label": "label"}
    hub(["positive", "negative"])
    assert of_hub(None, "sst2", fields=names) == [1, 0, None]
    hub(["no", "yes"])
    assert of_hub(None, "sst2", fields=names) == [0, 1, None]


def test_local_copies_of_a_data_set_of_the_hub_keep_its_names(tmp_path):
    import datasets

    def save(name, names):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / name)

    def read(labels, split="train"):
        return [row[2] for row in LabelledRows(section(tmp_path, labels), split)]

    save("train-00000-of-00002.parquet", ["positive", "negative"])
    save("train-00001-of-00002.parquet", ["positive", "negative"])
    save("test.parquet", ["negative", "positive"])
    assert read(["negative", "positive"]) == [1, 0, 1, 0]
    assert read(["negative", "positive"], "test[:1]") == [0]
    with pytest.raises(UserError, match=r"\(positive, negative\); list these names"):
        read(["bad", "good"])
    with pytest.raises(
        UserError, match="column 'label' has other names for its numbers in train than in test"
    ):
        read(["negative", "positive"], "train+test")
