"""Encoders as classifiers, from the official files of GLUE's tasks to what other software loads."""

import csv
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.e2e.program import curve, recipe_of, succeed, write_recipe
from tests.e2e.test_mistakes import refused
from tests.tiny_models import ENCODERS, tiny_encoder_dir

LABELS = ("entailment", "not_entailment")


def rte_row(number: int) -> tuple[str, str, int]:
    have = number % 7 + 1
    first = f"Tom has {have} apples. " + 'He says "no".' * (number % 3)
    return first, f"Tom has {have + number % 2} apples.", number % 2


def write_rte(folder, train=22, dev=9):
    """A folder with `train.tsv` and `dev.tsv` as in GLUE's RTE: quotation marks are text."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("dev", dev)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for number in range(count):
            *texts, label = rte_row(number if split == "train" else number + 1000)
            lines.append("\t".join([str(number), *texts, LABELS[label]]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rte(tmp_path_factory.mktemp("rte"))


def recipe(model, data, folder, **train):
    content = recipe_of(model, data, folder / "run")
    content["data"] = {"task": "rte", "path": str(data), "eval_split": "validation", "max_length": 60}
    content["train"] |= {"exact_match_samples": 0, "eval_samples": None} | train
    return write_recipe(folder / "recipe.yaml", content)


@torch.no_grad()
def scores(model, tokenizer, data):
    """Loss and accuracy on the evaluation split, row by row, by nothing of ours."""
    with (data / "dev.tsv").open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    loss = right = 0.0
    for row in rows:
        logits = model.eval()(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits
        label = LABELS.index(row["label"])
        loss += float(F.cross_entropy(logits, torch.tensor([label])))
        right += int(logits.argmax()) == label
    return loss / len(rows), right / len(rows)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_is_trained_evaluated_and_loaded_by_others(name, models, data, tmp_path):
    base = tiny_encoder_dir(name, models)
    outcome = succeed("train", recipe(base, data, tmp_path))
    run = tmp_path / "run"
    assert "data: 9 samples of split validation" in outcome.err and "accuracy" in outcome.out
    losses, accuracies = curve(run, "eval/loss"), curve(run, "eval/accuracy")
    assert list(losses) == list(accuracies) == [0, 2, 4, 6]
    assert all(math.isfinite(loss) for loss in losses.values()) and losses[6] != losses[0]

    last = {"loss": losses[6], "accuracy": accuracies[6]}
    printed = dict(line.split() for line in succeed("eval", run).out.splitlines())
    assert {f"eval/{key}": f"{value:.6f}" for key, value in last.items()} == printed

    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = PeftModel.from_pretrained(plain, run / "adapter")
    assert scores(adapted, tokenizer, data) == pytest.approx(tuple(last.values()), rel=1e-4)
    succeed("export", run, "--format", "merged", "--out", tmp_path / "merged")
    merged, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert scores(merged, tokenizer, data) == pytest.approx(tuple(last.values()), rel=1e-4)


def test_a_regression_is_trained_evaluated_and_loaded_by_others(models, tmp_path):
    rows = [
        (f"Tom has {number} apples.", f"Tom has {number + number % 6} apples.", 5 - number % 6)
        for number in range(31)
    ]
    data = tmp_path / "STS-B"
    data.mkdir()
    for split, part in (("train", rows[:22]), ("dev", rows[22:])):
        lines = ["index\tsentence1\tsentence2\tscore", *(f"0\t{a}\t{b}\t{score}.000" for a, b, score in part)]
        (data / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    base, run = tiny_encoder_dir("bert", models), tmp_path / "run"
    content = recipe_of(base, tmp_path, run)
    content["data"] = {"task": "stsb", "path": str(tmp_path), "eval_split": "validation", "max_length": 60}
    content["train"] |= {"exact_match_samples": 0, "eval_samples": None}
    succeed("train", write_recipe(tmp_path / "recipe.yaml", content))
    last = {key: curve(run, f"eval/{key}")[6] for key in ("loss", "pearson", "spearman")}
    assert all(-1 <= last[key] <= 1 for key in ("pearson", "spearman"))
    printed = dict(line.split() for line in succeed("eval", run).out.splitlines())
    assert {f"eval/{key}": f"{value:.6f}" for key, value in last.items()} == printed

    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    succeed("export", run, "--format", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for model in (PeftModel.from_pretrained(plain, run / "adapter"), merged):
        with torch.no_grad():
            errors = [
                float(model.eval()(**tokenizer(a, b, return_tensors="pt")).logits) - score
                for a, b, score in rows[22:]
            ]
        assert sum(error**2 for error in errors) / len(errors) == pytest.approx(last["loss"], rel=1e-4)


def test_the_head_is_in_checkpoints_and_a_resumed_run_goes_on_with_it(models, data, tmp_path):
    path = recipe(tiny_encoder_dir("bert", models), data, tmp_path)
    succeed("train", path)
    heads = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter.safetensors") for step in (3, 6)]
    for name in ("classifier.weight", "classifier.bias"):
        assert not torch.equal(heads[0][name], heads[1][name])
    whole = curve(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "adapter")
    succeed("train", path, "--resume")
    again = load_file(tmp_path / "run" / "checkpoint-6" / "adapter.safetensors")
    assert all(torch.equal(again[name], heads[1][name]) for name in again)
    assert curve(tmp_path / "run") == whole


def test_a_classifier_is_scored_on_tasks_with_its_labels(models, data, tmp_path):
    model = tiny_encoder_dir("bert", models)
    succeed("train", recipe(model, data, tmp_path, steps=2), "method.name=lora")
    run_dir, tasks = tmp_path / "run", ["--tasks", "rte", "--data", f"rte={data}"]
    scores = succeed("eval", run_dir, *tasks).out
    own = succeed("eval", run_dir).out
    assert scores.replace("eval/rte/", "eval/") == own
    told = json.loads((run_dir / "eval" / "rte-2.json").read_text())
    assert (told["by"], told["samples"], told["split"]) == ("labels", 9, "validation")
    # What PEFT loads is scored alike: the head is in the adapter.
    adapter = ["--model", model, "--adapter", run_dir / "adapter", *tasks, "model.dtype=float32"]
    adapter.append("data.max_length=60")
    assert succeed("eval", *adapter).out == scores
    assert "has no weights for" in refused("eval", "--model", model, *tasks, "data.max_length=60")
    cola = refused("eval", run_dir, "--tasks", "cola")
    assert cola == (
        f"the task cola has the labels unacceptable, acceptable, and {run_dir} tells apart entailment, "
        "not_entailment; choose a task with these"
    )
    assert "wants generated answers" in refused("eval", run_dir, "--tasks", "arithmetic")
