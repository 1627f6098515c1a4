"""Models of many classes from their files to a finished run: wrappers of language models, which are trained
on texts alone; models with positions and logits of their own; and encoder-decoders, which classify.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PegasusConfig,
)

from distlora.models.loading import load_tokenizer
from distlora.recipe.load import load_recipe
from distlora.training.objective import objective_of
from tests.e2e.program import curve, metrics, recipe_of, succeed, write_recipe
from tests.e2e.test_mistakes import refused
from tests.tiny_zoo import zoo_model_dir

LABELS = ["negative", "positive"]


def run_of(model, data, folder, **train):
    content = recipe_of(model, data, folder / "run")
    content["method"] = {"name": "lora", "rank": 4}
    content["train"] |= {"steps": 2, "eval_every": None, "save_every": None} | train
    return content


def started_at(recipe, model):
    """The mean loss of the evaluation split's response tokens before training, by the class itself."""
    recipe = load_recipe(recipe)
    tokenizer, objective = load_tokenizer(recipe.model), objective_of(recipe)
    total, count = 0.0, 0
    for sample in objective.read("test", tokenizer).samples:
        labels = torch.tensor([sample.labels])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([sample.input_ids]), labels=labels).loss
        targets = int((labels[:, 1:] >= 0).sum())
        total, count = total + float(loss) * targets, count + targets
    return total / count


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_a_wrapper_is_trained_as_the_language_model_in_it(name, data, tmp_path):
    directory = zoo_model_dir(name, tmp_path)
    content = run_of(directory, data, tmp_path, eval_samples=None)
    content["targets"] = ["*.language_model.*_proj"]
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    succeed("train", recipe)
    run = tmp_path / "run"
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    before = next(line["eval/loss"] for line in metrics(run) if line["step"] == 0 and "eval/loss" in line)
    assert before == pytest.approx(started_at(recipe, model), abs=1e-5)
    assert len(curve(run)) == 2
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    assert names and all(".language_model." in name for name in names)


@pytest.mark.parametrize("name", ["opt", "cohere", "granite", "stablelm", "olmo2", "gpt_neo"])
def test_a_language_model_is_trained_from_its_own_loss(name, data, tmp_path):
    directory = zoo_model_dir(name, tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", run_of(directory, data, tmp_path, eval_samples=None))
    succeed("train", recipe)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    before = next(line["eval/loss"] for line in metrics(tmp_path / "run") if "eval/loss" in line)
    assert before == pytest.approx(started_at(recipe, model), abs=1e-5)


# ---------------------------------------------------------------------- encoder-decoders


def classification(model, folder, rows):
    """Five rows in steps of two passes of one row: the last step of an epoch has an empty pass."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = run_of(model, folder / "rows.jsonl", folder, steps=3, micro_batch_size=1, global_batch_size=2)
    content["train"] |= {"exact_match_samples": 0}
    content["data"] = {
        "task": "classification", "path": str(folder / "rows.jsonl"), "labels": LABELS, "max_length": 32,
        "fields": {"text": "text", "label": "label"},
    }  # fmt: skip
    return content


def labelled(count=5):
    return [
        {"text": "It is good. " * (number % 3 + 1), "label": LABELS[number % 2]} for number in range(count)
    ]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_classifies_also_where_a_pass_is_empty(name, tmp_path):
    directory = zoo_model_dir(name, tmp_path)
    content = classification(directory, tmp_path, labelled())
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    succeed("train", recipe)
    assert len(curve(tmp_path / "run")) == 3
    succeed("export", tmp_path / "run", "--format", "merged", "--out", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 2


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_plan_counts_an_encoder_decoder(name, tmp_path):
    content = classification(zoo_model_dir(name, tmp_path), tmp_path, labelled())
    content["deepspeed"] = "configs/zero/zero2.json"
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    told = succeed("plan", recipe, "--nodes", "1", "--gpus-per-node", "1").out
    directory = content["model"]["path"]
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(LABELS))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{directory}: {count:,} parameters in float32" in told
    (weights,) = (line.split()[-1] for line in told.splitlines() if line.startswith("  weights "))
    assert float(weights) == pytest.approx(4 * count / 2**30, rel=0.01)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_responses_are_not_trained_in_an_encoder_decoder(name, data, tmp_path):
    directory = zoo_model_dir(name, tmp_path)
    (directory / "model.safetensors").unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", run_of(directory, data, tmp_path))
    sentence = refused("train", recipe)
    assert f"the type {name} reads the prompt in an encoder of its own" in sentence
    assert "a data.task with labels, such as rte, trains it as a classifier" in sentence


def test_other_language_models_with_an_encoder_are_refused_too(data, tmp_path):
    """transformers has a causal class for Pegasus: its decoder alone, which would read no prompt."""
    PegasusConfig(d_model=24, vocab_size=331).save_pretrained(tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", run_of(tmp_path / "model", data, tmp_path))
    assert "the type pegasus reads the prompt in an encoder of its own" in refused("train", recipe)
