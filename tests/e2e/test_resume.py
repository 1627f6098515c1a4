"""Runs that are killed, started again, begun anew, or refused."""

import json
import os
import shutil
import signal

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

#: So many that a run cannot end between its first checkpoint and the moment when this is seen.
LONG = 40


def test_a_killed_run_goes_on_as_if_nothing_had_happened(model, data, tmp_path):
    content = recipe_of(model, data, tmp_path / "killed")
    content["method"]["dropout"] = 0.1  # drawn anew at every step: the states of the generators matter
    content["method"]["alpha"] = 6.0  # the gradient of R is then replaced, before and after
    content["train"] |= {"steps": LONG, "lr": 0.005, "eval_every": 7, "exact_match_samples": 0}
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    succeed("train", recipe, f"output_dir={tmp_path / 'whole'}")

    killed = tmp_path / "killed"
    with started(*python("train", recipe)) as process:
        wait_until((killed / "checkpoint-3").exists, PATIENCE, "the checkpoint of step 3", process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / f"checkpoint-{LONG}").exists(), "the run was over before it was killed"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/lo')  # as a crash may leave it
    outcome = succeed("train", recipe)
    assert f"continuing from {killed}/checkpoint-" in outcome.err
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
        assert curve(killed, tag) == curve(tmp_path / "whole", tag), tag
    assert [line["step"] for line in metrics(killed)] == [
        line["step"] for line in metrics(tmp_path / "whole")
    ]
    assert files_of(killed / "adapter") == files_of(tmp_path / "whole" / "adapter")


def test_a_finished_run_trains_nothing_more(finished, tmp_path):
    outcome, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    again = succeed("train", run_dir / "recipe.yaml", f"output_dir={copy}")
    assert f"continuing from {copy}/checkpoint-6" in again.err
    assert metrics(copy) == metrics(run_dir)
    assert files_of(copy / "adapter") == files_of(run_dir / "adapter")
    assert files_of(copy / "checkpoint-6") == files_of(run_dir / "checkpoint-6")
    assert again.out.splitlines()[1:5] == outcome.out.splitlines()[1:5], (
        "loss and exact match, before and after"
    )


def test_what_only_looks_on_may_change(finished, tmp_path):
    _, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoint-6")
    changes = [
        "train.micro_batch_size=1",
        "train.eval_every=0",
        "train.save_every=5",
        "model.gradient_checkpointing=true",
    ]
    succeed("train", run_dir / "recipe.yaml", "--resume", f"output_dir={copy}", *changes)
    assert curve(copy) == pytest.approx(curve(run_dir), rel=1e-4)
    assert (copy / "checkpoint-5").exists()


def test_no_resume_begins_anew(finished, tmp_path):
    _, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    outcome = succeed("train", run_dir / "recipe.yaml", f"output_dir={copy}", "--no-resume")
    assert "continuing" not in outcome.err
    assert curve(copy) == curve(run_dir) and len(metrics(copy)) == len(metrics(run_dir))
    assert [line["step"] for line in metrics(copy)].count(0) == 2, (
        "the initialisation and the first evaluation"
    )


def test_a_broken_checkpoint_is_passed_over(finished, tmp_path):
    _, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    weights = copy / "checkpoint-6" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    outcome = succeed("train", run_dir / "recipe.yaml", f"output_dir={copy}")
    assert f"{copy}/checkpoint-6 is broken and skipped" in outcome.err
    assert f"continuing from {copy}/checkpoint-3" in outcome.err
    assert curve(copy) == curve(run_dir)
    assert curve(copy, "eval/loss") == curve(run_dir, "eval/loss")


@pytest.mark.parametrize("flag", [[], ["--resume"], ["--no-resume"]])
def test_another_recipes_run_is_refused_and_left_alone(finished, tmp_path, flag):
    _, run_dir = finished
    before = files_of(run_dir)
    outcome = call("train", run_dir / "recipe.yaml", "train.lr=0.3", *flag)
    assert outcome.code == 2
    assert outcome.sentences == [
        f"distlora: output_dir: {run_dir} holds the run of another recipe "
        "(train.lr is 0.02 there and 0.3 here); name another directory"
    ]
    assert files_of(run_dir) == before


def test_resume_demands_a_checkpoint(recipe, tmp_path):
    outcome = call("train", recipe, "--resume")
    assert (outcome.code, outcome.sentences) == (
        2,
        [f"distlora: --resume: {tmp_path / 'run'} holds no run; start it without --resume"],
    )
    assert not (tmp_path / "run").exists(), "nothing is made for a mistake"


def test_resume_of_a_run_without_a_whole_checkpoint(finished, tmp_path):
    _, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    for step in (3, 6):
        (copy / f"checkpoint-{step}" / "manifest.json").unlink()
    outcome = call("train", run_dir / "recipe.yaml", f"output_dir={copy}", "--resume")
    assert outcome.code == 2
    assert outcome.sentences == [
        f"distlora: --resume: {copy} holds no complete checkpoint; start it without --resume"
    ]
    outcome = call("train", run_dir / "recipe.yaml", f"output_dir={copy}")
    assert (
        outcome.code == 2
        and "every checkpoint is broken; --no-resume removes them and begins anew" in outcome.err
    )


def test_a_mistake_that_is_corrected_may_use_the_same_directory(recipe, tmp_path):
    """What a refused start leaves behind is no run of another recipe."""
    for mistake in ("targets=[q_porj]", "method.rank=5000", "data.max_length=3"):
        assert call("train", recipe, mistake).code == 2, mistake
    succeed("train", recipe, "train.steps=1")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
