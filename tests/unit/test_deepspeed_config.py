"""DeepSpeed configs: found, read, resolved, and compared with the recipe."""

import json

import pytest

from distlora.errors import UserError
from distlora.recipe.deepspeed_config import resolve_deepspeed
from distlora.recipe.deepspeed_file import read_deepspeed
from distlora.recipe.load import load_recipe

RECIPE = """\
model: {path: some/model}
method: {name: lora, rank: 4}
data: {task: arithmetic}
output_dir: runs/x
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in its own folder, with a recipe `x.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE)
    return tmp_path


def load(*overrides):
    return load_recipe("x.yaml", overrides)


def write(config, path="zero.json"):
    with open(path, "w") as file:
        file.write(config if isinstance(config, str) else json.dumps(config))


# ---------------------------------------------------------------------- reading


def test_a_deepspeed_path_is_found_from_here_then_from_the_recipe_upwards(folder, monkeypatch):
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "x.yaml").write_text(RECIPE + "deepspeed: z/zero.json\n")
    (folder / "a" / "z").mkdir()
    write({"from": "above"}, folder / "a" / "z" / "zero.json")
    recipe = load_recipe("a/b/x.yaml")
    assert recipe.deepspeed == {"from": "above"} and recipe.deepspeed_source == str(
        folder / "a" / "z" / "zero.json"
    )
    (folder / "z").mkdir()
    write({"from": "here"}, folder / "z" / "zero.json")
    recipe = load_recipe("a/b/x.yaml")
    assert recipe.deepspeed == {"from": "here"} and recipe.deepspeed_source == "z/zero.json"


def test_overrides_reach_into_the_deepspeed_file():
    write({"zero_optimization": {"stage": 3}, "keep": 1})
    recipe = load("deepspeed=zero.json", "deepspeed.zero_optimization.stage=2", "deepspeed.extra=true")
    assert recipe.deepspeed == {"zero_optimization": {"stage": 2}, "keep": 1, "extra": True}


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"a": 1, // no\n}',
         "zero.json is not JSON: Expecting property name enclosed in double quotes at line 1, "
         "column 10 (JSON has no comments and no trailing commas)"),
        ("train_batch_size: 4", "zero.json is not JSON: Expecting value at line 1, column 1 "
         "(JSON has no comments and no trailing commas)"),
        ('{"a": 1, "a": 2}', "zero.json is not JSON: key a is given twice"),
        ("[]", "zero.json is no DeepSpeed config: a JSON object is wanted"),
    ],
)  # fmt: skip
def test_a_bad_deepspeed_file(content, expected):
    write(content)
    with pytest.raises(UserError) as error:
        load("deepspeed=zero.json")
    assert str(error.value) == expected


def test_a_deepspeed_file_that_cannot_be_read():
    with pytest.raises(
        UserError, match="^/proc/self/mem cannot be read as a DeepSpeed config: Input/output error$"
    ):
        read_deepspeed("/proc/self/mem")


# ---------------------------------------------------------------------- resolving


def resolve(config, *overrides, world=2, hidden=576):
    write(config)
    return resolve_deepspeed(load("deepspeed=zero.json", *overrides), world, hidden)


def refusal(config, *overrides, world=2, hidden=576):
    with pytest.raises(UserError) as error:
        resolve(config, *overrides, world=world, hidden=hidden)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_auto_is_filled_and_told():
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "gradient_allreduce_op": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "torch_autocast": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "offload_optimizer": {"device": "cpu"},
        },
        "optimizer": {
            "type": "AdamW",
            "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"},
        },
        "tensorboard": {"enabled": True, "output_path": "auto", "job_name": "auto"},
        "csv_monitor": {"enabled": True, "output_path": "auto", "job_name": "mine"},
        "data_types": {"keep_in_fp32_modules": "auto", "grad_accum_dtype": "fp32"},
        "steps_per_print": 1e9,
        "wall_clock_breakdown": False,
    }
    resolved, lines = resolve(config, "train.clip=0.5")
    assert resolved == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 16,
        "gradient_clipping": 0.5,
        "gradient_allreduce_op": "mean",
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "torch_autocast": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 331776,
            "stage3_prefetch_bucket_size": 298598,
            "stage3_param_persistence_threshold": 5760,
            "offload_optimizer": {"device": "cpu"},
        },
        "tensorboard": {"enabled": True, "output_path": "runs/x/tensorboard", "job_name": "."},
        "csv_monitor": {"enabled": True, "output_path": "runs/x/csv_monitor", "job_name": "mine"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 1e9,
        "wall_clock_breakdown": False,
    }
    assert "deepspeed.zero_optimization.reduce_bucket_size = 331776 (auto)" in lines
    assert "deepspeed.optimizer.params.betas = [0.9, 0.999] (auto)" in lines
    assert "deepspeed.optimizer: removed, the optimizer is the recipe's" in lines
    assert "deepspeed.scheduler: removed, the schedule is the recipe's" in lines
    assert "deepspeed.data_types.keep_in_fp32_modules: left to DeepSpeed (auto)" in lines


def test_what_is_missing_is_added():
    batches = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 16}
    resolved, lines = resolve({})
    added = {"gradient_clipping": 1.0, "bf16": {"enabled": True}, "communication_data_type": "fp32"}
    assert resolved == batches | added
    assert "deepspeed.bf16.enabled = true (from the recipe)" in lines
    resolved, _ = resolve({}, "model.dtype=float32", "train.clip=0")
    assert resolved == batches | {"gradient_clipping": 0.0}


def test_who_clips_is_told_where_it_is_not_deepspeed():
    told = "deepspeed.gradient_clipping: applied by distlora"
    resolved, lines = resolve({}, "method.name=lora_pro")
    assert resolved["gradient_clipping"] == 1.0 and sum(line.startswith(told) for line in lines) == 1
    for overrides in (["method.name=lora_pro", "train.clip=0"], []):
        assert not any(line.startswith(told) for line in resolve({}, *overrides)[1])


def test_equal_values_are_no_contradiction():
    config = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 16,
        "gradient_clipping": 1,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0, "torch_adam": True},
        },
        "scheduler": {"type": "auto", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-4}},
    }
    resolved, lines = resolve(config)
    kept = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    assert resolved == kept | {"communication_data_type": "fp32"}
    assert len(lines) == 4  # the scheduler's type, the two sections removed, and how ranks add up


@pytest.mark.parametrize("given", [{}, {"grad_accum_dtype": "auto"}, {"grad_accum_dtype": None}])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_in_bfloat16_are_summed_in_float32_and_that_is_told(stage, given):
    config = {"zero_optimization": {"stage": stage}, "data_types": given}
    resolved, lines = resolve(config)
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["communication_data_type"] == "fp32"
    told = 'deepspeed.data_types.grad_accum_dtype = "fp32" (so that gradients are summed in float32)'
    assert told in lines
    plain, _ = resolve({"zero_optimization": {"stage": stage}}, "model.dtype=float32")
    assert not {"data_types", "communication_data_type"} & plain.keys()


def test_at_stage_0_the_engine_sums_in_the_place_of_deepspeed():
    resolved, lines = resolve({"data_types": {"grad_accum_dtype": "fp32"}})
    assert resolved["data_types"] == {}
    told = "deepspeed.data_types.grad_accum_dtype: removed, distlora itself sums in float32 at stage 0"
    assert told in lines


def test_stage_2_with_an_offloaded_optimizer_becomes_stage_1_where_it_would_sum_in_bfloat16():
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    resolved, lines = resolve(config)
    assert resolved["zero_optimization"]["stage"] == 1
    assert any(line.startswith("deepspeed.zero_optimization.stage = 1 (since") for line in lines)
    for override in ("model.dtype=float32", "train.global_batch_size=2"):  # sums none in bfloat16
        assert resolve(config, override)[0]["zero_optimization"]["stage"] == 2


def test_the_recipe_is_not_changed_by_resolving():
    write({"train_batch_size": "auto"})
    recipe = load("deepspeed=zero.json")
    resolve_deepspeed(recipe, 1, 64)
    assert recipe.deepspeed == {"train_batch_size": "auto"}


@pytest.mark.parametrize("name", ["sgd", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_an_optimizer_that_deepspeed_does_not_know_is_allowed(name):
    key, chosen = "zero_allow_untested_optimizer", f"train.optimizer.name={name}"
    assert key not in resolve({})[0]
    for given in ({}, {key: "auto"}, {key: True}):
        assert resolve({"zero_optimization": {"stage": 3}, **given}, chosen)[0][key] is True
    assert resolve({key: False}, chosen)[0][key] is False  # stage 0 does not look


def test_the_optimizer_section_may_name_one_of_bitsandbytes():
    section = {"type": "adamw8bit", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}}
    assert "optimizer" not in resolve({"optimizer": section}, "train.optimizer.name=adamw8bit")[0]


def test_a_rate_that_is_searched_goes_with_auto():
    section = {"type": "AdamW", "params": {"lr": "auto"}}
    assert "optimizer" not in resolve({"optimizer": section}, "train.lr=search")[0]


def test_an_offloaded_optimizer_is_deepspeeds_own_or_explicitly_not():
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    resolve(zero)
    resolve({**zero, "zero_force_ds_cpu_optimizer": False}, "train.optimizer.name=adamw8bit")
    assert refusal(zero, "train.optimizer.name=adamw8bit") == (
        "train.optimizer.name=adamw8bit has no form in DeepSpeed for zero_optimization.offload_optimizer in "
        "zero.json; use adamw, or set zero_force_ds_cpu_optimizer to false there"
    )


def test_a_forbidden_optimizer_is_refused_where_deepspeed_would_break_off():
    config = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False}
    resolve(config)
    assert refusal(config, "train.optimizer.name=sgd") == (
        "zero_allow_untested_optimizer=false in zero.json forbids train.optimizer.name=sgd; "
        "set it to true or auto, or use adamw"
    )


def test_the_old_name_of_bf16():
    for given in ("auto", True):
        resolved, lines = resolve({"bfloat16": {"enabled": given}})
        assert resolved["bf16"] == {"enabled": True} and "bfloat16" not in resolved
        assert "deepspeed.bfloat16: the old name of bf16" in lines
    both = {"bfloat16": {"enabled": False}, "bf16": {"enabled": True}}
    assert resolve(both)[0]["bf16"] == {"enabled": True}  # as DeepSpeed reads them


def test_a_config_without_autos_needs_no_hidden_size():
    assert resolve({"zero_optimization": {"stage": 2}}, hidden=None)[0]["zero_optimization"] == {"stage": 2}


END = "in zero.json; set the latter to auto or make them equal"


@pytest.mark.parametrize(
    "config, overrides, expected",
    [
        ({"train_batch_size": 64}, [],
         f"recipe train.global_batch_size=32 contradicts train_batch_size=64 {END}"),
        ({"train_batch_size": "32"}, [],
         f'recipe train.global_batch_size=32 contradicts train_batch_size="32" {END}'),
        ({"train_micro_batch_size_per_gpu": 4}, [],
         f"recipe train.micro_batch_size=1 contradicts train_micro_batch_size_per_gpu=4 {END}"),
        ({"gradient_accumulation_steps": 4}, [],
         "recipe train.global_batch_size=32 with train.micro_batch_size=1 on 2 ranks (16 accumulation steps) "
         f"contradicts gradient_accumulation_steps=4 {END}"),
        ({"gradient_clipping": 0.5}, [], f"recipe train.clip=1.0 contradicts gradient_clipping=0.5 {END}"),
        ({"gradient_clipping": 1.0}, ["train.clip=0"],
         f"recipe train.clip=null contradicts gradient_clipping=1.0 {END}"),
        ({"bf16": {"enabled": False}}, [],
         f"recipe model.dtype=bfloat16 contradicts bf16.enabled=false {END}"),
        ({"bf16": {"enabled": True}}, ["model.dtype=float32"],
         f"recipe model.dtype=float32 contradicts bf16.enabled=true {END}"),
        ({"optimizer": {"type": "Lion"}}, [],
         f'recipe train.optimizer.name=adamw contradicts optimizer.type="Lion" {END}'),
        ({"optimizer": {"type": "AdamW"}}, ["train.optimizer.name=sgd"],
         f'recipe train.optimizer.name=sgd contradicts optimizer.type="AdamW" {END}'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, [],
         f"recipe train.lr=0.0001 contradicts optimizer.params.lr=3e-05 {END}"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, ["train.lr=search"],
         f'recipe train.lr="search" contradicts optimizer.params.lr=3e-05 {END}'),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, [],
         f"recipe train.weight_decay=0.0 contradicts optimizer.params.weight_decay=0.1 {END}"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, [],
         f"recipe train.optimizer.betas=[0.9, 0.999] contradicts optimizer.params.betas=[0.9, 0.95] {END}"),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, ["train.optimizer.name=sgd"],
         f"recipe train.optimizer.momentum=0.0 contradicts optimizer.params.momentum=0.9 {END}"),
        ({"scheduler": {"type": "WarmupLR"}}, [],
         'recipe train.schedule=cosine contradicts scheduler.type="WarmupLR" in zero.json; '
         "set the latter to auto or WarmupCosineLR, or train.schedule to constant"),
        ({"scheduler": {"type": "OneCycle"}}, [],
         'recipe train.schedule=cosine contradicts scheduler.type="OneCycle" in zero.json; '
         "set the latter to auto or WarmupCosineLR"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 3e-5}}}, [],
         "scheduler.params.warmup_max_lr=3e-05 in zero.json contradicts the recipe, whose train section "
         "decides it; set it to auto or remove it"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}}}, [],
         "scheduler.params.warmup_num_steps=10 in zero.json contradicts the recipe, whose train section "
         "decides it; set it to auto or remove it"),
    ],
)  # fmt: skip
def test_contradictions_name_both_places(config, overrides, expected):
    assert refusal(config, *overrides) == expected


def test_an_inline_config_is_named_as_such():
    recipe = load("deepspeed={train_batch_size: 64}")
    expected = (
        "^recipe train.global_batch_size=32 contradicts train_batch_size=64 "
        "in the recipe's deepspeed section;"
    )
    with pytest.raises(UserError, match=expected):
        resolve_deepspeed(recipe, 1, None)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"fp16": {"enabled": True}},
         "fp16.enabled=true in zero.json is not supported: the precision is that of the recipe's "
         "model.dtype; set it to false or auto"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
         "torch_autocast.enabled=true in zero.json is not "
         "supported: the precision is that of the recipe's model.dtype; set it to false or auto"),
        ({"zero_optimization": {"stage": 4}},
         "zero_optimization.stage in zero.json is 4; wanted 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}},
         'zero_optimization.stage in zero.json is "auto"; wanted 0, 1, 2 or 3'),
        ({"zero_optimization": True}, "zero_optimization in zero.json is true; a mapping is wanted"),
        ({"bf16": True}, "bf16 in zero.json is true; a mapping is wanted"),
        ({"zero_optimization": {"sub_group_size": "auto"}},
         "zero_optimization.sub_group_size is auto in zero.json, and nothing in the recipe decides it; "
         "give a value or remove it"),
        ({"a": [{"b": "auto"}]},
         "a.0.b is auto in zero.json, and nothing in the recipe decides it; give a value or remove it"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
         "optimizer.params.amsgrad=true in zero.json has no counterpart in the recipe's train.optimizer "
         "(adamw); remove it"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
         "optimizer.params.adam_w_mode=false in zero.json has no counterpart in the recipe's train.optimizer "
         "(adamw); remove it"),
        ({"gradient_allreduce_op": "sum"},
         'gradient_allreduce_op="sum" in zero.json is not supported: the loss is a mean over the global '
         "batch; set it to mean"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}},
         'zero_optimization.offload_param.device="nvme" in zero.json is not supported; '
         "set it to cpu or none"),
        ({"zero_optimization": {"cpu_offload": True}},
         "zero_optimization.cpu_offload=true in zero.json is an old name; "
         "set offload_optimizer.device to cpu in its place"),
        ({"zero_optimization": {"zero_quantized_weights": True}},
         "zero_optimization.zero_quantized_weights=true in zero.json is not supported: it rounds weights to "
         "a few bits; set it to false or remove it"),
        ({"zero_optimization": {"mics_shard_size": 8}},
         "zero_optimization.mics_shard_size=8 in zero.json was removed from DeepSpeed; remove it: use "
         "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": None, "offload_optimizer": None,
                                "cpu_offload": False}}, None),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, None),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, None),
    ],
)  # fmt: skip
def test_refusals(config, expected):
    if expected is None:
        resolve(config)
    else:
        assert refusal(config) == expected


def test_hpz_groups_must_divide_the_ranks():
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    resolve(config, "train.global_batch_size=64", world=2)  # one group of all ranks
    expected = "zero_optimization.zero_hpz_partition_size=8 in zero.json does not divide 12 ranks"
    assert refusal(config, "train.global_batch_size=24", world=12) == expected


def test_an_auto_that_needs_the_hidden_size():
    assert refusal({"zero_optimization": {"reduce_bucket_size": "auto"}}, hidden=None) == (
        "zero_optimization.reduce_bucket_size is auto in zero.json, "
        "but the model's config has no hidden_size; give a number"
    )
