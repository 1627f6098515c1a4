"""Whole numbers beyond every float, as JSON may hold them, in every kind of cell."""

import json
from types import SimpleNamespace

import pytest

from distlora.data import CompletionRows, LabelledRows
from distlora.errors import UserError

LONG = {"positive": 10**400, "negative": -(10**400)}


def rows_of(tmp_path, kind, task, **row):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row) + "\n")
    section = {"fields": {name: name for name in row}, "template": None, "max_length": 40, "labels": None}
    if task == "classification":
        section["labels"] = ["a", "b"]
    return list(kind(SimpleNamespace(task=task, path=str(file), **section), "train"))


@pytest.mark.parametrize("sign", LONG)
def test_as_text_it_is_its_digits(tmp_path, sign):
    assert rows_of(tmp_path, CompletionRows, "completion", text=LONG[sign]) == [str(LONG[sign])]


@pytest.mark.parametrize("sign", LONG)
@pytest.mark.parametrize("task", ["classification", "stsb"])
@pytest.mark.parametrize("kind", [int, str])
def test_as_label_or_score_it_is_refused(tmp_path, sign, task, kind):
    texts = {"text": "a"} | ({"pair": "b"} if task == "stsb" else {})
    with pytest.raises(UserError, match="which is n"):
        rows_of(tmp_path, LabelledRows, task, **texts, label=kind(LONG[sign]))
