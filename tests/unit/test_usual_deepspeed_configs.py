"""DeepSpeed configs as other trainers ship them, and values of a wrong kind."""

import json

import pytest

from distlora.errors import UserError
from distlora.recipe.deepspeed_check import checked_deepspeed
from distlora.recipe.deepspeed_config import resolve_deepspeed
from distlora.recipe.deepspeed_keys import SWITCHES
from distlora.recipe.load import load_recipe
from tests.fuzz.rule import problem_with

RECIPE = """\
model: {path: some/model}
method: {name: lora, rank: 4}
data: {task: arithmetic}
output_dir: runs/x
"""
CPU = {"device": "cpu", "pin_memory": True}
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
COMMON = dict.fromkeys((*BATCHES, "gradient_clipping"), "auto") | {
    "bf16": {"enabled": "auto"},
    "fp16": {
        "enabled": "auto", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 32,
        "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1,
    },
    "wall_clock_breakdown": False,
}  # fmt: skip
TWO = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False,
    "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True,
    "round_robin_gradients": True,
}  # fmt: skip
SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
THREE = dict.fromkeys(SIZES, "auto") | {"stage": 3, "overlap_comm": True, "sub_group_size": 1e9}
AS_KEYS = {
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
AS_FIELDS = {"max_live_parameters": 0, "max_reuse_distance": 0, "gather_16bit_weights_on_model_save": True}
BOTH = {"offload_optimizer": CPU, "offload_param": CPU}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE)

    def load(config, *overrides):
        (tmp_path / "zero.json").write_text(json.dumps(config))
        return load_recipe("x.yaml", ["deepspeed=zero.json", *overrides])

    return load


@pytest.fixture
def check(load):
    return lambda config, *overrides: checked_deepspeed(load(config, *overrides), 2, 576)


@pytest.fixture
def refusal(check):
    def refusal(config, *overrides):
        with pytest.raises(UserError) as refused:
            check(config, *overrides)
        assert problem_with(str(refused.value)) is None
        return str(refused.value)

    return refusal


@pytest.mark.parametrize(
    "config",
    [
        COMMON | {"zero_allow_untested_optimizer": True, "zero_optimization": TWO | {"stage": 0}},
        COMMON | {"zero_optimization": {"stage": 1, "overlap_comm": True}},
        COMMON | {"zero_allow_untested_optimizer": True, "zero_optimization": TWO},
        COMMON | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        COMMON | {"zero_optimization": THREE | AS_KEYS},
        COMMON | {"zero_optimization": THREE | AS_KEYS | BOTH},
        COMMON | {"zero_optimization": THREE | dict.fromkeys(AS_KEYS, 0) | {"sub_group_size": 0}},
        COMMON | {"zero_force_ds_cpu_optimizer": False, "zero_optimization": THREE | AS_FIELDS | BOTH},
        dict.fromkeys(BATCHES, "auto") | {"zero_optimization": TWO | {"offload_optimizer": CPU}},
        COMMON | {"zero_optimization": THREE | {"stage3_gather_16bit_weights_on_model_save": "auto"}},
    ],
    ids=["stage 0", "stage 1", "stage 2", "optimizer away", "stage 3", "both away", "nothing kept", "fields",
         "few keys", "accelerate"],
)  # fmt: skip
def test_configs_of_other_trainers_pass(check, config):
    assert '"auto"' not in json.dumps(check(config))


def test_names_of_deepspeeds_fields_are_written_as_the_documented_keys(load, refusal):
    config = {"zero_optimization": {"stage": 3, "prefetch_bucket_size": "auto"} | AS_FIELDS}
    resolved, lines = resolve_deepspeed(load(config), 2, 100)
    zero = resolved["zero_optimization"]
    assert not AS_FIELDS.keys() & zero.keys() and zero["stage3_prefetch_bucket_size"] == 9000
    assert {key: zero[key] for key in AS_KEYS} == dict(zip(AS_KEYS, AS_FIELDS.values(), strict=True))
    assert "deepspeed.zero_optimization.stage3_max_live_parameters = 0 (under its documented name)" in lines
    assert refusal({"zero_optimization": AS_KEYS | AS_FIELDS}) == (
        "zero_optimization.gather_16bit_weights_on_model_save in zero.json is another name of "
        "zero_optimization.stage3_gather_16bit_weights_on_model_save, which is there too; remove it"
    )
    granular = {"zero_optimization": {"stage": 3, "module_granularity_threshold": 100}}
    assert refusal(granular).startswith("zero_optimization.stage3_module_granularity_threshold=100 in ")


@pytest.mark.parametrize("value", ["no", 7, [1], True])
@pytest.mark.parametrize(
    "section",
    ["timers", "flops_profiler", "activation_checkpointing", "aio", "hybrid_engine", "pipeline",
     "data_efficiency.data_sampling.curriculum_learning", "zero_optimization.offload_param",
     "checkpoint.parallel_write"],
)  # fmt: skip
def test_what_is_no_section_is_refused_in_the_words_of_the_config(refusal, section, value):
    config = value
    for name in reversed(section.split(".")):
        config = {name: config}
    assert refusal(config) == f"zero.json: {section}: found {json.dumps(value)}, wanted a mapping"


@pytest.mark.parametrize("section", ["flops_profiler", "pipeline", "checkpoint.parallel_write", "timers"])
def test_a_null_that_deepspeed_cannot_take_is_refused_likewise(refusal, section):
    config = None
    for name in reversed(section.split(".")):
        config = {name: config}
    assert refusal(config) == f"zero.json: {section}: found null, wanted a mapping"


@pytest.mark.parametrize("key", SWITCHES)
def test_a_switch_is_true_or_false(check, refusal, key):
    for value in ("no", "false", 2, [], {}):
        assert refusal({key: value}) == f"zero.json: {key}: found {json.dumps(value)}, wanted true or false"
    assert check({key: False})[key] is False


@pytest.mark.parametrize(
    ("config", "place", "value"),
    [
        ({"checkpoint": {"tag_validation": 7}}, "checkpoint.tag_validation", "7"),
        ({"vocabulary_size": "no"}, "vocabulary_size", '"no"'),
        ({"seq_parallel_communication_data_type": 1.5}, "seq_parallel_communication_data_type", "1.5"),
    ],
)
def test_a_value_of_another_kind_is_named_without_python_in_it(refusal, config, place, value):
    said = f"zero.json: {place}: found {value}, which is of another kind than DeepSpeed takes"
    assert refusal(COMMON | config) == f"{said}; correct it or remove it"


@pytest.mark.parametrize("key", ["_comment", "//", "# note"])
def test_comments_that_are_keys_are_told_so(refusal, key):
    assert refusal({key: "x"}) == f"zero.json: {key}: unknown key; remove it: a config has no comments"
