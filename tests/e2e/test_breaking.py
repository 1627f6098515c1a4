"""Training that must not go on: exit code 1, and a sentence with the step and what can be gone back to."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.program import call, curve, succeed


def broken(*arguments) -> str:
    """The one sentence with which training stops."""
    outcome = call(*arguments)
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    (sentence,) = outcome.sentences
    return sentence


def test_a_loss_that_is_no_number_names_the_step_and_the_last_good_checkpoint(recipe, tmp_path):
    """At a learning rate of 1e30 the first step ruins the weights: the second loss shows it. Checkpoint 1
    holds the ruin.
    """
    run_dir = tmp_path / "run"
    rate = ["train.lr=1e30", "train.eval_every=0"]
    sentence = broken("train", recipe, *rate, "train.save_every=1")
    assert re.fullmatch(
        r"distlora: the training loss is (nan|inf) at step 2; the last good checkpoint: none", sentence
    )
    assert list(curve(run_dir)) == [1]
    assert (run_dir / "checkpoint-1").exists() and not (run_dir / "checkpoint-2").exists()
    assert not (run_dir / "adapter").exists()


def test_the_last_good_checkpoint_is_one_whose_loss_was_a_number(recipe, model, tmp_path):
    """Weights that are ruined behind the run's back after checkpoint 3: it, at least, had a loss that was a
    number.
    """
    base = shutil.copytree(model, tmp_path / "base")
    own = f"model.path={base}"
    run_dir = tmp_path / "run"
    succeed("train", recipe, own)
    shutil.rmtree(run_dir / "checkpoint-6")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    sentence = broken("train", recipe, own)
    assert sentence == (
        f"distlora: the training loss is nan at step 4; the last good checkpoint: {run_dir / 'checkpoint-3'}"
    )
    assert max(curve(run_dir)) == 3


def test_weights_that_a_step_has_ruined_are_never_gone_on_from(recipe, tmp_path):
    run_dir = tmp_path / "run"
    keys = ["train.lr=1e30", "train.save_every=1", "train.eval_every=0"]
    assert "at step 2; the last good checkpoint: none" in broken("train", recipe, *keys)
    outcome = call("train", recipe, *keys)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert outcome.sentences == [
        f"distlora: {run_dir}: every checkpoint is broken, or marked bad in its soundness.json; "
        "--no-resume removes them and begins anew"
    ]
    assert '"bad"' in (run_dir / "checkpoint-1" / "soundness.json").read_text()
    assert not (run_dir / "adapter").exists()
    for command in (("eval", run_dir), ("export", run_dir, "--format", "peft", "--out", tmp_path / "out")):
        assert "no complete checkpoint" in call(*command).sentences[0]


def test_a_last_evaluation_that_is_no_number_fails_the_run(recipe, tmp_path):
    """The step before it has ruined the weights. No adapter takes the place of an older one."""
    sentence = broken("train", recipe, "train.lr=1e30", "train.steps=1")
    assert re.fullmatch(
        r"distlora: the loss of the last evaluation is (nan|inf) after step 1, so nothing is exported; "
        "the last good checkpoint: none",
        sentence,
    )
    assert not (tmp_path / "run" / "adapter").exists()
    assert call("status", tmp_path / "run").code == 1


def test_a_tensor_that_would_not_train_is_named(recipe, model, tmp_path):
    """A layer behind an output of zeros gets no gradient: W of the value projection is fed into a dead output
    projection.
    """
    dead = shutil.copytree(model, tmp_path / "dead")
    weights = load_file(dead / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(weights, dead / "model.safetensors", {"format": "pt"})
    sentence = broken("train", recipe, f"model.path={dead}", "targets=[v_proj]", "method.name=lora_xs")
    assert sentence == (
        "distlora: the gradient of model.layers.1.self_attn.v_proj.R was zero in 5 steps up to step 5, "
        "so it would not be trained; leave model.layers.1.self_attn.v_proj out of targets; "
        f"the last good checkpoint: {tmp_path / 'run' / 'checkpoint-3'}"
    )


def test_a_factor_that_starts_at_zero_is_excused_until_step_2(recipe, tmp_path):
    succeed("train", recipe, "method.name=lora", "train.steps=2")
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.count_nonzero(tensor) for tensor in weights.values())


@pytest.mark.parametrize("optimizer", ["{name: sgd, momentum: 0.9}", "{name: sgd}"])
def test_sgd_runs_and_resumes(recipe, tmp_path, optimizer):
    """Its state is another than AdamW's, or none."""
    settings = [f"train.optimizer={optimizer}", "train.lr=0.05"]
    succeed("train", recipe, *settings)
    losses = curve(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    succeed("train", recipe, *settings, "--resume")
    assert curve(tmp_path / "run") == losses
