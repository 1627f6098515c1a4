"""Which data an evaluation reads: paths of tasks and suites, and no rows that a run was trained on."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distlora.cli.parser import parse
from distlora.cli.verbs.evaluate import _read
from distlora.data import sources
from distlora.errors import UserError
from distlora.tasks import SUITES, registry, try_judge
from distlora.training.evaluated import Asked, Subject, sections_of, subject_of_run
from distlora.training.evaluation_scores import means
from distlora.training.run_directory import RECIPE
from distlora.training.subject import tell_other_base
from tests.e2e.program import recipe_of


def run_of(folder: Path, overrides=(), **data) -> Subject:
    """A run that was trained on `folder/g.jsonl`, unless `data` says otherwise."""
    file = folder / "g.jsonl"
    file.write_text(json.dumps({"question": "How much?", "answer": "#### 2"}) + "\n")
    content = recipe_of(folder, file, folder / "run")
    content["train"] |= {"exact_match_samples": 0}
    content["data"] |= {"split": "train[:90%]", "eval_split": "train[90%:]"} | data
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / RECIPE).write_text(yaml.safe_dump(content))
    return subject_of_run(folder / "run", overrides)


def split_of(subject: Subject, task: str, *data: tuple[str, str]) -> str:
    return sections_of(subject, Asked((task,), data))[task].eval_split


# ---------------------------------------------------------------------- splits


def test_a_runs_own_task_is_scored_on_its_own_evaluation_split(tmp_path):
    assert split_of(run_of(tmp_path), "gsm8k") == "train[90%:]"
    assert split_of(run_of(tmp_path, ["data.eval_split=train[:5]"]), "gsm8k") == "train[:5]"


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"eval_split": None}, None),
        ({"eval_split": "train[:90%]"}, None),
        ({}, "g.jsonl"),
        ({"task": "metamath", "path": None, "split": "train[:50]", "eval_split": None}, None),
        ({"task": "metamath", "path": None, "split": "train", "eval_split": "train"}, None),
    ],
)
def test_a_run_is_not_scored_on_its_training_rows_unless_that_is_asked_for(data, path, tmp_path):
    task = data.get("task", "gsm8k")
    paths = [] if path is None else [(task, str(tmp_path / "run" / ".." / path))]
    with pytest.raises(UserError, match=r"was trained on data.split=train.*; name a split, as in data.eval_"):
        split_of(run_of(tmp_path, **data), task, *paths)
    assert split_of(run_of(tmp_path, ["data.eval_split=train"], **data), task, *paths) == "train"


def test_other_data_and_other_splits_are_no_training_rows(tmp_path):
    (tmp_path / "other.jsonl").write_text("")
    assert split_of(run_of(tmp_path), "gsm8k", ("gsm8k", str(tmp_path / "other.jsonl"))) == "train"
    (tmp_path / "other.json").write_text("{}")
    assert split_of(run_of(tmp_path), "gsm8k", ("gsm8k", f"{tmp_path}/other.json:rows")) == "train"
    assert split_of(run_of(tmp_path, path=str(tmp_path), split="train", eval_split=None), "gsm8k") == "test"
    assert split_of(run_of(tmp_path), "math") == "test"


# ---------------------------------------------------------------------- paths


@pytest.fixture
def run(tmp_path) -> Subject:
    return run_of(tmp_path)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_tasks_own_path_is_taken_before_its_suites(swapped, run):
    data = (("boolq", "B"), ("commonsense", "C"))
    found = sections_of(run, Asked(("commonsense",), data[::-1] if swapped else data))
    assert {name: section.path for name, section in found.items()} == dict.fromkeys(
        SUITES["commonsense"], "C"
    ) | {"boolq": "B"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            Asked(("gsm8k",), (("gsm8k", "a"), ("gsm8k", "b"))),
            "--data gsm8k=b: another path of gsm8k was",
        ),
        (Asked(("commonsense",), (("comonsense", "a"),)), "'comonsense', did you mean commonsense?"),
        (Asked(("boolq",), (("commonsense", "a"),)), "commonsense is not among --tasks"),
        (
            Asked(("glue",)),
            "--tasks glue: its tasks have different labels, so each is a run of its own",
        ),
        (Asked(("rte",), by="likelihood"), "--by is for tasks with answers, and rte has labels"),
        (Asked(("rte",), by="generation"), "--by is for tasks with answers, and rte has labels"),
        (Asked(("rte",), fold=True), "--merge is for tasks with answers, and rte has labels"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(asked, said, run):
    with pytest.raises(UserError) as caught:
        sections_of(run, asked)
    assert said in str(caught.value)


def test_blanks_between_tasks_mean_nothing(run, tmp_path):
    words = ["eval", str(tmp_path / "run"), "--tasks", " gsm8k, math", "--data", "math =x"]
    asked, _ = _read(parse(words))
    assert asked.tasks == ("gsm8k", "math") and asked.data == (("math", "x"),)


@pytest.mark.parametrize("path", ["zz/", "./zz", "/zz", "~/zz", "a/b/c", "here/zz"])
def test_what_looks_like_a_file_is_not_asked_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert sources.is_local(path)
    assert not sources.is_local("there/zz") and not sources.is_local("here/zz:main")


# ---------------------------------------------------------------------- judges and means


def test_losses_have_no_mean():
    found = {"a": {"loss": 1.0, "accuracy": 0.5, "f1": 0.1}, "b": {"loss": 3.0, "accuracy": 1.0}}
    assert means(found, ("a", "b")) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["math", "metamath"])
def test_a_judge_that_lacks_its_library_is_found_out_beforehand(name, monkeypatch):
    from distlora.tasks.reading import equivalence, equivalence_worker

    equivalence._compare.cache_clear()
    monkeypatch.setattr(equivalence, "_WORKER", equivalence._Worker())
    monkeypatch.setattr(equivalence_worker, "__file__", "/nowhere/equivalence_worker.py")
    with pytest.raises(UserError, match="math-verify does not load"):
        try_judge(name)
    for other in registry.TASKS.keys() - {"math", "metamath"}:
        try_judge(other)


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("base", "path", "warns"),
    [
        ("some/llama", "models/qwen", True),
        ("some/llama", "other/llama-2", True),
        ("some/llama", "models/llama", False),
        ("/elsewhere/llama/", "some/llama", False),
        (None, "some/llama", False),
        ("", "some/llama", False),
        (["some/llama"], "some/qwen", False),
    ],
)
def test_an_adapter_of_a_base_with_another_name_is_told(base, path, warns, caplog):
    adapter = SimpleNamespace(config={"base_model_name_or_path": base}, directory=Path("adapter"))
    with caplog.at_level(logging.WARNING, "distlora"):
        tell_other_base(adapter, path)
    told = f'adapter says that it was trained on "{base}", and is put on {path}'
    assert caplog.messages == ([f"{told}, whose layers have the same shapes"] if warns else [])
