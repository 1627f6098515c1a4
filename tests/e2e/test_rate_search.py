"""Runs with `train.lr: search`."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.program import (
    PATIENCE,
    call,
    curve,
    files_of,
    metrics,
    python,
    recipe_of,
    started,
    succeed,
    wait_until,
    write_recipe,
)

LONG = 40
SEARCH = {"lowest": 1e-3, "highest": 3e-2, "rates": 2, "steps": 2, "samples": 4}


@pytest.fixture(scope="module")
def searched(model, data, tmp_path_factory):
    """The recipe of a run that searches, and the directory of the whole run; not to be changed."""
    folder = tmp_path_factory.mktemp("searched")
    content = recipe_of(model, data, folder / "run")
    content["method"]["dropout"] = 0.1  # the generators' states matter
    content["train"] |= {"lr": "search", "lr_search": SEARCH, "steps": LONG, "schedule": "linear"}
    content["train"] |= {"eval_every": 7, "exact_match_samples": 0, "warmup_ratio": 0.1}
    recipe = write_recipe(folder / "recipe.yaml", content)
    succeed("train", recipe)
    return recipe, folder / "run"


def _found(run_dir) -> float:
    return json.loads((run_dir / "lr_search.json").read_text())["rate"]


def _weights(adapter: Path) -> dict[str, bytes]:
    """All files but the card, which tells how the rate was found."""
    return {name: content for name, content in files_of(adapter).items() if name != "README.md"}


def test_a_run_is_the_one_of_the_rate_that_it_finds(searched, tmp_path):
    """To the last bit: the search leaves no trace."""
    recipe, run_dir = searched
    outcome = succeed("train", recipe, f"train.lr={_found(run_dir)}", f"output_dir={tmp_path / 'number'}")
    assert "found by the search" not in outcome.out
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
        assert curve(run_dir, tag) == curve(tmp_path / "number", tag), tag
    assert max(curve(run_dir, "train/learning_rate").values()) == _found(run_dir)
    assert _weights(run_dir / "adapter") == _weights(tmp_path / "number" / "adapter")


def test_what_was_found_is_told(searched):
    _, run_dir = searched
    told = next(line for line in metrics(run_dir) if "lr_search/rate" in line)
    content = json.loads((run_dir / "lr_search.json").read_text())
    assert told["step"] == 0 and told["lr_search/rate"] == content["rate"]
    assert told["lr_search/loss"] == dict(map(tuple, content["tried"]))[content["rate"]]
    assert told["lr_search/seconds"] == content["seconds"] > 0
    assert len(content["tried"]) == 3 and content["loss_before"] == told["lr_search/loss_before"]


def test_a_killed_run_goes_on_with_the_same_rate(searched, tmp_path):
    recipe, whole = searched
    killed = tmp_path / "killed"
    with started(*python("train", recipe, f"output_dir={killed}")) as process:
        wait_until((killed / "checkpoint-3").exists, PATIENCE, "the checkpoint of step 3", process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / f"checkpoint-{LONG}").exists(), "the run was over before it was killed"
    (killed / "lr_search.json").unlink()  # the checkpoint knows it as well
    outcome = succeed("train", recipe, f"output_dir={killed}")
    assert "continuing from" in outcome.err and "learning rate" not in outcome.err
    for tag in ("train/loss", "train/learning_rate", "eval/loss"):
        assert curve(killed, tag) == curve(whole, tag), tag


def test_before_the_first_checkpoint_the_choice_is_in_the_directory(searched, tmp_path):
    recipe, whole = searched
    copy = shutil.copytree(whole, tmp_path / "copy")
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    outcome = succeed("train", recipe, f"output_dir={copy}")
    assert f"learning rate {_found(whole):.3g}, from {copy}" in outcome.err
    assert "after 2 steps" not in outcome.err and curve(copy) == curve(whole)


def test_another_search_is_another_run_and_beginning_anew_searches_again(searched, tmp_path):
    recipe, whole = searched
    copy = shutil.copytree(whole, tmp_path / "copy")
    refused = call("train", recipe, "train.lr_search.steps=1", f"output_dir={copy}")
    assert refused.code == 2 and "(train.lr_search.steps is 2 there and 1 here)" in refused.err
    outcome = succeed("train", recipe, "--no-resume", f"output_dir={copy}")
    assert "after 2 steps" in outcome.err and _found(copy) == _found(whole)
