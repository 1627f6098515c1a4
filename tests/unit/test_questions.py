"""Questions: what a model is asked, and what is left out of an evaluation."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from distlora.data import Conventions, load_questions, load_split
from distlora.errors import UserError
from distlora.tasks import SUITES, TASKS, scored_tasks
from distlora.tasks.math import last_boxed
from tests.unit.test_data_encode import make_tokenizer

DATA = Path(os.environ.get("DISTLORA_TEST_DATA", "../shared/data"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def section(path, task="gsm8k", **more):
    settings = {"fields": None, "template": None, "think_step_by_step": None, "max_length": 512}
    return SimpleNamespace(task=task, path=str(path), **(settings | more))


def rows_file(tmp_path, *rows):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


ROWS = [
    {"question": "How much?", "answer": "It is 2.\n#### 2"},
    {"question": "How " * 300 + "much?", "answer": "#### 3"},
]


def test_a_prompt_that_is_too_long_is_left_out_and_counted(tmp_path, tokenizer):
    questions = load_questions(section(rows_file(tmp_path, *ROWS)), "test", tokenizer)
    (item,) = questions.items
    assert questions.dropped == 1 and item.answer == "2" and item.options == () and item.correct is None
    assert item.prompt.endswith("### Instruction:\nHow much?\n\n### Response:\n")
    assert item.prompt_ids == tokenizer(item.prompt)["input_ids"]
    with pytest.raises(UserError, match="none of the 1 prompts .* at most 40 tokens"):
        load_questions(section(tmp_path, max_length=40), "test[:1]", tokenizer)


def test_the_digest_is_that_of_prompts_and_answers(tmp_path, tokenizer):
    def digest(*rows):
        return load_questions(section(rows_file(tmp_path, *rows)), "test", tokenizer).digest

    first = ROWS[0]
    assert digest(first) == digest(first | {"more": 1}) and len(digest(first)) == 64
    others = [first | {"question": "How many?"}, first | {"answer": "#### 3"}]
    assert len({digest(first), digest(first, first), *map(digest, others)}) == 4


LAST = "Let's think step by step."


@pytest.mark.parametrize(
    "template, setting, ending",
    [
        (None, None, "### Response:\n"),
        (None, True, f"### Response:\n{LAST}"),
        ("paper", None, f"### Response: {LAST}"),
        ("paper", False, "### Response:"),
        ("{question}", True, f"How much? {LAST}"),
    ],
)
def test_questions_may_ask_for_a_derivation(tmp_path, tokenizer, template, setting, ending):
    path = rows_file(tmp_path, ROWS[0])
    data = section(path, template=template, think_step_by_step=setting)
    (item,) = load_questions(data, "test", tokenizer).items
    assert item.prompt.endswith(ending) and item.prompt_ids == tokenizer(item.prompt)["input_ids"]
    (sample,) = load_split(data, "test", tokenizer).samples
    assert LAST not in tokenizer.decode(sample.input_ids), "it is not trained"


@pytest.mark.parametrize("template", ["Q: {question}\nAnswer: ", "{question}\n", None])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_question_ends_where_the_response_began_in_training(tmp_path, tokenizer, template, number):
    row = {"question": "How much?", "answer": "2"}
    fields = {"prompt": "question", "response": "answer"}
    data = section(rows_file(tmp_path, row), "text", template=template, fields=fields)
    conventions = Conventions.of_format(number)
    (item,) = load_questions(data, "test", tokenizer, conventions).items
    (sample,) = load_split(data, "test", tokenizer, conventions).samples
    assert item.prompt_ids == sample.prompt_ids and item.answer == "2"


def test_bos_comes_first_where_the_tokenizer_adds_it(tmp_path):
    with_bos = make_tokenizer(bos=True)
    for template in (None, "paper"):
        data = section(rows_file(tmp_path, ROWS[0]), template=template)
        (item,) = load_questions(data, "test", with_bos).items
        assert (
            item.prompt_ids[0] == with_bos.bos_token_id and item.prompt_ids.count(with_bos.bos_token_id) == 1
        )


def test_stops_are_those_of_the_prompt(tmp_path, tokenizer):
    path = rows_file(tmp_path, ROWS[0])
    assert load_questions(section(path), "test", tokenizer).stops == ("### Instruction:", "### Response:")
    paper = load_questions(section(path, template="paper"), "test", tokenizer)
    assert paper.stops == ("Instruction", "Response")


# ---------------------------------------------------------------------- mathematics


def test_both_copies_of_gsm8k_are_read(tmp_path, tokenizer):
    adapters = {
        "instruction": "How much?",
        "input": "",
        "output": "\nA: 2. The answer is 2.",
        "answer": "2.0",
    }
    for row, answer in ((ROWS[0], "2"), (adapters, "2.0")):
        (item,) = load_questions(section(rows_file(tmp_path, row)), "test", tokenizer).items
        assert "### Instruction:\nHow much?\n" in item.prompt and item.answer == answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("It is two.", "finds no final answer, such as `#### 72`, in the response of row 1 of"),
        ("It is 2.", "finds no final answer, such as `#### 72`, in the response of row 1 of"),
        ("It is 2.\n####", "finds no final answer, such as `#### 72`, in the response of row 1 of"),
        ("It is 2.\n#### two", "row 1 of .* has no number as its answer"),
    ],
)
def test_a_reference_without_a_number_is_named(tmp_path, tokenizer, answer, said):
    rows = [ROWS[0], {"question": "How much?", "answer": answer}]
    with pytest.raises(UserError, match=said):
        load_questions(section(rows_file(tmp_path, *rows)), "test", tokenizer)


def test_a_bare_number_is_a_final_answer(tmp_path, tokenizer):
    rows = [{"question": "How much?", "answer": answer} for answer in ("72", 1_000, "1,000 kids")]
    found = load_questions(section(rows_file(tmp_path, *rows)), "test", tokenizer).items
    assert [item.answer for item in found] == ["72", "1000", "1,000 kids"]


@pytest.mark.parametrize("task", ["gsm8k", "math"])
@pytest.mark.parametrize("column", ["prompt", "response"])
def test_half_a_character_is_named_with_its_row(tmp_path, tokenizer, task, column):
    columns = TASKS[task].columns
    row = {columns["prompt"]: "How much?", columns["response"]: "\\boxed{2} #### 2"}
    data = section(rows_file(tmp_path, row, row | {columns[column]: "a\ud83d" + row[columns[column]]}), task)
    for load in (load_questions, load_split):
        with pytest.raises(UserError, match=r"row 1 of .* has an unpaired surrogate \('.ud83d'\) in column"):
            load(data, "test", tokenizer)


def test_rows_beyond_the_limit_are_not_looked_at(tmp_path, tokenizer):
    first = {"question": "How many?", "answer": "#### 5"}
    path = rows_file(tmp_path, first, ROWS[1], ROWS[0], ROWS[1], {"question": "?", "answer": "none"})
    found = load_questions(section(path), "test", tokenizer, limit=2)
    assert [item.answer for item in found.items] == ["5", "2"] and found.dropped == 1
    with pytest.raises(UserError, match="row 4"):
        load_questions(section(path), "test", tokenizer, limit=3)


SOLUTION = "We have $x = \\boxed{1}$, so the answer is \\boxed{\\frac{a}{b}}."


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"problem": "P", "solution": SOLUTION, "level": "Level 5", "type": "Algebra"}, "\\frac{a}{b}"),
        ({"problem": "P", "solution": SOLUTION, "answer": "a/b", "subject": "Algebra", "level": 5}, "a/b"),
        ({"instruction": "P", "output": SOLUTION, "input": ""}, "\\frac{a}{b}"),
    ],
)
def test_every_copy_of_math_is_read(tmp_path, tokenizer, row, answer):
    (item,) = load_questions(section(rows_file(tmp_path, row), "math"), "test", tokenizer).items
    assert "### Instruction:\nP\n" in item.prompt and item.answer == answer


@pytest.mark.parametrize(
    "text, found",
    [
        ("\\boxed{{1}}", "{1}"),
        ("\\fbox{2} after \\boxed{1}", "1"),
        ("\\boxed{1} then \\fbox{ 3 }", "3"),
        ("$\\boxed 7$.", "7"),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_the_answer(text, found):
    assert last_boxed(text) == found


def test_an_answer_that_cannot_be_found_is_counted(tmp_path, tokenizer):
    rows = [{"problem": "P", "solution": "No box."}, {"problem": "P", "solution": SOLUTION}]
    questions = load_questions(section(rows_file(tmp_path, *rows), "math"), "test", tokenizer)
    assert (len(questions.items), questions.dropped) == (1, 1)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize("task, count", [("gsm8k", 1319), ("math", 250)])
def test_the_real_files_have_an_answer_in_every_row(tokenizer, task, count):
    questions = load_questions(section(DATA, task, max_length=100_000), TASKS[task].eval_split, tokenizer)
    assert (len(questions.items), questions.dropped) == (count, 0)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
def test_the_last_box_of_the_real_solutions_is_their_answer():
    rows = [json.loads(line) for line in (DATA / "math" / "test.jsonl").read_text().splitlines()]
    assert [last_boxed(row["solution"]) for row in rows] == [row["answer"] for row in rows]


# ---------------------------------------------------------------------- suites


def test_suites_stand_for_their_tasks():
    assert all(set(names) <= set(TASKS) for names in SUITES.values())
    assert scored_tasks(["gsm8k", "glue", "rte"]) == ["gsm8k", *SUITES["glue"]]
    with pytest.raises(UserError, match="unknown task 'gleu', did you mean glue?"):
        scored_tasks(["gleu"])
