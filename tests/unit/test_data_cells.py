"""Cells as texts, labels and scores: read as what they say, or refused with row and column."""

import json
import math
from datetime import date
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

from distlora.data import Examples, LabelledRows
from distlora.data.columns import cell_text, columns_of, require_column
from distlora.data.labels import LabelNames, is_unlabelled, number_in
from distlora.errors import UserError


def section(path, task, **more):
    settings = {"fields": None, "template": None, "labels": None, "think_step_by_step": None}
    return SimpleNamespace(task=task, path=str(path), max_length=64, **(settings | more))


def jsonl(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((word, word) for word in ("null", "NA", "nan", "None", "N/A", "true", "1.0", "007", "")),
        (1, "1"), (1.5, "1.5"), (np.int64(3), "3"), (np.float32(0.5), "0.5"), (np.str_("x"), "x"),
        (Decimal("1.50"), "1.50"), (10**30, "1" + "0" * 30),
    ],
)  # fmt: skip
def test_texts_and_finite_numbers_are_text(value, text):
    assert cell_text({"q": value}, "q", 0, "x.json") == text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (math.nan, "NaN"), (np.float64("nan"), "NaN"), (np.float32("nan"), "NaN"), (math.inf, "infinity"),
        (-math.inf, "-infinity"), (Decimal("NaN"), "NaN"), (None, "no value"), ([1], "a list"),
        ({"a": 1}, "an object"), (b"x", "bytes"), (date(2020, 1, 1), "a date"), (np.array([1]), "a list"),
        ("\ud83d", "an unpaired surrogate"), ("x\udc00", "an unpaired surrogate"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named_with_row_and_column(value, found):
    with pytest.raises(UserError, match=f"row 7 of x.json, counted from 0, has {found}.* in column 'q'"):
        cell_text({"q": value}, "q", 7, "x.json")


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("instruct", {"instruction": "a", "output": math.nan}, "output"),
        ("instruct", {"instruction": "a", "output": "b", "input": math.nan}, "input"),
        ("instruct", {"instruction": math.inf, "output": "b"}, "instruction"),
        ("gsm8k", {"question": "a", "answer": math.nan}, "answer"),
        ("boolq", {"question": "a", "passage": math.nan, "answer": True}, "passage"),
    ],
)
def test_nan_is_no_text_in_any_column(tmp_path, task, row, column):
    file = jsonl(tmp_path, {key: "x" for key in row} | {"answer": True}, row)
    with pytest.raises(UserError, match=f"row 1 of .*, counted from 0, has (NaN|infinity) in .*'{column}'"):
        list(Examples(section(file, task), "train"))


# ---------------------------------------------------------------------- columns that some rows lack


def test_columns_are_those_of_all_rows():
    rows = [{"a": 1}, {"b": 1, "a": 2}, {"c": 1}]
    assert columns_of(rows) == ["a", "b", "c"]
    require_column(rows, "c", "data.fields", "x.json")
    with pytest.raises(UserError, match=r"no column 'd'.* \(it has a, b, c\)"):
        require_column(rows, "d", "data.fields", "x.json")


@pytest.mark.parametrize("order", [1, -1])
def test_optional_columns_may_come_with_any_row(tmp_path, order):
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": "o", "context": "x"}][::order]
    own = section(jsonl(tmp_path, *rows), "instruct", fields={"input": "context"})
    prompts = [example.prompt for example in Examples(own, "train")][::order]
    assert "x" in prompts[1].split("### Input:")[1] and "### Input:" not in prompts[0]
    rows = [{"p": "a", "r": "b"}, {"p": "a", "r": "b", "answer": "c"}][::order]
    fields = {"prompt": "p", "response": "r", "answer": "answer"}
    own = section(jsonl(tmp_path, *rows), "text", fields=fields, template="{prompt}")
    assert [example.answer for example in Examples(own, "train")][::order] == ["b", "c"]


def test_a_needed_column_that_one_row_lacks_is_named_with_the_row(tmp_path):
    file = jsonl(tmp_path, {"p": "a", "r": "b"}, {"r": "b"})
    own = section(file, "text", fields={"prompt": "p", "response": "r"}, template="{prompt}")
    with pytest.raises(UserError, match="row 1 of .*, counted from 0, has no value in column 'p'"):
        list(Examples(own, "train"))


# ---------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "cells", "numbers"),
    [
        (["no", "yes"], ["1.0", 1.0, "1", 1, "1.", "+1", " yes ", np.int64(1), np.float32(1)], [1] * 9),
        (["no", "yes"], ["0", 0.0, "-0", "no"], [0] * 4),
        (["false", "true"], [True, "True", "TRUE", "true", np.True_], [1] * 5),
        (["True", "False"], [True, False, "false"], [0, 1, 1]),
        (["-1", "0", "1"], [-1, "-1", -1.0, "-1.0", 0, 1], [0, 0, 0, 0, 1, 2]),
        (["-1", "+1"], ["+1", 1, 1.0, "-1"], [1, 1, 1, 0]),
        (["1", "2", "3"], [1, 2.0, "3"], [0, 1, 2]),
        (["1.0", "2.0"], [1, "2.0"], [0, 1]),
        (["-", "+"], ["-", "+", "0", 1], [0, 1, 0, 1]),
        (["007", "7"], ["007", "7", 7], [0, 1, 1]),
    ],
)
def test_a_label_is_what_the_cell_says(names, cells, numbers):
    assert [LabelNames(names).number(cell) for cell in cells] == numbers


@pytest.mark.parametrize(
    ("names", "cells"),
    [
        (["1", "2", "3"], [0, "0", 4, True]),
        (["no", "yes"], [2, "1.5", True, "false", math.nan, "x", "01", [1], b"no"]),
        (["3", "other"], [0, 1]),
    ],
)
def test_what_names_no_label_is_neither_another_one_nor_a_row_without_one(names, cells):
    for cell in cells:
        assert LabelNames(names).number(cell) is None and not is_unlabelled(cell)


@pytest.mark.parametrize("cell", [None, "", " ", "-", -1, "-1", -1.0, "-1.0"])
def test_rows_without_a_label_where_no_name_is_called_so(tmp_path, cell):
    file = jsonl(tmp_path, {"t": "a", "l": cell}, {"t": "a", "l": "b"})
    own = section(file, "classification", fields={"text": "t", "label": "l"}, labels=["a", "b"])
    assert [label for *_, label in LabelledRows(own, "train")] == [None, 1]


@pytest.mark.parametrize(
    ("names", "cell", "said"),
    [
        (["1", "2", "3"], 0, "has the label 0, which is none of 1, 2, 3$"),
        (["no", "yes"], True, 'has the label true, which is none of no, yes or 0 to 1; name .* "true"'),
        (["no", "yes"], math.nan, "has the label NaN, .*; leave it empty, or null, where a row has no label"),
        (["no", "yes"], ["no"], "has the label a list, which"),
        (["no", "yes"], "nein", "has the label 'nein', which is none of no, yes or 0 to 1$"),
    ],
)
def test_the_sentence_speaks_the_datas_language(tmp_path, names, cell, said):
    file = jsonl(tmp_path, {"t": "a", "l": names[0]}, {"t": "a", "l": cell})
    own = section(file, "classification", fields={"text": "t", "label": "l"}, labels=names)
    with pytest.raises(UserError, match=f"row 1 of .*, counted from 0, {said}"):
        list(LabelledRows(own, "train"))


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("cell", "score"), [("1.5", 1.5), (2, 2.0), (" 3 ", 3.0), ("1e0", 1.0), (np.float32(0.5), 0.5)]
)
def test_scores(cell, score):
    assert number_in(cell) == score


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("1,5", "has the score '1,5', .* write it as 1.5"),
        (math.nan, "has the score NaN, which is no number from 0 to 5"),
        ("1_0", "has the score '1_0', which is no number"),
        (True, "has the score true, which is no number"),
        ("inf", "has the score 'inf', which is no number"),
    ],
)
def test_what_is_no_score(tmp_path, cell, said):
    good = {"sentence1": "a", "sentence2": "b", "label": 2}
    file = jsonl(tmp_path, good, good | {"label": cell})
    with pytest.raises(UserError, match=f"row 1 of .*, counted from 0, {said}"):
        list(LabelledRows(section(file, "stsb"), "train"))
