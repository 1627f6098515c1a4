"""A bad batch on one process and on two: the same decision, and the same run afterwards."""

import json
from pathlib import Path

import pytest

from distlora.checkpoints.soundness import soundness
from tests.e2e.program import curve, free_port, recipe_of, run, succeed, write_recipe, write_rows

#: A row like no other, so that losses differ. The batch of step 13 is the first one above the median of those
#: before.
ODD = {
    "question": "zq?",
    "answer": "QQ!! ~~ WvV 77 plugh zxcv MNBV 93 @@ {k} <<J>> 5521 ghjkl %% YTREWQ 0x88 ^^ p",
}
STEP = 13


@pytest.fixture
def recipe(model, tmp_path) -> Path:
    data = write_rows(tmp_path / "data", 40)
    rows = (data / "train.jsonl").read_text().splitlines()
    rows[7] = json.dumps(ODD)
    (data / "train.jsonl").write_text("\n".join(rows) + "\n")
    content = recipe_of(model, data, tmp_path / "run")
    content["method"] = {"name": "srlora", "rank": 4, "target_rank": 12, "gamma": 0.5, "interval": 4}
    content["targets"] = ["q_proj", "v_proj", "down_proj"]
    content["train"] |= {
        "lr": 0.03, "steps": 15, "eval_every": 0, "exact_match_samples": 0, "bad_loss_factor": 1.02,
        "on_bad_step": "skip",
    }  # fmt: skip
    return write_recipe(tmp_path / "recipe.yaml", content)


def test_two_ranks_under_zero_3_roll_back_to_the_run_that_one_process_makes_by_skipping(recipe, tmp_path):
    """Frozen weights have changed after step 12, which the rollback to step 9 takes back."""
    skipped, rolled_back = tmp_path / "run", tmp_path / "two"
    outcome = succeed("train", recipe)
    assert f"at step {STEP}: batch {STEP - 1} is left out" in outcome.err
    outcome = run(
        "torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "distlora", "train", recipe,
        "train.on_bad_step=rollback", "deepspeed={zero_optimization: {stage: 3}}",
        f"output_dir={rolled_back}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "going back to step 9" in outcome.err
    for run_dir in (skipped, rolled_back):
        assert json.loads((run_dir / "bad_steps" / "left_out.json").read_text())["left_out"] == [STEP - 1]
        assert soundness(run_dir / "checkpoint-15") == "good"
    assert curve(rolled_back) == pytest.approx(curve(skipped), rel=1e-3)
    kept = [
        json.loads((run_dir / "bad_steps" / f"step-{STEP}.json").read_text())["rows"]
        for run_dir in (skipped, rolled_back)
    ]
    assert [row["row"] for row in kept[0]] == [row["row"] for row in kept[1]] and len(kept[0]) == 4
    losses = [row["loss"] for row in kept[0]]
    assert losses == sorted(losses, reverse=True) and all(row["text"] for row in kept[0])
    assert {row["rank"] for row in kept[1]} == {0, 1}
