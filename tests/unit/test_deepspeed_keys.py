"""Every key of DeepSpeed's is sorted; those that break what is promised are refused; every depth is spelt."""

import json

import pytest

from distlora.errors import UserError
from distlora.recipe.deepspeed_check import checked_deepspeed
from distlora.recipe.deepspeed_keys import RULES, Sort, names_in
from distlora.recipe.load import load_recipe
from tests.deepspeed_schema import deepspeed_keys

RECIPE = """\
model: {path: some/model}
method: {name: lora, rank: 4}
data: {task: arithmetic}
output_dir: runs/x
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE)

    def check(config, *overrides):
        (tmp_path / "zero.json").write_text(json.dumps(config))
        return checked_deepspeed(load_recipe("x.yaml", ["deepspeed=zero.json", *overrides]), 2, 576)

    return check


@pytest.fixture
def refusal(check):
    def refusal(config):
        with pytest.raises(UserError, match="^[^\n]+$") as refused:
            check(config)
        return str(refused.value)

    return refusal


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


# ---------------------------------------------------------------------- the table


def refused_as_a_whole(key):
    return any(
        names_in(section) is None and RULES[section].sort is Sort.REFUSED and RULES[section].refuses({"x": 1})
        for section in (key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1))
    )


def test_every_key_of_the_installed_deepspeed_is_sorted():
    known = deepspeed_keys()
    assert len(known) > 300 and "timers.throughput.synchronized" in known and "expert_parallel.top_k" in known
    assert [key for key in sorted(known) if key not in RULES and not refused_as_a_whole(key)] == []


def test_the_walk_of_the_schema_finds_a_key_of_a_section_that_a_newer_deepspeed_adds(monkeypatch):
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime import config

    class Newer(CompileConfig):
        new_pass: bool = False

    monkeypatch.setattr(config, "CompileConfig", Newer)
    read = config.get_disable_allgather
    monkeypatch.setattr(config, "get_disable_allgather", lambda given: given.get("new_switch") or read(given))
    assert deepspeed_keys() - RULES.keys() >= {"compile.new_pass", "new_switch"}


def test_every_refused_key_says_what_to_do():
    words = ("set it to", "set the", "remove", "write", "set offload", "set {")
    for key, rule in RULES.items():
        if rule.sort is Sort.REFUSED:
            assert any(word in rule.why for word in words), key


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("managed_gradient_accumulation", False),
        ("managed_gradient_accumulation", None),
        ("sequence_parallel_size", 2),
        ("tensor_parallel.autotp_size", 2),
        ("tensor_parallel.tp.tp_size", 2),
        ("expert_parallel.enabled", True),
        ("pipeline.stages", 2),
        ("hybrid_engine.enabled", True),
        ("compile.deepcompile", True),
        ("bf16.bf16_master_weights_and_grads", True),
        ("bf16.bf16_optimizer_states", True),
        ("bfloat16.bf16_master_weights_and_grads", True),
        ("fp16.fp16_master_weights_and_grads", True),
        ("fp16.auto_cast", True),
        ("data_types.grad_accum_dtype", "bf16"),
        ("communication_data_type", "bf16"),
        ("communication_data_type", "fp16"),
        ("data_types.buffer_dtype", "bf16"),
        ("gradient_predivide_factor", 2.0),
        ("prescale_gradients", True),
        ("data_efficiency.enabled", True),
        ("data_efficiency.data_routing.random_ltd.enabled", True),
        ("data_efficiency.data_sampling.curriculum_learning.enabled", True),
        ("autotuning.enabled", True),
        ("flops_profiler.enabled", True),
        ("checkpoint.writer", {"type": "FAST"}),
        ("datastates_ckpt", {"host_cache_size": 16}),
        ("weight_quantization.quantized_initialization", {"num_bits": 8}),
        ("steps_per_print", 0),
        ("steps_per_print", "ten"),
        ("log_level", "loud"),
        ("zero_optimization.zero_quantized_gradients", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.stage3_module_granularity_threshold", 100),
        ("zero_optimization.ignore_unused_parameters", False),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("zero_optimization.offload_optimizer.super_offload", True),
        ("zero_optimization.mics_shard_size", -1),
        ("amp", {"enabled": "auto"}),
        ("sparse_gradients", "auto"),
        ("elasticity", {"enabled": False}),
        ("nebula", {"enabled": True}),
        ("compression_training", {}),
        ("progressive_layer_drop", {"enabled": True}),
    ],
)
def test_what_would_break_a_promise_is_refused_in_one_sentence(refusal, key, value):
    said = refusal(nested(key, value))
    assert said.startswith(f"{key}={json.dumps(value)} in zero.json "), said


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, rule in RULES.items()
        if rule.sort is Sort.REFUSED and rule.accepts(False) and not rule.accepts(True)
    ],
)
def test_a_refused_switch_may_be_off(check, key):
    check(nested(key, False))


def test_a_contradicting_dtype_of_parameters_is_refused(check, refusal):
    expected = 'recipe model.dtype=bfloat16 contradicts data_types.param_dtype="fp32" in zero.json;'
    assert refusal({"data_types": {"param_dtype": "fp32"}}).startswith(expected)
    assert "param_dtype" not in check({"data_types": {"param_dtype": "bf16"}})["data_types"]


def test_the_number_of_ranks_may_be_said_but_not_another(check, refusal):
    assert (
        not {"data_parallel_size", "sequence_parallel_size"}
        & check({"data_parallel_size": 2, "sequence_parallel_size": 1}).keys()
    )
    said = refusal({"data_parallel_size": 4})
    assert said == "data_parallel_size=4 in zero.json is not the number of ranks, 2; remove it"


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("timers.throughput.synchronised", ", did you mean synchronized?"),
        ("data_efficiency.data_routing.x", "; remove it"),
        ("data_efficiency.data_routing.random_ltd.enabld", ", did you mean enabled?"),
        ("data_efficiency.data_sampling.dynamic_batching.max_token", ", did you mean max_tokens?"),
        ("checkpoint.parallel_write.pipeline_stag", ", did you mean pipeline_stage?"),
        ("autotuning.model_info.hiden_size", ", did you mean hidden_size?"),
        ("tensor_parallel.tp.tp_sise", ", did you mean tp_size?"),
        ("zero_optimization.leaf_module.clases", ", did you mean classes?"),
        ("optimizer.params.weigth_decay", ", did you mean weight_decay?"),
        ("scheduler.params.warmup_num_step", ", did you mean warmup_num_steps?"),
        ("offload_param", "; it belongs at zero_optimization.offload_param"),
        ("stage", "; it belongs at zero_optimization.stage"),
    ],
)  # fmt: skip
def test_a_mistyped_key_at_any_depth_is_named_in_full(refusal, key, end):
    for value in ("auto", 1):
        assert refusal(nested(key, value)) == f"zero.json: {key}: unknown key{end}"


def test_sections_that_are_the_users_own_take_any_name(check):
    check({"tensor_parallel": {"partition_config": {"use_default_specs": False, "anything": 1}}})
    curriculum = {"enabled": False, "curriculum_metrics": {"seqlen": {"difficulty_type": "value"}}}
    check({"data_efficiency": {"data_sampling": {"curriculum_learning": curriculum}}})


# ---------------------------------------------------------------------- configs that people have

#: "DeepSpeed" in the documentation of transformers: the examples of ZeRO-2 and ZeRO-3 with offload.
HUGGING_FACE = {
    2: {
        "fp16": {
            "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
            "hysteresis": 2, "min_loss_scale": 1,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
            "reduce_scatter": True, "reduce_bucket_size": 2e8, "contiguous_gradients": True,
            "round_robin_gradients": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    },
    3: {
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True,
            "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(("stage", "schedule"), [(2, "constant"), (3, "linear")])
def test_the_examples_of_hugging_face_pass(check, stage, schedule):
    resolved = check(HUGGING_FACE[stage], f"train.schedule={schedule}", "train.global_batch_size=2")
    assert resolved["zero_optimization"]["stage"] == stage and resolved["bf16"] == {"enabled": True}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_config_of_accelerate_passes(check, stage):
    """As its plugin makes it, which prints every `inf` steps."""
    check(
        {
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none", "nvme_path": None},
                                  "offload_param": {"device": "none", "nvme_path": None},
                                  "stage3_gather_16bit_weights_on_model_save": False},
            "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
            "steps_per_print": 10**12,
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
        }
    )  # fmt: skip
