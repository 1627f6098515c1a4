"""Questions: what a model is asked, and what is left out of an evaluation."""

import json
from types import SimpleNamespace

import pytest

from distlora.data import load_questions
from distlora.errors import UserError
from distlora.tasks import SUITES, TASKS, scored_tasks
from tests.unit.test_data_encode import make_tokenizer


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


def test_suites_stand_for_their_tasks():
    assert all(set(names) <= set(TASKS) for names in SUITES.values())
    assert scored_tasks(["gsm8k", "glue", "rte"]) == ["gsm8k", *SUITES["glue"]]
    with pytest.raises(UserError, match="unknown task 'gleu', did you mean glue?"):
        scored_tasks(["gleu"])
