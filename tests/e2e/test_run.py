"""A whole run on the plain engine: what it says, what it leaves behind, and what the other verbs make of
that.
"""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distlora.data import collate, load_split
from distlora.methods import registry
from distlora.models.loading import load_tokenizer
from distlora.models.losses import response_loss
from distlora.recipe.load import load_recipe
from tests.e2e.program import call, curve, files_of, metrics, recipe_of, succeed, write_recipe
from tests.tiny_models import tiny_model_dir


def mean_loss(model, recipe) -> float:
    """The loss of the evaluation split by a model that other software has loaded."""
    tokenizer = load_tokenizer(recipe.model)
    samples = load_split(recipe.data, recipe.data.eval_split, tokenizer).samples
    with torch.no_grad():
        loss, tokens = response_loss(model, collate(samples, tokenizer.pad_token_id, torch.device("cpu")))
    return float(loss) / tokens


# ---------------------------------------------------------------------- what a run leaves


def test_files(finished):
    _, run_dir = finished
    found = {path.name for path in run_dir.iterdir()}
    told = {"data.json", "metrics.jsonl", "environment.json", "status.json", "summary.json", "logs"}
    assert found == {"recipe.yaml", "checkpoint-3", "checkpoint-6", "adapter"} | told
    kinds = {path.suffix for path in run_dir.rglob("*") if path.is_file()}
    assert kinds == {".yaml", ".jsonl", ".json", ".safetensors", ".log", ".md"}


def test_metrics(finished):
    _, run_dir = finished
    every_step = list(range(1, 7))
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"):
        assert list(curve(run_dir, tag)) == every_step
    assert curve(run_dir, "train/learning_rate") == dict.fromkeys(every_step, 0.02)
    assert list(curve(run_dir, "eval/loss")) == [0, 2, 4, 6]
    assert list(curve(run_dir, "eval/exact_match")) == [0, 6], (
        "answers are generated before and after training"
    )
    tags = {tag for line in metrics(run_dir) for tag in line}
    assert {"init/seconds", "init/samples", "init/captured_energy", "init/eta"} <= tags
    assert [line["step"] for line in metrics(run_dir)] == sorted(line["step"] for line in metrics(run_dir))
    losses = curve(run_dir, "eval/loss")
    assert losses[6] < losses[0], "it learns"


def test_what_is_said(finished):
    outcome, run_dir = finished
    losses = curve(run_dir, "eval/loss")
    assert re.search(rf"loss +{losses[0]:.4f} +{losses[6]:.4f}", outcome.out)
    assert re.search(r"exact match +0\.0% +\d+\.\d%", outcome.out)
    # Seven projections in three layers, one 4 x 4 core each.
    assert re.search(rf"trained parameters +{7 * 3 * 16} .*LoRA's 11,676 at rank 4", outcome.out)
    for place in ("adapter", "metrics.jsonl"):
        assert str(run_dir / place) in outcome.out
    assert "data: 20 samples of split train, 4 truncated to 48 tokens, 2 dropped" in outcome.err


def test_the_resolved_recipe_reproduces_the_run(finished, tmp_path):
    _, run_dir = finished
    succeed("train", run_dir / "recipe.yaml", f"output_dir={tmp_path / 'again'}")
    assert curve(tmp_path / "again") == curve(run_dir)
    assert curve(tmp_path / "again", "eval/loss") == curve(run_dir, "eval/loss")
    again = (tmp_path / "again" / "recipe.yaml").read_text()
    assert again.replace(str(tmp_path / "again"), str(run_dir)) == (run_dir / "recipe.yaml").read_text()


def test_the_adapter_is_a_peft_adapter_with_the_runs_loss(finished):
    _, run_dir = finished
    recipe = load_recipe(run_dir / "recipe.yaml")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    before = mean_loss(base, recipe)
    merged = PeftModel.from_pretrained(base, run_dir / "adapter").merge_and_unload()
    losses = curve(run_dir, "eval/loss")
    assert before == pytest.approx(losses[0], rel=1e-5)
    assert mean_loss(merged, recipe) == pytest.approx(losses[6], rel=1e-5)


def test_the_summary_tells_what_the_run_came_to(finished):
    _, run_dir = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["trained"], summary["lora_trained"], summary["steps"]) == (7 * 3 * 16, 11676, 6)
    assert summary["steps_per_epoch"] == 5, "20 samples, 4 a step"
    assert (
        summary["epoch_seconds"] == pytest.approx(5 * summary["step_seconds"]) and summary["step_seconds"] > 0
    )
    assert summary["init_seconds"] == curve(run_dir, "init/seconds")[0]
    assert summary["tokens_per_second"] == curve(run_dir, "train/tokens_per_second")[6]
    assert summary["peak_memory_bytes"] > 100 * 2**20, "the libraries alone take more"
    for when, step in (("before", 0), ("after", 6)):
        assert summary[when]["loss"] == curve(run_dir, "eval/loss")[step]


# ---------------------------------------------------------------------- the other verbs


def test_a_report_of_the_run(finished, tmp_path):
    _, run_dir = finished
    outcome = succeed("report", run_dir, "--out", tmp_path / "report")
    assert outcome.out.strip() == str(tmp_path / "report" / "report.md")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "done, step 6 of 6" in page and f"| lora\\_sb | 4 | 6 | {7 * 3 * 16} | 1 |" in page
    for heading in ("Scores", "Losses", "Initialisation", "Speed and memory", "Inference"):
        assert f"### {heading}\n" in page


def test_eval_tells_the_runs_loss_and_changes_nothing(finished, tmp_path):
    _, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    before = files_of(copy)
    outcome = succeed("eval", copy)
    said = dict(line.split() for line in outcome.out.splitlines())
    assert float(said["eval/loss"]) == pytest.approx(curve(run_dir, "eval/loss")[6], abs=1e-6)
    assert float(said["eval/exact_match"]) == pytest.approx(curve(run_dir, "eval/exact_match")[6], abs=1e-6)
    assert files_of(copy) == before


def test_eval_takes_any_name_of_a_directory(finished, tmp_path, monkeypatch):
    """One that YAML would not take for a text."""
    monkeypatch.chdir(tmp_path)
    for name in ("7", "it's: [a run"):
        shutil.copytree(finished[1], name)
        assert succeed("eval", name, "train.exact_match_samples=0").out.startswith("eval/loss ")


def test_eval_of_an_interrupted_run_keeps_its_metrics(finished, tmp_path):
    _, run_dir = finished
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoint-6")
    before = files_of(copy)
    succeed("eval", copy, "train.micro_batch_size=1")
    assert files_of(copy) == before


def test_exports_agree(finished, tmp_path):
    _, run_dir = finished
    recipe = load_recipe(run_dir / "recipe.yaml")
    for kind in ("peft", "merged"):
        out = succeed("export", run_dir, "--format", kind, "--out", tmp_path / kind).out
        assert out.splitlines()[0] == str(tmp_path / kind)
    assert "compared with the run: logits differ by" in out
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokens = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5)
    assert mean_loss(merged, recipe) == pytest.approx(curve(run_dir, "eval/loss")[6], rel=1e-5)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model.path


def test_export_of_an_earlier_checkpoint(finished, tmp_path):
    _, run_dir = finished
    succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "early", "--step", "3")
    recipe = load_recipe(run_dir / "recipe.yaml")
    early = AutoModelForCausalLM.from_pretrained(tmp_path / "early", dtype=torch.float32).eval()
    losses = curve(run_dir, "eval/loss")
    assert losses[4] < mean_loss(early, recipe) < losses[2]


def test_methods_are_listed():
    outcome = succeed("methods")
    heading, *lines = outcome.out.splitlines()
    assert heading.split()[:2] == ["method", "trains"] and heading.endswith("exports to")
    assert [line.split()[0] for line in lines[: len(registry())]] == list(registry())


# ---------------------------------------------------------------------- other runs


def test_full_fine_tuning_has_no_adapter_and_exports_merged(recipe, tmp_path):
    outcome = succeed("train", recipe, "method.name=full", "train.lr=0.001", "train.steps=2")
    run_dir = tmp_path / "run"
    assert not (run_dir / "adapter").exists() and "none: PEFT's format does not hold it" in outcome.out
    succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert mean_loss(merged, load_recipe(recipe)) == pytest.approx(curve(run_dir, "eval/loss")[2], rel=1e-5)


def test_a_run_with_recompositions(recipe, tmp_path, monkeypatch):
    """Swaps after steps 2 and 4: what is told of them, resume between them, evaluation and both exports."""
    run_dir = tmp_path / "run"
    method = ["method.name=srlora", "method.target_rank=8", "train.lr=0.001"]
    outcome = succeed("train", recipe, *method)
    assert "the reserve of new components takes" in outcome.err
    told, losses = (run_dir / "recompositions.jsonl").read_text(), curve(run_dir)
    swaps = [json.loads(line) for line in told.splitlines()]
    reasons = [(swap["step"], swap["reason"]) for swap in swaps]
    assert reasons == [(2, "recomposition 1 of 2"), (4, "recomposition 2 of 2")]
    assert all(
        len(layer["components"]) == 2 and layer["learned_norm"] > 0
        for swap in swaps
        for layer in swap["layers"].values()
    )
    assert (
        list(curve(run_dir, "recompose/seconds")) == list(curve(run_dir, "recompose/rounding_loss")) == [2, 4]
    )

    shutil.rmtree(run_dir / "checkpoint-6")
    resumed = succeed("train", recipe, *method)
    assert "continuing from" in resumed.err and "the reserve of new components takes" in resumed.err
    assert (run_dir / "recompositions.jsonl").read_text() == told and curve(run_dir) == losses

    final = pytest.approx(curve(run_dir, "eval/loss")[6], rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).model.path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run_dir / "adapter").merge_and_unload()
    assert mean_loss(adapted, load_recipe(recipe)) == final
    succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert mean_loss(merged, load_recipe(recipe)) == final
    # An evaluation recomposes nothing, so it reads neither scores nor reserve.
    monkeypatch.setattr("distlora.api.plan.Recomposer", lambda *_: pytest.fail("a recomposer was made"))
    said = dict(line.split() for line in succeed("eval", run_dir).out.splitlines())
    assert float(said["eval/loss"]) == pytest.approx(curve(run_dir, "eval/loss")[6], abs=1e-6)


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_chat_template_with_a_tokenizer_without_a_pad_token(name, data, tmp_path):
    model = tiny_model_dir(name, tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(model, data, tmp_path / "run"))
    succeed("train", recipe, "data.template=chat", "data.max_length=64", "train.steps=2")
    assert json.loads((model / "tokenizer_config.json").read_text()).get("pad_token") is None
    # What CHAT_TEMPLATE makes of one message, written out.
    same = (
        f"data.template='[user] {{prompt}}{load_tokenizer(load_recipe(recipe).model).eos_token}[assistant] '"
    )
    succeed("train", recipe, same, "data.max_length=64", "train.steps=2", f"output_dir={tmp_path / 'same'}")
    assert len(curve(tmp_path / "run")) == 2
    assert curve(tmp_path / "run") == curve(tmp_path / "same")


def test_nothing_is_evaluated_or_saved_where_the_recipe_says_so(recipe, tmp_path):
    overrides = [
        "data.eval_split=null",
        "train.exact_match_samples=0",
        "train.eval_every=0",
        "train.save_every=null",
    ]
    outcome = succeed("train", recipe, *overrides)
    run_dir = tmp_path / "run"
    assert not any(tag.startswith("eval/") for line in metrics(run_dir) for tag in line)
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-6"], "the end is always saved"
    assert "before" not in outcome.out
    assert call("eval", run_dir).sentences == [
        "distlora: data.eval_split is null, so there is nothing to evaluate on; name a split"
    ]


def test_micro_batches_and_the_recipes_epochs(recipe, tmp_path):
    """20 samples in batches of 6: four steps an epoch, the last of two samples; how they are cut into passes
    is all one.
    """
    sizes = ["train.steps=null", "train.epochs=2", "train.global_batch_size=6"]
    succeed("train", recipe, *sizes, "train.micro_batch_size=3", f"output_dir={tmp_path / 'three'}")
    succeed("train", recipe, *sizes, "train.micro_batch_size=1", f"output_dir={tmp_path / 'one'}")
    losses = curve(tmp_path / "one")
    assert list(losses) == list(range(1, 9))
    assert curve(tmp_path / "three") == pytest.approx(losses, rel=1e-4)


def test_the_evaluation_before_training_is_of_the_pretrained_model(recipe, tmp_path):
    """Under DoRA too, whose layers give nothing while its factors are zero."""
    told = {}
    for name in ("lora", "dora"):
        run_dir = tmp_path / name
        succeed(
            "train",
            recipe,
            f"method.name={name}",
            "train.steps=1",
            "train.exact_match_samples=0",
            f"output_dir={run_dir}",
        )
        told[name] = curve(run_dir, "eval/loss")[0]
    base = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).model.path, dtype=torch.float32).eval()
    assert told == pytest.approx(dict.fromkeys(told, mean_loss(base, load_recipe(recipe))), rel=1e-5)
