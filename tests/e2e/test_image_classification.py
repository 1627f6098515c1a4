"""Vision models as classifiers, from files of images to what other software loads."""

import math
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.e2e.program import call, curve, metrics, recipe_of, succeed, write_recipe
from tests.tiny_images import drawn, write_folders, write_mnist
from tests.tiny_models import tiny_vision_dir

#: Settings of the methods that are tried, beside lora.
METHODS = {
    "srlora": {"rank": 4, "target_rank": 8},
    "lora_sb": {"rank": 4, "init": {"samples": 6, "micro_batch_size": 2}},
    "full": {"rank": 4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MNIST's files, with 22 images to train on and 7 held out."""
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder, "train", 22)
    write_mnist(folder, "t10k", 7)
    return folder


def recipe(model, data, folder, method, **train):
    content = recipe_of(model, data, folder / "run")
    content["method"] = {"name": method, **METHODS.get(method, {"rank": 4})}
    content["data"] = {"task": "mnist", "path": str(data), "eval_split": "test"}
    content["train"] |= {"exact_match_samples": 0, "eval_samples": None, "steps": 4} | train
    return write_recipe(folder / "recipe.yaml", content)


@torch.no_grad()
def scores(model, directory):
    """Loss and accuracy on the held-out images, one by one, by nothing of ours."""
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    images, labels = drawn(7, (28, 28))
    loss = right = 0.0
    for image, label in zip(images, labels):
        pixels = processor(Image.fromarray(image).convert("RGB"), return_tensors="pt")
        logits = model.eval()(**pixels).logits
        loss += float(F.cross_entropy(logits, torch.tensor([int(label)])))
        right += int(logits.argmax()) == label
    return loss / len(labels), right / len(labels)


@pytest.mark.parametrize(
    ("name", "method"), [*((n, "lora") for n in ("vit", "dinov2", "swin")), *(("vit", m) for m in METHODS)]
)
def test_a_vision_model_is_trained_evaluated_and_loaded_by_others(name, method, models, data, tmp_path):
    base, run = tiny_vision_dir(name, models), tmp_path / "run"
    outcome = succeed("train", recipe(base, data, tmp_path, method))
    assert "data: 7 samples of split test, 0 dropped" in outcome.err and "accuracy" in outcome.out
    losses, accuracies = curve(run, "eval/loss"), curve(run, "eval/accuracy")
    assert list(losses) == list(accuracies) == [0, 2, 4] and losses[4] != losses[0]
    assert all("train/images_per_second" in line for line in metrics(run) if "train/loss" in line)

    last = {"loss": losses[4], "accuracy": accuracies[4]}
    printed = dict(line.split() for line in succeed("eval", run).out.splitlines())
    assert {f"eval/{key}": f"{value:.6f}" for key, value in last.items()} == printed

    succeed("export", run, "--format", "merged", "--out", tmp_path / "merged")
    merged, info = AutoModelForImageClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert merged.config.id2label == {n: str(n) for n in range(10)}
    assert scores(merged, tmp_path / "merged") == pytest.approx(tuple(last.values()), rel=1e-4)
    if method != "full":
        plain = AutoModelForImageClassification.from_pretrained(base, num_labels=10)
        adapted = PeftModel.from_pretrained(plain, run / "adapter")
        assert scores(adapted, base) == pytest.approx(tuple(last.values()), rel=1e-4)


def test_a_resumed_run_goes_on_where_it_was(models, data, tmp_path):
    path = recipe(tiny_vision_dir("vit", models), data, tmp_path, "srlora", save_every=2)
    succeed("train", path)
    whole = curve(tmp_path / "run")
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    succeed("train", path, "--resume")
    assert curve(tmp_path / "run") == whole


def test_a_merged_export_is_a_start_for_other_classes(models, data, tmp_path):
    """The labels are those of the folders then, and the head is a new one."""
    write_folders(tmp_path / "animals" / "train", {"ape": 5, "bee": 4, "cat": 5})
    write_folders(tmp_path / "animals" / "test", {"ape": 1, "bee": 2, "cat": 1})
    succeed("train", recipe(tiny_vision_dir("vit", models), data, tmp_path, "full", steps=1))
    succeed("export", tmp_path / "run", "--format", "merged", "--out", tmp_path / "merged")
    second = recipe(tmp_path / "merged", tmp_path / "animals", tmp_path, "lora", steps=2)
    run = tmp_path / "second"
    succeed("train", second, "data.task=images", f"output_dir={run}")
    assert all(math.isfinite(loss) for loss in curve(run).values())
    succeed("export", run, "--format", "merged", "--out", tmp_path / "animals-merged")
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "animals-merged")
    assert last.config.id2label == {0: "ape", 1: "bee", 2: "cat"} and last.classifier.out_features == 3


def test_an_image_that_breaks_off_ends_the_run_with_its_name(models, tmp_path):
    write_folders(tmp_path / "data", {"ape": 2, "bee": 2})
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = tmp_path / "data" / "bee" / "5.png"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:3000])
    path = recipe(tiny_vision_dir("vit", models), tmp_path / "data", tmp_path, "lora")
    outcome = call("train", path, "data.task=images", "data.eval_split=null")
    (sentence,) = outcome.sentences
    assert outcome.code == 2 and f"the image in {file} cannot be read (" in sentence
    assert "Traceback" not in outcome.err
