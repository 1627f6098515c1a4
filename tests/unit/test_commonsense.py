"""The eight commonsense tasks: the hub's rows and those of LLM-Adapters are the same questions, with the same
options; and what wrong rows get.

tests/data/commonsense_rows.json has rows of each data set, with the hub's columns and as the files of
LLM-Adapters have them.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from distlora.data import load_questions, load_split
from distlora.data.examples import Examples
from distlora.errors import UserError
from distlora.tasks import SUITES, TASKS, get_task
from tests.unit.test_data_encode import make_tokenizer

ROWS = json.loads((Path(__file__).parents[1] / "data" / "commonsense_rows.json").read_text())
DATA = Path(os.environ.get("DISTLORA_TEST_DATA", "../shared/data")) / "commonsense"
HUB = {each["task"]: each["hub"] for each in ROWS}
every_pair = pytest.mark.parametrize("pair", ROWS, ids=[each["task"] for each in ROWS])


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def section_of(path, task, **more):
    settings = {"fields": None, "template": None, "think_step_by_step": None, "max_length": 2000}
    return SimpleNamespace(task=task, path=str(path), **(settings | more))


def section(tmp_path, task, *rows, **more):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return section_of(tmp_path, task, **more)


def test_there_is_a_row_of_each():
    assert set(HUB) == set(SUITES["commonsense"]) and len(HUB) == 8


@every_pair
@pytest.mark.parametrize("template", [None, "paper", "{prompt}"])
def test_both_copies_are_the_same_text(tmp_path, tokenizer, pair, template):
    def read(row):
        data = section(tmp_path, pair["task"], row, template=template)
        questions = load_questions(data, "test", tokenizer)
        return load_split(data, "test", tokenizer).samples, questions.items, questions.digest

    assert read(pair["hub"]) == read(pair["llm_adapters"])


@every_pair
def test_the_options_are_the_responses_that_are_possible(tmp_path, tokenizer, pair):
    data = section(tmp_path, pair["task"], pair["hub"])
    (item,), (sample,) = (
        load_questions(data, "test", tokenizer).items,
        load_split(data, "test", tokenizer).samples,
    )
    names = pair["llm_adapters"]["instruction"].rpartition("Answer format: ")[2].split("/")
    texts = [tokenizer.decode([*item.prompt_ids, *option]) for option in item.options]
    assert texts == [f"{item.prompt}the correct answer is {name}" for name in names]
    assert names[item.correct] == item.answer == pair["llm_adapters"]["answer"]
    assert [*item.prompt_ids, *item.options[item.correct], tokenizer.eos_token_id] == sample.input_ids


def test_every_copy_of_the_test_split_is_found(tmp_path, tokenizer):
    """LLM-Adapters calls the hub's validation split "test", and has one folder for all."""
    for pair in ROWS:
        folder = tmp_path / get_task(pair["task"]).folder
        folder.mkdir(exist_ok=True)
        (folder / "test.json").write_text(json.dumps([pair["llm_adapters"]]))
    for task in SUITES["commonsense"]:
        data = SimpleNamespace(
            task=task,
            path=str(tmp_path),
            fields=None,
            template=None,
            think_step_by_step=None,
            max_length=2000,
        )
        questions = load_questions(data, TASKS[task].eval_split, tokenizer)
        assert len(questions.items) == 1 and str(tmp_path / TASKS[task].folder) in questions.origin


def test_a_split_that_is_missing_is_named_as_it_was_asked_for(tmp_path, tokenizer):
    (tmp_path / "train.json").write_text(json.dumps([ROWS[0]["llm_adapters"]]))
    with pytest.raises(UserError, match="no file for split 'validation' in .*it has train"):
        load_questions(section_of(tmp_path, "boolq"), "validation", tokenizer)


#: Of each task: what makes its row wrong, and what is said of it.
WRONG = [
    ("boolq", {"answer": "maybe"}, "row 1 of .* has the answer 'maybe', which is neither true nor false"),
    ("piqa", {"label": 2}, "row 1 of .* has the answer '2', which is none of 0, 1"),
    ("piqa", {"sol1": None}, "row 1 of .* has no value in column 'sol1'"),
    ("siqa", {"label": "0"}, "row 1 of .* has the answer '0', which is none of 1, 2, 3"),
    ("hellaswag", {"label": "4"}, "row 1 of .* has the answer '4', which is none of 0, 1, 2, 3"),
    ("hellaswag", {"endings": 7}, "row 1 of .* has options that are no list of texts: 7; correct it"),
    ("hellaswag", {"endings": "['a' 'b']"}, "row 1 of .* has options that are no list of texts: "),
    ("hellaswag", {"endings": ["a", None]}, "row 1 of .* has None as its option 2, which is no text"),
    ("piqa", {"sol2": ["a"]}, r"row 1 of .* has \['a'\] as its option 2, which is no text"),
    ("winogrande", {"answer": "3"}, "row 1 of .* has the answer '3', which is none of 1, 2"),
    ("arc_easy", {"answerKey": "F"}, "row 1 of .* has the answer 'F', which is none of A, B, C, D"),
    (
        "arc_easy",
        {"choices": {"label": ["A", "E"], "text": ["x", None]}},
        "has None as its option 2",
    ),
    (
        "arc_easy",
        {"choices": {"label": "ABE", "text": list("xyz")}},
        "has labels of options that are no list",
    ),
    ("arc_easy", {"choices": {"label": ["A", "E"], "text": ["x"]}}, "has 1 option and 2 labels of options"),
    ("openbookqa", {"choices": ["a"]}, "row 1 of .* has another form than rows of the task openbookqa"),
]


@pytest.mark.parametrize("task, change, said", WRONG)
def test_a_wrong_row_is_named(tmp_path, tokenizer, task, change, said):
    data = section(tmp_path, task, HUB[task], HUB[task] | change)
    for read in (load_questions, load_split):
        with pytest.raises(UserError, match=said) as caught:
            read(data, "test", tokenizer)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task, change", [
    ("piqa", {"label": -1}), ("siqa", {"label": ""}), ("hellaswag", {"label": ""}),
    ("winogrande", {"answer": ""}), ("arc_easy", {"answerKey": ""}),
])  # fmt: skip
def test_rows_without_an_answer_are_left_out_and_counted(tmp_path, tokenizer, task, change):
    row = HUB[task]
    data = section(tmp_path, task, row | change, row)
    questions, encoded = load_questions(data, "test", tokenizer), load_split(data, "test", tokenizer)
    assert (len(questions.items), questions.dropped) == (len(encoded.samples), encoded.dropped) == (1, 1)
    assert "no answer" in encoded.why_dropped
    for load in (load_questions, load_split):
        with pytest.raises(UserError, match="no row of .* has an answer; choose another split"):
            load(section(tmp_path, task, row | change), "test", tokenizer)


def test_columns_of_no_copy_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError) as caught:
        load_questions(section(tmp_path, "piqa", {"goal": "a", "sol1": "b"}), "test", tokenizer)
    assert "has neither the columns instruction, output nor goal, sol1, sol2, label" in str(caught.value)
    assert "(it has goal, sol1)" in str(caught.value)


def test_a_recipe_may_show_the_columns_of_the_hub(tmp_path):
    template = "{passage}\n{question}?\nAnswer: "
    (example,) = Examples(section(tmp_path, "boolq", HUB["boolq"], template=template), "test")
    assert example.prompt == f"{HUB['boolq']['passage']}\n{HUB['boolq']['question']}?\nAnswer: "
    assert (example.response, example.answer) == ("the correct answer is false", "false")
    with pytest.raises(UserError, match="{label} would show the answer"):
        Examples(section(tmp_path, "piqa", HUB["piqa"], template="{goal} {label}"), "test")


def test_an_answer_that_is_no_option_is_named(tmp_path, tokenizer):
    row = ROWS[0]["llm_adapters"] | {"answer": "yes"}
    with pytest.raises(UserError, match="row 0 of .* has the answer 'yes', which is none of true, false"):
        load_questions(section(tmp_path, "boolq", row), "test", tokenizer)


# ---------------------------------------------------------------------- the real files

REAL = [("boolq", "boolq"), ("winogrande", "winogrande"), ("ARC-Easy", "arc_easy"),
        ("ARC-Challenge", "arc_challenge"), ("openbookqa", "openbookqa")]  # fmt: skip


def hub_row(task, row):
    """The hub's row that a row of LLM-Adapters was made of."""
    text = row["instruction"].rpartition("Answer format: ")[0].rstrip()
    if task == "boolq":
        question = text.partition(", question: ")[2].removesuffix("?")
        return {"question": question, "passage": "…", "answer": row["answer"] == "true"}
    head, options = re.split(r"\n\n(?=(?:Answer|Option)1: )", text, maxsplit=1)
    parts = re.split(r" ?(?:Answer|Option)\d: ", options)[1:]
    if task == "winogrande":
        sentence = head.partition("given sentence: ")[2]
        answer = row["answer"].removeprefix("option")
        return {"sentence": sentence, "option1": parts[0], "option2": parts[1], "answer": answer}
    choices = {"text": parts, "label": list("ABCDE"[: len(parts)])}
    column = "question_stem" if task == "openbookqa" else "question"
    key = "ABCDE"[int(row["answer"].removeprefix("answer")) - 1]
    return {column: head.partition("to the question: ")[2], "choices": choices, "answerKey": key}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize("folder, task", REAL)
def test_the_real_files_are_what_the_hubs_rows_become(tokenizer, folder, task):
    rows = json.loads((DATA / folder / "test.json").read_text(encoding="utf-8"))
    (layout,) = get_task(task).layouts
    assert [layout.read(hub_row(task, row)) for row in rows] == rows
    questions = load_questions(section_of(DATA, task), f"{TASKS[task].eval_split}[:20]", tokenizer)
    assert [item.answer for item in questions.items] == [row["answer"] for row in rows[:20]]
