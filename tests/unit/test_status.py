"""`RUN/status.json`, and what a launch script hears of it."""

import time

import pytest

from distlora.cluster.status import STATUS, StatusFile, new_start, read_status
from distlora.errors import UserError
from tests.e2e.program import call, recipe_of, write_recipe


@pytest.fixture
def file(tmp_path) -> StatusFile:
    return status_file(tmp_path)


def status_file(folder, step=0) -> StatusFile:
    """Of a new start."""
    file = StatusFile(folder, step, new_start())
    file.steps = 40
    return file


@pytest.mark.parametrize(
    ("state", "requeue", "code", "said"),
    [
        ("done", False, 0, "done at step 12 of 40"),
        ("preempted", True, 75, "preempted at step 12 of 40: why"),
        ("failed", True, 75, "failed at step 12 of 40: why"),
        ("failed", False, 1, "failed at step 12 of 40: why"),
        ("running", False, 1, "ended without saying why at step 12 of 40"),
    ],
)
def test_the_exit_code_says_whether_to_start_again(file, state, requeue, code, said, tmp_path):
    file.step = 12
    file.write(state, "why" if ": why" in said else "", requeue)
    outcome = call("status", tmp_path)
    assert (outcome.code, outcome.out) == (code, f"{tmp_path}: {said}\n")


def test_an_outcome_of_an_earlier_start_is_none(file, tmp_path):
    began = time.time() - 0.01
    file.write("preempted", "why", requeue=True)
    assert call("status", tmp_path, "--since", began).code == 75
    later = call("status", tmp_path, "--since", time.time() + 1)
    assert (later.code, later.out) == (1, f"{tmp_path}: no status since then\n")


def test_a_recipe_and_its_overrides_lead_to_the_run(file, tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml", recipe_of(tmp_path / "model", tmp_path / "data", tmp_path / "run")
    )
    assert call("status", recipe).out == f"{tmp_path / 'run'}: no status\n"
    file.write("done")
    assert call("status", recipe, f"output_dir={tmp_path}").code == 0


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / STATUS).write_text('{"state": "done"')
    with pytest.raises(UserError, match=f"{STATUS} is not a run's status"):
        read_status(tmp_path)
    assert call("status", tmp_path).code == 2


def test_only_an_open_outcome_may_be_written_by_others_than_rank_0(file, tmp_path):
    assert file.is_open() and not file.begun, "nothing is there yet"
    file.write("running")
    assert file.is_open() and file.begun
    file.write("done")
    assert not file.is_open()
    later = status_file(tmp_path)
    assert later.is_open() and later.begun, "an earlier start's is there"
    later.write("running")
    assert later.is_open() and not file.is_open()


@pytest.mark.parametrize(
    ("failed_at", "saved", "again"), [(7, 4, False), (9, 4, False), (5, 4, False), (9, 8, True), (8, 8, True)]
)
def test_who_fails_twice_without_having_saved_anything_between_is_not_started_again(
    tmp_path, failed_at, saved, again
):
    first = status_file(tmp_path)
    first.step, first.saved = 7, 4
    first.write("failed", "rank 1 went silent", requeue=True)
    assert read_status(tmp_path).requeue
    second = status_file(tmp_path, step=4)
    second.write("running")
    second.step, second.saved = failed_at, saved
    second.write("failed", "rank 1 went silent", requeue=True)
    found = read_status(tmp_path)
    assert found.requeue == again
    assert ("not again, because the start before failed too" in found.message) != again


def test_before_the_length_is_known(tmp_path):
    StatusFile(tmp_path, 0, new_start()).write("preempted", "asked to stop", requeue=True)
    assert call("status", tmp_path).out == f"{tmp_path}: preempted at step 0: asked to stop\n"
