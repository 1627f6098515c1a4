"""Every shipped recipe takes steps with a tiny model of its class and rows in its task's format; so does
every class.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distlora.recipe.load import load_recipe
from distlora.tasks import TASKS, ImageTask
from tests.e2e.program import REPOSITORY, curve, recipe_of, succeed, write_recipe
from tests.tiny_images import write_npz
from tests.tiny_models import ENCODERS, NAMES, VISION, tiny_encoder_dir, tiny_model_dir, tiny_vision_dir

RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))
#: What stands in a hub name, and the tiny model of the same class.
CLASSES = {
    "mistral": "mistral", "gemma": "gemma2", "llama": "llama", "smollm2": "llama", "minilm": "bert",
    "vit": "vit",
    "roberta": "roberta", "deberta": "deberta",
}  # fmt: skip
#: Columns of the data sets that the recipes name, and a row of each.
ROWS = {
    "metamath": {
        "query": "What is 2 + {n}?",
        "response": "Add them. The answer is: {n}",
        "type": "GSM_Rephrased",
    },
    "gsm8k": {"question": "What is 2 + {n}?", "answer": "Add them.\n#### {n}"},
    "commonsense": {
        "instruction": "Is {n} even?",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    },
    "chat": {"prompt": "What is 2 + {n}?", "completion": "It is {n}."},
    "cola": {"sentence": "Tom has {n} apples.", "label": "acceptable"},
    "rte": {"sentence1": "Tom has {n} apples.", "sentence2": "Tom has apples.", "label": "entailment"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("classes")


def write_rows_of(task: str, folder: Path) -> Path:
    folder.mkdir()
    if isinstance(TASKS[task], ImageTask):
        for split in ("train", "test"):
            write_npz(folder / f"{split}.npz", 8)
        return folder
    for split in ("train", "test", "validation"):
        rows = [{key: text.format(n=number) for key, text in ROWS[task].items()} for number in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_takes_steps(path, models, tmp_path):
    shipped = load_recipe(path)
    (name,) = {tiny for word, tiny in CLASSES.items() if word in shipped.model.path.lower()}
    task = shipped.data.task
    make = tiny_encoder_dir if name in ENCODERS else tiny_vision_dir if name in VISION else tiny_model_dir
    length = 64 if name in ENCODERS else 256
    small = [
        f"model.path={make(name, models)}", f"output_dir={tmp_path / 'run'}", "deepspeed=null",
        "method.rank=4", "data.split=train[:8]", f"data.max_length={length}", "train.steps=2",
        "train.global_batch_size=2", "train.micro_batch_size=1", "train.eval_samples=2",
    ]  # fmt: skip
    if "init" in type(shipped.method).model_fields:
        small.append("method.init.samples=2")
    if "target_rank" in type(shipped.method).model_fields:  # two steps have room for one replacement
        small.append("method.target_rank=6")
    if "[" in (shipped.data.eval_split or ""):  # a slice of more rows than there are here
        small.append("data.eval_split=test")
    if task != "arithmetic":  # which makes its own
        small.append(f"data.path={write_rows_of(task, tmp_path / 'rows')}")
    if shipped.train.exact_match_samples:
        small.append("train.exact_match_samples=2")
    outcome = succeed("train", path, *small)
    assert "data: 8 samples of split train" in outcome.err
    losses = curve(tmp_path / "run")
    assert list(losses) == [1, 2] and all(math.isfinite(loss) for loss in losses.values())
    assert load_recipe(tmp_path / "run" / "recipe.yaml").model.dtype == shipped.model.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_class_trains_with_checkpointing(name, dtype, models, data, tmp_path):
    """Gradient checkpointing changes no number; in bfloat16 the curve is that of float32, coarsely."""
    content = recipe_of(tiny_model_dir(name, models), data, tmp_path / "plain")
    content["train"] |= {"steps": 3, "eval_every": 0}
    content["model"]["dtype"] = dtype
    content["method"]["init"]["eta"] = 0.01
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    succeed("train", recipe)
    checkpointed = ["model.gradient_checkpointing=true", f"output_dir={tmp_path / 'checkpointed'}"]
    succeed("train", recipe, *checkpointed)
    assert curve(tmp_path / "checkpointed") == pytest.approx(curve(tmp_path / "plain"), rel=1e-6)
    losses = curve(tmp_path / "plain", "eval/loss")
    assert losses[3] < losses[0]
    trained = load_file(tmp_path / "plain" / "checkpoint-3" / "adapter.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {getattr(torch, dtype)}
    if dtype == "bfloat16":
        exact = ["model.dtype=float32", f"output_dir={tmp_path / 'exact'}"]
        succeed("train", recipe, *exact)
        assert curve(tmp_path / "plain") == pytest.approx(curve(tmp_path / "exact"), rel=0.03)
