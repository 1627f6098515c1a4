"""A run directory belongs to one recipe; what is in it decides whether a run begins, goes on,
or is refused.
"""

import json
import os
from pathlib import Path

import pytest

from distlora.checkpoints.directory import newest
from distlora.checkpoints.stored import MANIFEST, STATE
from distlora.errors import UserError
from distlora.files.atomic import write_json
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import FORMAT
from distlora.training.run_directory import check_run_dir, claim_run_dir, find_checkpoint, with_format_of_run

CONTENT = {
    "model": {"path": "some/model"},
    "method": {"name": "lora_sb", "rank": 8},
    "data": {"task": "arithmetic", "eval_split": "test"},
    "train": {"lr": 1e-3},
}


def recipe(tmp_path, *overrides, **content):
    """The recipe of CONTENT whose output lies in tmp_path/run."""
    path = tmp_path / "given.yaml"
    path.write_text(json.dumps(CONTENT | {"output_dir": str(tmp_path / "run")} | content))  # JSON is YAML
    return load_recipe(path, overrides)


def checkpoint(run_dir: Path, step: int, name: str | None = None) -> Path:
    """A complete checkpoint without tensors."""
    path = run_dir / (name or f"checkpoint-{step}")
    path.mkdir(parents=True)
    about = {"method": "lora", "rank": 2, "targets": [], "model": {"class": "Net"}, "optimizer_steps": step}
    state = {"format": 1, "step": step, "identity": {}, "extra": {}, "rng": {"cpu": [""]}} | about
    digest = write_json(path / STATE, state)
    entry = {"bytes": (path / STATE).stat().st_size, "sha256": digest}
    write_json(path / MANIFEST, {"format": 1, "step": step, "files": {STATE: entry}})
    return path


def open_run_dir(given, resume):
    """What a run does, in its order: look first, and write once it is sure to run."""
    found = find_checkpoint(given, resume)
    claim_run_dir(given, resume)
    return found


def begun(tmp_path, *steps, **more):
    """(recipe, run directory) of a run that was begun and has these checkpoints."""
    given = recipe(tmp_path, **more)
    open_run_dir(given, None)
    for step in steps:
        checkpoint(tmp_path / "run", step)
    return given, tmp_path / "run"


def refused(action, *words):
    with pytest.raises(UserError) as caught:
        action()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- before anything is started


@pytest.mark.parametrize("resume", [None, False])
def test_a_new_directory_is_fine_and_is_not_made_by_looking(resume, tmp_path):
    check_run_dir(recipe(tmp_path), resume)
    assert not (tmp_path / "run").exists()


def test_an_empty_directory_or_one_with_other_files_is_fine(tmp_path):
    (tmp_path / "run").mkdir()
    check_run_dir(recipe(tmp_path), None)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    check_run_dir(recipe(tmp_path), None)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").write_text("")
    refused(lambda: check_run_dir(recipe(tmp_path), None), "output_dir", str(tmp_path / "run"), "is a file")


@pytest.mark.parametrize("made", [False, True], ids=["missing", "empty"])
def test_resuming_needs_a_run(made, tmp_path):
    if made:
        (tmp_path / "run").mkdir()
    refused(lambda: check_run_dir(recipe(tmp_path), True), "--resume", "holds no run", "without --resume")


@pytest.mark.parametrize("resume", [None, False])
def test_checkpoints_without_a_recipe_belong_to_nobody(resume, tmp_path):
    checkpoint(tmp_path / "run", 5)
    refused(
        lambda: check_run_dir(recipe(tmp_path), resume), "checkpoints but no recipe.yaml", "another directory"
    )


@pytest.mark.parametrize("resume", [None, True, False])
def test_the_same_recipe_is_welcome(resume, tmp_path):
    given, _ = begun(tmp_path, 5)
    check_run_dir(given, resume)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=0.002", ["train.lr is 0.001 there and 0.002 here"]),
        ("method.rank=16", ["method.rank is 8 there and 16 here"]),
        (
            "train.optimizer.betas=[0.8, 0.999]",
            ["train.optimizer.betas is [0.9, 0.999] there and [0.8, 0.999] here"],
        ),
        ("method.init.eta=0.001", ["method.init.eta is search there and 0.001 here"]),
        ("targets=[q_proj]", ["targets is all-linear there and ['q_proj'] here"]),
        ("train.seed=1", ["train.seed is 42 there and 1 here"]),
        ("model.dtype=float32", ["model.dtype is bfloat16 there and float32 here"]),
        ("method.name=lora", ["there and", "here"]),
    ],
)
@pytest.mark.parametrize("resume", [None, True, False])
def test_another_recipes_run_is_refused_by_the_key_that_differs(resume, override, words, tmp_path):
    begun(tmp_path, 5)
    other = recipe(tmp_path, override)
    refused(
        lambda: check_run_dir(other, resume),
        "holds the run of another recipe",
        "name another directory",
        *words,
    )


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_size=2", "train.eval_every=7", "train.save_every=null", "train.keep_checkpoints=5",
        "train.eval_samples=3", "train.exact_match_samples=4", "model.gradient_checkpointing=false",
        "model.attention=eager", "data.max_new_tokens=3", "deepspeed={zero_optimization: {stage: 2}}",
    ],
)  # fmt: skip
def test_what_does_not_decide_the_numbers_may_differ(override, tmp_path):
    begun(tmp_path, 5)
    check_run_dir(recipe(tmp_path, override), None)


def test_the_directory_may_be_moved(tmp_path):
    _, run_dir = begun(tmp_path, 5)
    os.rename(run_dir, tmp_path / "moved")
    check_run_dir(recipe(tmp_path, output_dir=str(tmp_path / "moved")), True)


def test_a_damaged_recipe_is_one_sentence(tmp_path):
    given, run_dir = begun(tmp_path, 5)
    (run_dir / "recipe.yaml").write_text("model: {")
    refused(lambda: check_run_dir(given, None), "recipe.yaml")


def test_looking_changes_nothing(tmp_path):
    given, run_dir = begun(tmp_path, 5)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    check_run_dir(given, False)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------- on rank 0


@pytest.mark.parametrize("resume", [None, False])
def test_a_new_run_gets_its_directory_and_its_recipe(resume, tmp_path):
    given = recipe(tmp_path, output_dir=str(tmp_path / "deep" / "run"))
    open_run_dir(given, resume)
    again = load_recipe(tmp_path / "deep" / "run" / "recipe.yaml")
    assert again == given


def test_the_recipe_in_the_directory_is_the_one_last_run(tmp_path):
    _, run_dir = begun(tmp_path, 5)
    open_run_dir(recipe(tmp_path, "train.eval_every=7"), None)
    assert load_recipe(run_dir / "recipe.yaml").train.eval_every == 7


def without_its_format(path: Path) -> None:
    """Makes a resolved recipe one that was written before formats were numbered."""
    path.write_text("".join(line for line in path.open() if not line.startswith("format:")))


@pytest.mark.parametrize("resume", [None, True])
def test_a_resumed_run_keeps_the_format_that_it_was_begun_with(resume, tmp_path):
    given, run_dir = begun(tmp_path, 5)
    without_its_format(run_dir / "recipe.yaml")
    check_run_dir(given, resume)
    assert with_format_of_run(given, resume) == given.in_format(1)
    for _ in range(2):  # also where its recipe was written again
        open_run_dir(given, resume)
        again = load_recipe(run_dir / "recipe.yaml")
        assert again.format == 1 and again == given.in_format(1)


def test_a_run_that_begins_anew_has_the_format_of_its_recipe(tmp_path):
    given, run_dir = begun(tmp_path, 5)
    without_its_format(run_dir / "recipe.yaml")
    assert with_format_of_run(given, False) is given
    open_run_dir(given, False)
    assert load_recipe(run_dir / "recipe.yaml").format == FORMAT


def test_a_start_that_was_refused_decides_no_format(tmp_path):
    given, run_dir = begun(tmp_path)
    without_its_format(run_dir / "recipe.yaml")
    assert with_format_of_run(given).format == FORMAT


def test_a_run_of_a_newer_version_is_not_resumed(tmp_path):
    given, run_dir = begun(tmp_path, 5)
    text = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(text.replace(f"format: {FORMAT}", f"format: {FORMAT + 1}"))
    refused(lambda: check_run_dir(given, None), "recipe.yaml was written by a newer distlora")


@pytest.mark.parametrize("resume", [None, True])
def test_a_run_with_a_whole_checkpoint_goes_on(resume, tmp_path):
    given, run_dir = begun(tmp_path, 5, 10)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    assert open_run_dir(given, resume).step == 10
    assert newest(run_dir).step == 10 and (run_dir / "metrics.jsonl").exists()


def test_a_broken_newest_checkpoint_leaves_the_older_one(tmp_path):
    given, run_dir = begun(tmp_path, 5, 10)
    (run_dir / "checkpoint-10" / STATE).write_text("")
    open_run_dir(given, None)
    assert newest(run_dir).step == 5


def test_a_run_that_never_came_to_a_checkpoint_begins_again(tmp_path):
    given, run_dir = begun(tmp_path)
    check_run_dir(given, None)
    open_run_dir(given, None)
    refused(lambda: open_run_dir(given, True), "--resume", "no complete checkpoint", "without --resume")


@pytest.mark.parametrize(
    ("resume", "words"),
    [(None, ["every checkpoint is broken", "--no-resume"]), (True, ["--resume", "no complete checkpoint"])],
)
def test_nothing_whole_to_go_on_from_is_said_and_nothing_removed(resume, words, tmp_path):
    given, run_dir = begun(tmp_path, 5, 10)
    for step in (5, 10):
        (run_dir / f"checkpoint-{step}" / STATE).write_text("")
    refused(lambda: open_run_dir(given, resume), *words)
    assert len(list(run_dir.glob("checkpoint-*"))) == 2


def test_beginning_anew_forgets_checkpoints_and_metrics_and_nothing_else(tmp_path):
    given, run_dir = begun(tmp_path, 5, 10)
    (run_dir / "checkpoint-10" / STATE).write_text("")
    for name in ("metrics.jsonl", "summary.json"):
        (run_dir / name).write_text("{}\n")
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "gsm8k-10.jsonl").write_text("{}\n")
    (run_dir / "notes.txt").write_text("mine")
    open_run_dir(given, False)
    assert {path.name for path in run_dir.iterdir()} == {"recipe.yaml", "notes.txt"}


def test_beginning_anew_forgets_what_a_crash_left_aside(tmp_path):
    """Killed between two renames, a checkpoint lies under another name, from which runs go on too."""
    given, run_dir = begun(tmp_path)
    checkpoint(run_dir, 5, ".checkpoint-5.replaced")
    assert newest(run_dir).step == 5
    open_run_dir(given, False)
    assert newest(run_dir) is None


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    given = recipe(tmp_path, output_dir=str(tmp_path / "file" / "run"))
    refused(lambda: open_run_dir(given, None), "output_dir", "cannot be made", "name another directory")
