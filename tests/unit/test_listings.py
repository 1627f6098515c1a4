"""`distlora tasks`, `recipes` and `copy`: what there is, on one screen, and mistakes in one sentence."""

from pathlib import Path

import pytest

from distlora.cli.main import main
from distlora.recipe.load import load_recipe
from distlora.recipe.shipped import shipped_recipes, shipped_sweeps
from distlora.tasks import SUITES, TASKS


def told(words, capsys, code=0):
    assert main(words) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_every_task_and_suite_is_listed_once_with_its_data(capsys):
    lines = told(["tasks"], capsys).splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted([*TASKS, *SUITES])
    assert all(task.path in "\n".join(lines) for task in TASKS.values() if task.path)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_shown_with_its_columns_and_its_section(name, capsys):
    out = told(["tasks", name], capsys)
    assert f"task: {name}" in out and all(
        f"column {role}" in out for role in getattr(TASKS[name], "columns", {})
    )
    assert ("path: FILE" in out) == (TASKS[name].path is None and TASKS[name].rows is None)


def test_a_suite_shows_its_tasks(capsys):
    assert all(f"task: {name}\n" in told(["tasks", "glue"], capsys) for name in SUITES["glue"])


def test_every_shipped_file_is_listed(capsys):
    out = told(["recipes"], capsys)
    assert all(f"  {name} " in out for name in (*shipped_recipes(), *shipped_sweeps()))
    assert all(name in out for name in ("configs/zero/zero3.json", "slurm.sbatch", "conversations.jsonl"))
    assert max(map(len, out.splitlines())) < 250


def test_a_recipe_is_shown_as_it_is(capsys):
    assert told(["recipes", "quickstart"], capsys) == shipped_recipes()["quickstart"].read_text()


def test_a_copy_is_written_and_the_next_command_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = told(["copy", "quickstart", "my recipe.yaml"], capsys)
    assert out == "my recipe.yaml\nnext: distlora train 'my recipe.yaml' --dry-run\n"
    assert load_recipe("my recipe.yaml") == load_recipe("quickstart")
    assert told(["copy", "slurm.sbatch"], capsys) == "slurm.sbatch\n" and Path("slurm.sbatch").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tasks", "gsm9k"], "no task is called gsm9k, did you mean gsm8k?"),
        (["tasks", "zzzzzzzz"], "no task is called zzzzzzzz; `distlora tasks` lists them"),
        (["recipes", "quikstart"], "is called quikstart, did you mean quickstart?"),
        (["copy", "nothing-like-it"], "is called nothing-like-it; `distlora recipes` lists them"),
        (["copy", "quickstart", "none/x.yaml"], "there is no folder none; make it first"),
        (["copy", "quickstart", __file__], "exists already; name another file"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert told(words, capsys, code=2).strip().count("\n") == 0 and main(words) == 2
    assert sentence in capsys.readouterr().err
