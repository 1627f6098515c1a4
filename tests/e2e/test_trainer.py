"""transformers' `Trainer` with an adapter learns what the same recipe learns, plain and under DeepSpeed."""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distlora.data import TrainOrder
from distlora.recipe.load import load_recipe
from distlora.training.objective import objective_of
from tests.distributed.trainer_runs import BATCH, MICRO, RATE, SEED, Case, losses, trainer_of
from tests.e2e.program import (
    PATIENCE,
    curve,
    finish,
    free_port,
    recipe_of,
    started,
    succeed,
    write_recipe,
    write_rows,
)

STEPS, RANKS = 6, 2
ADAPTIVE = {"window": 1, "improvement": 0.9, "share": 1.0, "freeze_fraction": 0.0}
#: By name, the method of a recipe.
METHODS = {
    "lora_sb": {"name": "lora_sb", "rank": 4, "init": {"eta": 0.01, "samples": STEPS * BATCH}},
    "srlora": {"name": "srlora", "rank": 4, "target_rank": 12, "gamma": 0.5, "interval": 2},
    "adaptive": {
        "name": "srlora", "rank": 4, "target_rank": 12, "schedule": "adaptive", "adaptive": ADAPTIVE,
    },
    "lora_pro": {"name": "lora_pro", "rank": 4, "alpha": 2},
}  # fmt: skip
#: Method, stage of ZeRO, and whether the run is resumed.
ON_RANKS = [("lora_sb", 2, False), ("lora_pro", 2, False), ("lora_pro", 3, False), ("srlora", 3, True)]


def case_of(name: str, **more) -> Case:
    settings = dict(METHODS[name])
    return Case(settings.pop("name"), settings, **more)


#: A model that was loaded whole, though at stage 3; and runs in bfloat16.
EARLY = case_of("lora_sb", stage=3, early=True)
ROUNDED = [case_of("lora_sb", stage=stage, more={"bf16": True}) for stage in (2, 3)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("trainer_rows"), train=STEPS * BATCH)


def recipe_for(model: Path, data: Path, out: Path, method: str) -> Path:
    content = recipe_of(model, data, out)
    content["method"] = METHODS[method]
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
    found = losses(case_of(method), model, samples, tmp_path / "run")
    assert found == pytest.approx(recipes[method], rel=1e-5)
    assert found[-1] < found[0]


@pytest.mark.parametrize("method", ["srlora", "lora_sb", "lora_pro"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(method, samples, model, tmp_path):
    more = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    whole, resumed = case_of(method, more=more), case_of(method, more=more, resume=True)
    wanted = losses(whole, model, samples, tmp_path / "whole")
    assert losses(resumed, model, samples, tmp_path / "resumed") == pytest.approx(wanted, rel=1e-6)


def test_its_checkpoints_and_its_result_are_adapters_of_peft(samples, model, tmp_path):
    trainer = trainer_of(case_of("srlora"), model, samples, tmp_path / "run")
    trainer.train()
    assert sum(line.get("recompose/swapped", 0) for line in trainer.state.log_history) == 2
    trainer.save_model()
    trainer.save_model()  # over the earlier one, beside the checkpoints
    last = f"checkpoint-{STEPS}"
    batch = torch.tensor([samples[0]["input_ids"]])
    with torch.no_grad():
        wanted = trainer.model.eval()(batch).logits
        for place in (tmp_path / "run", tmp_path / "run" / last):
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), place)
            torch.testing.assert_close(loaded.eval()(batch).logits, wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def on_ranks(model, samples, tmp_path_factory) -> dict[str, list[float] | str]:
    """The losses of `ON_RANKS`: one start of the ranks for all."""
    folder = tmp_path_factory.mktemp("ranks")
    plan, out = folder / "plan.json", folder / "out.json"
    cases = [
        EARLY,
        *(case_of(name, stage=stage, resume=resume) for name, stage, resume in ON_RANKS),
        *ROUNDED,
    ]
    plan.write_text(json.dumps({"model": str(model), "rows": samples, "cases": list(map(asdict, cases))}))
    port = free_port()
    with ExitStack() as stack:
        command = (sys.executable, "-m", "tests.distributed.trainer_runs", plan, out)
        ranks = [
            stack.enter_context(
                started(
                    *command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                )
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        said = [finish(rank, 2 * PATIENCE).err for rank in ranks]
    if not out.exists():
        pytest.fail(said[0][-3000:], pytrace=False)
    return json.loads(out.read_text())


@pytest.mark.parametrize(("method", "stage", "resume"), ON_RANKS)
def test_under_deepspeed_too(method, stage, resume, on_ranks, recipes):
    found = on_ranks[case_of(method, stage=stage, resume=resume).key]
    assert found == pytest.approx(recipes[method], rel=1e-5)


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.key)
def test_in_bfloat16_nearly_the_same(case, on_ranks, recipes):
    assert on_ranks[case.key] == pytest.approx(recipes["lora_sb"], rel=2e-2)


def test_a_model_that_every_rank_has_loaded_whole_is_refused(on_ranks):
    assert on_ranks[EARLY.key].startswith("UserError: at ZeRO stage 3 the model was loaded whole")
