"""What a bad step leaves behind: its files, the next limit, and weights that nobody may export."""

import os
from pathlib import Path

import pytest

from distlora.checkpoints.soundness import soundness
from distlora.errors import UserError
from distlora.recipe.load import load_recipe
from distlora.training import bad_batches, train
from distlora.training.bad_batches import FILES
from distlora.training.bad_steps import FEWEST, BadSteps
from distlora.training.export_run import export_run
from tests.tiny_models import tiny_model_dir
from tests.unit.test_bad_steps import ALONE, ruin
from tests.unit.test_train import short_recipe


def test_the_file_of_an_earlier_step_stays_if_it_is_the_newest(tmp_path):
    """As after a rollback behind as many bad steps as there may be files."""
    rows = [{"row": 0, "loss": 1.0}]
    for step in range(50, 50 + FILES):
        bad_batches._write(tmp_path, {"step": step, "batch": step, "rows": rows})
        os.utime(tmp_path / f"step-{step}.json", (step, step))
    bad_batches._write(tmp_path, {"step": 7, "batch": 7, "rows": rows})
    names = {path.name for path in tmp_path.iterdir()}
    assert "step-7.json" in names and "step-50.json" not in names and len(names) == FILES


@pytest.mark.parametrize("loss", [1e-9, 0.5, 0.0])
def test_nothing_is_a_multiple_of_a_median_of_zero(loss):
    memory = BadSteps()
    for step in range(FEWEST):
        memory.remember_good(step, 0.0)
    assert memory.problem_with(loss, 2.0) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("step", [None, 1])
def test_ruined_weights_that_nothing_has_proven_are_not_exported(method, step, model, tmp_path):
    made = short_recipe(model, tmp_path)(f"method={{name: {method}, rank: 2}}", "train.steps=1")
    train.train(made, ALONE)
    run_dir, out = Path(made.output_dir), tmp_path / "out"
    ruin(run_dir / "checkpoint-1")
    assert soundness(run_dir / "checkpoint-1") == "unproven"
    with pytest.raises(UserError, match="^[^\n]*checkpoint-1: [^\n]*infinite or not a number[^\n]*--step$"):
        export_run(run_dir, "peft", out, checkpoint=step)
    assert not out.exists()


def test_a_time_limit_that_no_rank_can_keep_is_refused():
    for text in ("0.2", "1e-9"):
        with pytest.raises(UserError, match="train.hang_timeout.*wanted at least 1, or 0 for no limit"):
            load_recipe("configs/recipes/quickstart.yaml", [f"train.hang_timeout={text}"])
    assert load_recipe("configs/recipes/quickstart.yaml", ["train.hang_timeout=0"]).train.hang_timeout is None
