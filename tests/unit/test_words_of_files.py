"""What is said of files that cannot be read: a link to nothing, no permission and damage are three things."""

import os
import shutil
from pathlib import Path

import pytest

from distlora.checkpoints.directory import newest, of_step
from distlora.errors import UserError
from distlora.files import problems
from distlora.files.problems import dangling_link, first_unreadable, why_unreadable
from distlora.files.tensors import TensorFiles
from distlora.models.hub import resolve_path
from tests.e2e.program import call
from tests.unit.test_train import model, recipe, short_recipe  # noqa: F401 (fixtures)


@pytest.fixture
def forbidden(monkeypatch):
    """Takes away the permission to read a file; root has it always."""
    original = os.open

    def forbid(name: str) -> None:
        def refuse(path, *given, **more):
            if Path(os.fsdecode(path)).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *given, **more)

        monkeypatch.setattr(problems.os, "open", refuse)

    return forbid


def test_a_link_to_nothing_is_named_wherever_it_is_on_the_way(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    for path in (tmp_path / "link", tmp_path / "link" / "a" / "b"):
        assert dangling_link(path) == f"{tmp_path}/link is a link to gone, which is not there"
    assert why_unreadable(tmp_path / "link").startswith(f"{tmp_path}/link is a link")
    assert dangling_link(tmp_path / "missing") is None and why_unreadable(tmp_path / "missing") is None
    (tmp_path / "circle").symlink_to("circle")
    assert "Too many levels of symbolic links" in why_unreadable(tmp_path / "circle")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert first_unreadable(tmp_path) is None


@pytest.fixture
def run(recipe):  # noqa: F811
    from distlora.engine.comm import Topology
    from distlora.training import train

    made = recipe("train.steps=2", "train.keep_checkpoints=3")
    train.train(made, Topology())
    return Path(made.output_dir)


def test_a_checkpoint_without_permission_is_not_broken_and_not_passed_over(run, forbidden):
    forbidden("state.json")
    for look in (lambda: newest(run), lambda: of_step(run, 2)):
        with pytest.raises(UserError) as refused:
            look()
        assert str(refused.value) == (
            f"{run}/checkpoint-2 cannot be read: {run}/checkpoint-2/state.json: Permission denied; "
            "make it readable, or move it away"
        )


def test_a_checkpoint_that_was_moved_and_linked_is_missed(run, tmp_path):
    shutil.move(run / "checkpoint-2", tmp_path / "kept")
    (run / "checkpoint-2").symlink_to(tmp_path / "kept")
    assert newest(run).step == 2
    shutil.move(tmp_path / "kept", tmp_path / "away")
    with pytest.raises(UserError, match="checkpoint-2 is a link to .*/kept, which is not there; bring that"):
        newest(run)
    (run / "checkpoint-2").unlink()
    assert newest(run).step == 1


def test_a_run_directory_that_is_a_link_to_nothing(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    outcome = call("train", tmp_path / "recipe.yaml", f"output_dir={tmp_path}/link")
    assert outcome.code == 2
    assert f"output_dir: {tmp_path}/link is a link to {tmp_path}/gone, which is not there" in outcome.err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_that_cannot_be_read_is_not_missing(model, tmp_path, forbidden, file):  # noqa: F811
    copy = shutil.copytree(model, tmp_path / "copy")
    forbidden(file)
    with pytest.raises(UserError) as refused:
        resolve_path(str(copy))
    assert str(refused.value) == f"model.path={copy}: {copy}/{file}: Permission denied"


@pytest.mark.parametrize("file", ["", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_behind_a_link_to_nothing(model, tmp_path, file):  # noqa: F811
    copy = tmp_path / "copy"
    if file:
        shutil.copytree(model, copy)
        (copy / file).unlink()
    (copy / file).symlink_to("gone")
    with pytest.raises(UserError) as refused:
        resolve_path(str(copy))
    assert str(refused.value) == (
        f"model.path={copy}: {copy}{'/' * bool(file)}{file} is a link to gone, which is not there"
    )


def test_tensors_that_cannot_be_opened_are_not_said_to_be_missing(model, tmp_path):  # noqa: F811
    copy = shutil.copytree(model, tmp_path / "copy")
    files = TensorFiles(copy, "model")
    name = files.names[0]
    files._open.clear()
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        files.read(name)


@pytest.mark.parametrize(
    "words",
    [
        ("train", "{}"),
        ("status", "{}"),
        ("eval", "{}"),
        ("export", "{}", "--format", "peft", "--out", "out"),
        ("report", "{}", "--out", "out"),
    ],
)
def test_every_verb_names_a_link_to_nothing(tmp_path, words):
    (tmp_path / "link").symlink_to("gone")
    outcome = call(*(word.format(tmp_path / "link") for word in words))
    assert outcome.code == 2
    assert f"distlora: {tmp_path}/link is a link to gone, which is not there" in outcome.err
