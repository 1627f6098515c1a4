"""transformers' `Trainer` with an adapter learns what the same recipe learns, plain and under DeepSpeed."""

from pathlib import Path

import pytest

from distlora.data import TrainOrder
from distlora.recipe.load import load_recipe
from distlora.training.objective import objective_of
from tests.distributed.trainer_runs import BATCH, MICRO, RATE, SEED, Case, losses
from tests.e2e.program import curve, recipe_of, succeed, write_recipe, write_rows

STEPS = 6
LORA_SB = {"rank": 4, "init": {"eta": 0.01, "samples": STEPS * BATCH}}
SRLORA = {"rank": 4, "target_rank": 12, "gamma": 0.5, "interval": 2}
LORA_PRO = {"rank": 4, "alpha": 2}
METHODS = {"lora_sb": LORA_SB, "srlora": SRLORA, "lora_pro": LORA_PRO}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("trainer_rows"), train=STEPS * BATCH)


def recipe_for(model: Path, data: Path, out: Path, method: str) -> Path:
    content = recipe_of(model, data, out)
    content["method"] = {"name": method} | METHODS[method]
    content["data"] |= {"eval_split": None, "max_length": 96}
    content["train"] |= {
        "steps": STEPS, "micro_batch_size": MICRO, "global_batch_size": BATCH, "lr": RATE, "seed": SEED,
        "clip": 0.5, "eval_every": 0, "save_every": 0, "exact_match_samples": 0,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_recipe(out.parent / f"{method}.yaml", content)


@pytest.fixture(scope="module")
def recipes(model, rows, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of each method's recipe."""
    folder, found = tmp_path_factory.mktemp("recipes"), {}
    for method in METHODS:
        succeed("train", recipe_for(model, rows, folder / method, method))
        found[method] = list(curve(folder / method).values())
    return found


@pytest.fixture(scope="module")
def samples(model, rows, tmp_path_factory) -> list[dict]:
    """What these recipes train, in the order of their steps."""
    path = recipe_for(model, rows, tmp_path_factory.mktemp("order") / "run", "lora_pro")
    recipe = load_recipe(path, [])
    objective = objective_of(recipe)
    read = objective.read("train", objective.load_preprocessor()).samples
    order = TrainOrder(len(read), BATCH, SEED)
    chosen = [read[i] for step in range(STEPS) for i in order.indices(step)]
    assert len(read) == STEPS * BATCH
    return [{"input_ids": each.input_ids, "labels": each.labels} for each in chosen]


@pytest.mark.parametrize("method", METHODS)
def test_its_losses_are_those_of_the_recipe(method, recipes, samples, model, tmp_path):
    found = losses(Case(method, METHODS[method]), model, samples, tmp_path / "run")
    assert found == pytest.approx(recipes[method], rel=1e-5)
    assert found[-1] < found[0]
