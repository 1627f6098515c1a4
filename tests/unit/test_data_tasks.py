"""Tasks: columns, prompts and final answers; and the sentence for each mistake in `data.fields` and
`data.template`.
"""

import json
from types import SimpleNamespace

import pytest

from distlora.data.examples import Example, Examples, download
from distlora.errors import UserError
from distlora.tasks import TASKS, ResponseTask, get_task, is_correct


def examples(tmp_path, rows, task="text", fields=None, template=None):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = SimpleNamespace(task=task, path=str(file), fields=fields, template=template, max_length=64)
    return list(Examples(section, "train"))


HEAD = "Below is an instruction that describes a task"
TAIL = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


def test_metamath_preset(tmp_path):
    row = {"query": "1+1?", "response": "Two.\nThe answer is: 2", "type": "x"}
    prompt = f"{HEAD}. {TAIL}1+1?\n\n### Response:\n"
    assert examples(tmp_path, [row], "metamath") == [Example(prompt, row["response"], "2")]


def test_gsm8k_preset(tmp_path):
    row = {"question": "How much?", "answer": "It is <<1*2=2>>2.\n#### 1,002"}
    (example,) = examples(tmp_path, [row], "gsm8k")
    assert example.prompt.endswith("### Instruction:\nHow much?\n\n### Response:\n")
    assert (example.response, example.answer) == (row["answer"], "1,002")


@pytest.mark.parametrize("task", ["instruct", "commonsense"])
def test_instruct_preset_shows_the_input_only_where_there_is_one(tmp_path, task):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3.0"},
        {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"},
        {"instruction": "Is it?", "input": None, "output": "the correct answer is solution2"},
    ]
    first, second, third = examples(tmp_path, rows, task)
    context = "paired with an input that provides further context"
    assert first.prompt == f"{HEAD}, {context}. {TAIL}Add.\n\n### Input:\n1 2\n\n### Response:\n"
    assert second.prompt == third.prompt == f"{HEAD}. {TAIL}Is it?\n\n### Response:\n"
    assert [each.answer for each in (first, second, third)] == ["3.0", "true", "solution2"]


def test_instruct_rows_without_input_and_answer_columns(tmp_path):
    (example,) = examples(tmp_path, [{"instruction": "Hi", "output": "Hello"}], "instruct")
    assert (example.response, example.answer) == ("Hello", "Hello")


def test_fields_and_template_of_the_recipe(tmp_path):
    rows = [{"title": "T{0}", "body text": "B", "n": 3, "label": "yes"}]
    fields = {"prompt": "title", "response": "label"}
    assert examples(tmp_path, rows, fields=fields) == [Example("T{0}", " yes", "yes")]
    (example,) = examples(tmp_path, rows, fields=fields, template="{prompt}/{title}: {{{body text}}} {n}\n")
    assert example.prompt == "T{0}/T{0}: {B} 3\n"
    (example,) = examples(tmp_path, rows, fields={"response": "label"}, template="{n}?")
    assert (example.prompt, example.response) == ("3?", "yes"), "nothing is added to a recipe's own template"


def test_fields_override_a_preset(tmp_path):
    (example,) = examples(
        tmp_path, [{"q": "1+1?", "response": "The answer is: 2"}], "metamath", fields={"prompt": "q"}
    )
    assert "1+1?" in example.prompt


ROW = {"question": "1+1?", "reply": "2", "solution": "two"}


@pytest.mark.parametrize(
    "fields, template, expected",
    [
        (
            {"prompt": "question", "respose": "reply"},
            None,
            "data.fields: unknown name 'respose', did you mean response?",
        ),
        (
            {"prompt": "qestion", "response": "reply"},
            None,
            "did you mean question? (it has question, reply, solution)",
        ),
        ({"prompt": "question"}, None, "no column for response"),
        ({"response": "reply"}, None, "no column for prompt"),
        ({"response": "reply"}, "{qestion}", "data.template: {qestion}: "),
        ({"response": "reply"}, "{question} {reply}", "{reply} would show the answer"),
        ({"response": "reply"}, "{question} {response}", "{response} would show the answer"),
        (
            {"response": "reply", "answer": "solution"},
            "{question} {solution}",
            "{solution} would show the answer",
        ),
        ({"response": "reply"}, "{question", "data.template: "),
        ({"response": "reply"}, "{}", "only names may stand in braces"),
        ({"response": "reply"}, "{question!r}", "only names may stand in braces"),
        ({"response": "reply"}, "{question.__class__}", "no column 'question.__class__'"),
    ],
)
def test_mistakes_in_fields_and_template(tmp_path, fields, template, expected):
    with pytest.raises(UserError) as caught:
        examples(tmp_path, [ROW], fields=fields, template=template)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_preset_on_other_columns_names_what_is_there(tmp_path):
    with pytest.raises(
        UserError, match=r"task metamath: .* no column 'response'.*\(it has question, reply, solution\)"
    ):
        examples(tmp_path, [ROW], "metamath")


@pytest.mark.parametrize("value, found", [(None, "no value"), (["2"], "a list")])
def test_row_without_text_is_named(tmp_path, value, found):
    with pytest.raises(UserError, match=f"row 1 of .* has {found} in column 'reply'"):
        examples(tmp_path, [ROW, ROW | {"reply": value}], fields={"prompt": "question", "response": "reply"})


def test_empty_data_set_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no rows"):
        examples(tmp_path, [], "gsm8k")


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="unknown task 'gsm8', did you mean gsm8k?"):
        get_task("gsm8")


def test_arithmetic_takes_slices_and_no_path():
    section = SimpleNamespace(task="arithmetic", path=None, fields=None, template=None, max_length=64)
    whole, part = Examples(section, "test"), list(Examples(section, "test[25%:50%]"))
    assert len(whole) == 512 and part == list(whole)[128:256]
    assert (
        part[0].prompt.startswith("Q: ")
        and part[0].prompt.endswith("?\nAnswer:")
        and part[0].response == f" {part[0].answer}"
    )
    download(section, "test")
    section.path = "rows.jsonl"
    with pytest.raises(UserError, match="makes its own data"):
        Examples(section, "test")


def test_task_without_a_path_asks_for_one():
    section = SimpleNamespace(task="instruct", path=None, fields=None, template=None, max_length=64)
    for ask in (download, Examples):
        with pytest.raises(UserError, match="data.path: the task instruct needs one"):
            ask(section, "train")


@pytest.mark.parametrize(
    "task, generated, answer, correct",
    [
        ("arithmetic", " 12", "12", True),
        ("arithmetic", "\n12 apples.\n\nQ: Tom has 5", "12", True),
        ("arithmetic", " 5 + 7 = 12", "12", True),
        ("arithmetic", " 120", "12", False),
        ("arithmetic", " -12", "12", False),
        ("arithmetic", " 5 + 7 = ", "5", False),
        ("arithmetic", "", "12", False),
        ("gsm8k", "He has 3 <<1+2=3>>.\n#### 1,003", "1003", True),
        ("gsm8k", "#### 1\n#### 2", "2", True),
        ("gsm8k", "The answer is: $1003.00.", "1,003", True),
        ("gsm8k", "It is 3", "3", False),
        ("metamath", "So 1/2.\nThe answer is: \\frac{1}{2}", "\\frac{1}{2}", True),
        ("metamath", "The answer is: \\frac{ 1 }{2}.", "\\frac{1}{2}", True),
        ("metamath", "The answer is: \\frac{1}{2}", "1", False),
        ("metamath", "The answer is: 5/6", "5", False),
        ("metamath", "The answer is: (5,6)", "56", False),
        ("metamath", "The answer is: 0.50", ".5", True),
        ("metamath", "The answer is: 50\\%", "50", True),
        ("metamath", "It is 5", "5", False),
        ("instruct", "\nA: 5 - 4 = 1. The answer is 1 kid.", "1.0", True),
        ("instruct", "the correct answer is True", "true", True),
        ("commonsense", "the correct answer is answer2: a bacterial population", "answer2", True),
        ("commonsense", "the correct answer is answer1", "answer2", False),
        ("commonsense", "solution1", "solution1", True),
        ("commonsense", "the correct answer is ", "true", False),
        ("text", " Paris.", "paris", True),
        ("text", "Paris, France", "Paris", False),
    ],
)
def test_is_correct(task, generated, answer, correct):
    assert is_correct(task, generated, answer) is correct


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if isinstance(task, ResponseTask)])
def test_nothing_is_correct_where_no_answer_is_known(task):
    assert not is_correct(task, "#### 1\nThe answer is: 1", None)
