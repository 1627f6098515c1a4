"""Which cells of an answer's column stand for a row without an answer, by the layout of the rows."""

import json
from types import SimpleNamespace

import pytest

from distlora.data import Examples
from distlora.tasks import TASKS, ResponseTask

#: The tasks whose -1 is an answer, with the layout that other copies of the data set have.
FREE = {
    "math": {"instruction": "What is 2 - 3?", "output": -1},
    "gsm8k": {"instruction": "What is 2 - 3?", "output": "2 - 3 = -1", "answer": -1},
}


def examples(tmp_path, task, *rows):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(Examples(SimpleNamespace(
        task=task, path=str(file), fields=None, template=None, think_step_by_step=None, max_length=99
    ), "train"))  # fmt: skip


@pytest.mark.parametrize("task", FREE)
@pytest.mark.parametrize("value", ["-1", -1, -1.0])
def test_minus_one_is_an_answer_where_answers_are_free(tmp_path, task, value):
    (layout,) = TASKS[task].layouts
    row = FREE[task]
    (example,) = examples(tmp_path, task, row | {layout.answer: value})
    assert example.response == str(value if layout.answer == "output" else row["output"])


@pytest.mark.parametrize("task", FREE)
@pytest.mark.parametrize("value", ["", " ", None])
def test_empty_cell_is_no_answer_anywhere(tmp_path, task, value):
    row = FREE[task] | {TASKS[task].layouts[0].answer: value}
    assert [example.response for example in examples(tmp_path, task, row)] == [None]


CHOICES = [
    name
    for name, task in TASKS.items()
    if isinstance(task, ResponseTask) and task.layouts and name not in FREE
]


@pytest.mark.parametrize("task", CHOICES)
@pytest.mark.parametrize("value", ["-1", -1, -1.0, " "])
def test_minus_one_is_no_answer_where_options_are_given(tmp_path, task, value):
    (layout,) = TASKS[task].layouts
    row = dict.fromkeys(layout.columns, "some text") | {layout.answer: value}
    assert [example.response for example in examples(tmp_path, task, row)] == [None]
