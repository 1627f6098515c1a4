"""A start after bad steps: what it leaves out, what it meets again, and what it goes on from."""

import json
import math
from pathlib import Path

import pytest

from distlora.checkpoints.directory import newest
from distlora.data import TrainOrder
from distlora.errors import TrainingError, UserError
from distlora.training import train
from distlora.training.bad_steps import BadSteps, read_left_out
from distlora.training.continued import check_extra
from tests.unit import test_bad_steps
from tests.unit.test_bad_steps import ALONE, METHODS, SIX, ruin, run
from tests.unit.test_train import short_recipe

model, recipe, poison = test_bad_steps.model, test_bad_steps.recipe, test_bad_steps.poison


def written(run_dir: Path) -> dict:
    return read_left_out(run_dir)


# ---------------------------------------------------------------------- bad steps in a row


@pytest.fixture(scope="module")
def without_two(model, tmp_path_factory):
    """What a run trains that has never had batches 4 and 5."""
    indices = TrainOrder.indices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainOrder, "indices", lambda self, step: indices(self, step + 2 * (step >= 4)))
        return run(short_recipe(model, tmp_path_factory.mktemp("without"))(*SIX, *METHODS["lora_xs"]))


@pytest.mark.parametrize("what", ["skip", "rollback"])
def test_a_row_that_ends_the_run_is_met_again_and_a_higher_limit_leads_past_it(
    what,
    recipe,
    poison,
    without_two,
):
    poison(batch_4=math.nan, batch_5=math.nan)
    words = [*SIX, *METHODS["lora_xs"], f"train.on_bad_step={what}"]
    ends, left_out = [], []
    for _ in range(3):
        made = recipe(*words, "train.bad_steps_limit=2")
        with pytest.raises(TrainingError) as ended:
            train.train(made, ALONE)
        ends.append(str(ended.value).partition("; the last good")[0])
        left_out.append(written(Path(made.output_dir))["left_out"])
    assert (
        ends
        == [
            "the training loss is nan at step 5, and that was bad step 2 in a row (train.bad_steps_limit=2): "
            "the same command meets these batches again, and goes on behind them with a higher limit"
        ]
        * 3
    )
    assert left_out == [[4, 5]] * 3
    assert run(recipe(*words, "train.bad_steps_limit=3")) == without_two
    assert written(Path(made.output_dir))["left_out"] == [4, 5]


def test_what_is_met_again_is_not_what_the_weights_have_passed():
    memory = BadSteps(left_out=[1, 4, 9], row=[4, 9], latest=9)
    memory.meet_again(5)  # steps on batches 0, 2, 3, 5, 6
    assert (memory.left_out, memory.row) == ([1, 4], [])
    memory = BadSteps(left_out=[1, 4, 9], row=[4, 9], latest=9)
    memory.meet_again(3)  # 0, 2, 3
    assert memory.left_out == [1]
    memory = BadSteps(left_out=[0, 1], row=[0, 1], latest=1)
    memory.meet_again(0)
    assert memory.left_out == []


@pytest.mark.parametrize(
    ("step", "state", "expected"),
    [
        (3, None, [3, 7]),  # a checkpoint from before there were any; batch 2 was trained on
        (3, {"left_out": [2], "latest": 2}, [2, 7]),  # and batch 3 was trained on
        (3, {"left_out": [2, 3, 5], "latest": 3}, [2, 3, 7]),  # batch 5 is decided anew
        (0, None, [2, 3, 7]),
    ],
)
def test_a_checkpoint_knows_what_it_has_passed_and_the_file_what_comes(step, state, expected):
    memory = BadSteps(left_out=[2, 3, 7])
    memory.go_on_from(step, state)
    assert memory.left_out == expected


def test_what_an_earlier_version_has_written_is_read(tmp_path):
    (tmp_path / "bad_steps").mkdir()
    text = json.dumps({"left_out": [3, 8, 5], "in_row": 2, "latest": 7})
    (tmp_path / "bad_steps" / "left_out.json").write_text(text)
    memory = BadSteps()
    memory.recall(read_left_out(tmp_path))
    assert (memory.left_out, memory.row, memory.latest) == ([3, 5, 8], [5, 8], 7)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    made = short_recipe(model, tmp_path_factory.mktemp("done"))("train.steps=1")
    train.train(made, ALONE)
    return made


@pytest.mark.parametrize(
    "state",
    [
        {"left_out": [1.5], "latest": 0}, {"left_out": [-1], "latest": 0}, {"left_out": "x", "latest": 0},
        {"left_out": [], "latest": 0, "losses": ["a"]}, {"left_out": [], "latest": None}, {"latest": 1}, [],
    ],
)  # fmt: skip
def test_a_checkpoint_with_another_memory_is_one_sentence(state, done):
    found = newest(Path(done.output_dir))
    found.extra["bad_steps"] = state
    with pytest.raises(UserError, match="^[^\n]*checkpoint-1: its extra state is damaged .bad_steps[^\n]*$"):
        check_extra(found, done)


# ---------------------------------------------------------------------- what a start went on from


def test_the_environment_names_the_checkpoint_that_was_really_resumed(recipe):
    made = recipe(*SIX, *METHODS["lora_xs"], "train.keep_checkpoints=3")
    train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    ruin(run_dir / "checkpoint-6")
    train.train(made, ALONE)
    starts = json.loads((run_dir / "environment.json").read_text())
    assert [start["resumed_at"] for start in starts] == [None, 4]
