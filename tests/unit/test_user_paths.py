"""Paths as users write them, also those that no file can have: one sentence, on every way in."""

import errno
from types import SimpleNamespace

import pytest

from distlora.cli.main import main
from distlora.data import load_images
from distlora.data.examples import is_same_data
from distlora.data.sources import is_local, load_rows, parse_split
from distlora.doctor.storage import path_facts
from distlora.errors import UserError
from distlora.files.user_paths import user_path
from distlora.models.hub import on_the_hub, resolve_path

LONG = "/tmp/" + "a" * 300


def section(path, task="completion"):
    return SimpleNamespace(
        task=task, path=path, split="train", fields=None, template=None, labels=None, max_length=9
    )


def test_home_of_a_user_is_found_and_that_of_nobody_left(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x.jsonl", "data.path") == tmp_path / "x.jsonl"
    assert str(user_path("~nobody-of-this-name/x", "data.path")) == "~nobody-of-this-name/x"


@pytest.mark.parametrize(
    ("path", "told"),
    [("~nobody-of-this-name/x.jsonl", "does not exist"), (LONG + ".jsonl", "name too long")],
)
def test_no_rows_are_there(path, told):
    for read in (
        lambda: load_rows(path, "train"),
        lambda: load_rows(f"{path.replace('.jsonl', '.json')}:data", "train"),
        lambda: load_images(section(path, "mnist"), "train"),
    ):
        with pytest.raises(UserError, match=f"(?i){told}") as caught:
            read()
        assert len(str(caught.value)) < 300
    if "~" in path:
        assert is_local(path) and is_same_data(section(path), section(path))


def test_no_model_is_there():
    for path in ("~nobody-of-this-name/model", LONG):
        with pytest.raises(UserError):
            resolve_path(path)
    assert not on_the_hub("~nobody-of-this-name/model")
    assert not path_facts({"data": "~nobody-of-this-name/x"})["data"]["exists"]


def test_long_name_on_the_command_line_is_one_sentence(capsys):
    assert main(["eval", LONG]) == 2
    told = capsys.readouterr().err
    assert "File name too long" in told and "Traceback" not in told


@pytest.mark.parametrize("bound", ["9" * 19, "9" * 5000, "-" + "9" * 400, "9" * 400 + "%"])
def test_bound_of_a_slice_beyond_any_number_of_rows_is_refused(bound):
    with pytest.raises(UserError, match="cannot be read") as caught:
        parse_split(f"train[:{bound}]")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("bound", ["9" * 18, "9" * 18 + "%"])
def test_bound_beyond_the_rows_means_the_last(bound):
    (part,) = parse_split(f"train[:{bound}]")
    assert part.rows(7) == range(7)


def test_names_that_are_too_long_are_told_as_errors_of_the_disk():
    from distlora.files.problems import is_of_the_disk

    assert is_of_the_disk(OSError(errno.ENAMETOOLONG, "File name too long", LONG))
