"""A plan says which ZeRO stage it counts, and why where the config names another."""

import pytest

from distlora.plan import plan_of
from distlora.plan.table import table
from distlora.recipe.sections import Recipe
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("dtype", "zero", "said"),
    [
        ("bfloat16", {"stage": 2, "offload_optimizer": {"device": "cpu"}},
         "ZeRO stage 1 in the place of 2, to sum gradients in float32, offloaded: optimizer;"),
        ("float32", {"stage": 2, "offload_optimizer": {"device": "cpu"}},
         "ZeRO stage 2, offloaded: optimizer;"),
        ("bfloat16", {"stage": 2}, "ZeRO stage 2;"),
    ],
)  # fmt: skip
def test_a_stage_in_the_place_of_the_configs_is_told(tmp_path, dtype, zero, said):
    tiny_config("llama").save_pretrained(tmp_path)
    recipe = Recipe(
        model={"path": str(tmp_path), "dtype": dtype},
        method={"name": "lora", "rank": 4},
        data={"task": "arithmetic", "max_length": 16},
        train={"steps": 4, "global_batch_size": 8},
        deepspeed={"zero_optimization": zero},
        output_dir="unused",
    )
    plan = plan_of(recipe, 1, 2)
    assert table([(1, plan)], 2, 80.0).splitlines()[2].startswith(said)
