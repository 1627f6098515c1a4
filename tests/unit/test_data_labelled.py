"""Classification data: every task's columns and labels, the official TSV files, tokens, batches, and what bad
data gets.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from distlora.data import LabelledRows, LabelledSample, collate_labelled, label_names, load_labelled
from distlora.errors import UserError
from distlora.tasks import TASKS, LabelTask
from tests.tiny_models import tiny_encoder_tokenizer

#: The first lines of each task's official training file, and what they say.
OFFICIAL = {
    "cola": ("gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey drank the pub.\n",
             [("Our friends won't buy this.", None, 1), ("They drank the pub.", None, 0)]),
    "sst2": ("sentence\tlabel\nhide new secretions \t0\na \"fine\" film\t1\n",
             [("hide new secretions ", None, 0), ('a "fine" film', None, 1)]),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tHe said \" no\tNo , he said\n",
             [('He said " no', "No , he said", 1)]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n",
            [("Why?", "How?", 0)]),
    "mnli": ("index\tsentence1\tsentence2\tgold_label\n0\tA.\tB.\tneutral\n1\tA.\tC.\tcontradiction\n",
             [("A.", "B.", 1), ("A.", "C.", 2)]),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWho?\tIt.\tnot_entailment\n",
             [("Who?", "He.", 0), ("Who?", "It.", 1)]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n", [("A.", "B.", 1)]),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n", [("A.", "B.", 1)]),
}  # fmt: skip
LABEL_TASKS = [name for name, task in TASKS.items() if isinstance(task, LabelTask)]


def section(path, task="rte", **more):
    settings = {"fields": None, "template": None, "labels": None, "max_length": 40}
    return SimpleNamespace(task=task, path=str(path), **(settings | more))


def rows_file(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("task", [name for name in LABEL_TASKS if TASKS[name].labels])
def test_official_files(tmp_path, task):
    text, expected = OFFICIAL[task]
    (tmp_path / "train.tsv").write_text(text, encoding="utf-8")
    assert list(LabelledRows(section(tmp_path, task), "train")) == expected


@pytest.mark.parametrize("task", [name for name in LABEL_TASKS if TASKS[name].labels])
def test_rows_as_on_the_hub(tmp_path, task):
    """The first names of the columns are the hub's, and its labels are numbers."""
    columns = {role: names[0] for role, names in TASKS[task].columns.items()}
    row = {column: "some text" for column in columns.values()} | {columns["label"]: 1, "idx": 7}
    second = "some text" if "pair" in columns else None
    file = rows_file(tmp_path, row, row | {columns["label"]: -1})
    assert list(LabelledRows(section(file, task), "train")) == [
        ("some text", second, 1),
        ("some text", second, None),
    ]


def test_the_dev_file_is_the_validation_split_unless_there_is_one(tmp_path):
    head = "sentence\tlabel\n"
    (tmp_path / "dev.tsv").write_text(head + "from dev\t1\n")
    assert list(LabelledRows(section(tmp_path, "sst2"), "validation"))[0][0] == "from dev"
    (tmp_path / "validation.tsv").write_text(head + "from validation\t1\n")
    assert list(LabelledRows(section(tmp_path, "sst2"), "validation"))[0][0] == "from validation"
    with pytest.raises(UserError, match="no file for split 'test'"):
        LabelledRows(section(tmp_path, "sst2"), "test")


def test_a_copy_of_cola_that_names_its_columns(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nIt is.\t1\n")
    assert list(LabelledRows(section(tmp_path, "cola"), "train")) == [("It is.", None, 1)]


def test_own_data_with_labels_by_name_or_number(tmp_path):
    file = rows_file(tmp_path, *({"t": "x", "kind": kind} for kind in ("spam", "0", 1, " ham ", None, "")))
    own = section(file, "classification", fields={"text": "t", "label": "kind"}, labels=["ham", "spam"])
    assert label_names(own) == ("ham", "spam")
    assert [label for *_, label in LabelledRows(own, "train")] == [1, 0, 1, 0, None, None]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": ["a", "b"]}, "data.labels: the task rte has its own labels"),
        ({"task": "classification"}, "data.labels: the task classification needs them"),
        ({"task": "classification", "labels": ["a", "a"]}, "not at least two different names"),
        ({"task": "classification", "labels": ["1", "1.0"]}, "not at least two different names"),
        ({"task": "classification", "labels": ["a"]}, "not at least two different names"),
        ({"task": "classification", "labels": ["a", "b"]}, "data.fields: no column for text"),
        ({"template": "{text}"}, "data.template: the task rte shows texts as they are"),
        ({"fields": {"txet": "sentence1"}}, "data.fields: unknown name 'txet', did you mean text?"),
        ({"fields": {"text": "sentense1"}}, "no column 'sentense1', did you mean sentence1?"),
        ({"task": "sst2"}, "text of the task sst2: .* has no column 'sentence'"),
    ],
)
def test_what_is_wrong_with_the_section(tmp_path, change, expected):
    file = rows_file(tmp_path, {"sentence1": "a", "sentence2": "b", "label": 0})
    with pytest.raises(UserError, match=expected):
        LabelledRows(section(file, **change), "train")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"label": "maybe"},
            "row 1 of .* has the label 'maybe', which is none of entailment, not_entailment or 0 to 1",
        ),
        ({"label": 2}, "has the label 2, which is none of"),
        ({"sentence2": None}, "row 1 of .* has no value in column 'sentence2'"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, row, expected):
    good = {"sentence1": "a", "sentence2": "b", "label": 0}
    with pytest.raises(UserError, match=expected):
        list(LabelledRows(section(rows_file(tmp_path, good, good | row)), "train"))


def test_a_ragged_tsv_file_is_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nIt is.\t1\nIt was.\n")
    with pytest.raises(UserError, match="row 1 of .* has not as many cells as the header"):
        LabelledRows(section(tmp_path, "sst2"), "train")


# ---------------------------------------------------------------------- tokens


def load(tmp_path, tokenizer, *rows, **more):
    return load_labelled(section(rows_file(tmp_path, *rows), **more), "train", tokenizer)


def test_a_pair_is_tokenised_by_the_tokenizers_own_rules(tmp_path, monkeypatch):
    monkeypatch.setattr("distlora.data.encode.CHUNK", 2)  # rows of several chunks stay in order
    rows = [
        {"sentence1": f"Tom has {n} apples", "sentence2": "How many?" * n, "label": n % 2}
        for n in range(1, 6)
    ]
    for name in ("bert", "roberta"):
        tokenizer = tiny_encoder_tokenizer(name)
        encoded = load(tmp_path, tokenizer, *rows, max_length=400)
        assert (encoded.truncated, encoded.dropped) == (0, 0)
        for row, sample in zip(rows, encoded.samples, strict=True):
            alone = tokenizer(row["sentence1"], row["sentence2"])
            assert sample == LabelledSample(alone["input_ids"], alone.get("token_type_ids"), row["label"])
        assert (encoded.samples[0].segments is None) == (name == "roberta")


def test_long_rows_are_cut_and_counted_and_unlabelled_ones_dropped(tmp_path):
    tokenizer = tiny_encoder_tokenizer("bert")
    long = {"sentence1": "apples " * 30, "sentence2": "How many?", "label": 1}
    short = {"sentence1": "a", "sentence2": "b", "label": 0}
    encoded = load(tmp_path, tokenizer, short, long, short | {"label": -1}, max_length=20)
    assert (encoded.truncated, encoded.dropped, encoded.why_dropped) == (1, 1, "they have no label")
    assert [sample.label for sample in encoded.samples] == [0, 1]
    ids, end = encoded.samples[1].input_ids, tokenizer.sep_token_id
    assert len(ids) == 20 and ids[-1] == end
    second = tokenizer("How many?", add_special_tokens=False)["input_ids"]
    assert ids[-len(second) - 1 : -1] == second, "the longer text is cut first"


def test_a_split_without_any_label_is_refused(tmp_path):
    with pytest.raises(UserError, match="no row of .* has a label"):
        load(tmp_path, tiny_encoder_tokenizer("bert"), {"sentence1": "a", "sentence2": "b", "label": -1})


# ---------------------------------------------------------------------- batches


def test_collate():
    batch = collate_labelled([LabelledSample([5, 6, 7], [0, 0, 1], 2), LabelledSample([8], [0], 0)], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [2, 0] and batch["labels"].dtype == torch.int64
    assert "token_type_ids" not in collate_labelled([LabelledSample([5], None, 2)], pad_id=1)


def test_an_empty_batch_has_no_label():
    batch = collate_labelled([], pad_id=1)
    assert (
        batch["labels"].tolist() == [-100]
        and batch["input_ids"].shape == (1, 2)
        and batch["attention_mask"].all()
    )
