"""What DeepSpeed thinks of a DeepSpeed config: names that it does not know, values that it cannot take."""

import json
import logging
from pathlib import Path

import pytest

from distlora.errors import UserError
from distlora.recipe.deepspeed_check import checked_deepspeed
from distlora.recipe.load import load_recipe

ZEROS = sorted((Path(__file__).parents[2] / "configs" / "zero").glob("*.json"))
RECIPE = """\
model: {path: some/model}
method: {name: lora, rank: 4}
data: {task: arithmetic}
output_dir: runs/x
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Checks a config that stands in the file zero.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE)

    def check(config):
        (tmp_path / "zero.json").write_text(json.dumps(config))
        return checked_deepspeed(load_recipe("x.yaml", ["deepspeed=zero.json"]), 2, 576)

    return check


@pytest.fixture
def refusal(check):
    def refusal(config):
        with pytest.raises(UserError, match="^[^\n]+$") as refused:
            check(config)
        return str(refused.value)

    return refusal


# ---------------------------------------------------------------------- what is right


@pytest.mark.parametrize("path", ZEROS, ids=lambda path: path.stem)
def test_the_shipped_configs_pass(check, path):
    config = json.loads(path.read_text())
    assert check(config).keys() >= config.keys()


#: By the page "DeepSpeed Configuration JSON" of its documentation and the classes that it describes.
DOCUMENTED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 16,
    "managed_gradient_accumulation": True,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "adam_w_mode": True}},
    "scheduler": {
        "type": "auto",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "communication_data_type": "fp32",
    "seq_parallel_communication_data_type": "fp32",
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "fp16": {
        "enabled": "auto", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 16,
        "loss_scale_window": 1000, "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1,
        "fp16_master_weights_and_grads": False,
    },
    "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False},
    "torch_autocast": {
        "enabled": "auto", "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"],
    },
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3, "allgather_partitions": True, "allgather_bucket_size": 5e8, "compute_grad_norm": True,
        "overlap_comm": False, "reduce_scatter": True, "reduce_bucket_size": "auto",
        "contiguous_gradients": True, "load_from_fp32_weights": True, "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_model_persistence_threshold": 1e9,
        "sub_group_size": 1e9, "elastic_checkpoint": False,
        "stage3_gather_16bit_weights_on_model_save": False, "ignore_unused_parameters": True,
        "stage3_module_granularity_threshold": 0, "round_robin_gradients": False,
        "parameter_alignment": False, "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
        "zero_quantized_gradients": False, "log_trace_cache_warnings": False,
        "memory_efficient_linear": False, "override_module_apply": True,
        "offload_param": {
            "device": "cpu", "nvme_path": "/local_nvme", "pin_memory": False, "buffer_count": 5,
            "buffer_size": 1e8, "max_in_cpu": 1e9,
        },
        "offload_optimizer": {
            "device": "cpu", "nvme_path": "/local_nvme", "pin_memory": False, "ratio": 1.0, "buffer_count": 4,
            "fast_init": False, "pipeline_read": False, "pipeline_write": False,
        },
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "aio": {
        "block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False,
        "overlap_events": True,
    },
    "tensor_parallel": {
        "autotp_size": 0, "preset_model": "llama", "tp_overlap_comm": False, "partition_config": None,
    },
    "sequence_parallel_size": 1,
    "data_parallel_size": 2,
    "hybrid_engine": {
        "enabled": False, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False,
    },
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
    "vocabulary_size": 1024,
    "dataloader_drop_last": False,
    "disable_allgather": False,
    "use_data_before_expert_parallelism": False,
    "autotuning": {
        "enabled": False, "results_dir": "autotuning_results", "exps_dir": "autotuning_exps",
        "overwrite": False, "metric": "throughput", "start_profile_step": 3, "end_profile_step": 5,
        "fast": True, "max_train_batch_size": None, "mp_size": 1, "num_tuning_micro_batch_sizes": 3,
        "tuner_type": "model_based", "tuner_early_stopping": 5, "tuner_num_trials": 50, "arg_mappings": None,
    },
    "flops_profiler": {
        "enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True,
        "output_file": None,
    },
    "activation_checkpointing": {
        "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False,
    },
    "data_efficiency": {
        "enabled": False,
        "seed": 1234,
        "data_routing": {
            "enabled": False,
            "random_ltd": {"enabled": False, "total_layer_num": 24, "random_ltd_layer_num": 22},
        },
        "data_sampling": {
            "enabled": False, "num_epochs": 1, "num_workers": 0, "curriculum_learning": {"enabled": False},
        },
    },
    "tensorboard": {"enabled": False, "output_path": "auto", "job_name": "auto"},
    "wandb": {"enabled": False, "group": "g", "team": "t", "project": "p"},
    "comet": {
        "enabled": False, "workspace": "w", "project": "p", "samples_log_interval": 50,
        "experiment_name": "e", "api_key": "k", "experiment_key": "0c4a1c4a90664f2a8084e600b19a9d7",
        "online": False, "mode": "get",
    },
    "csv_monitor": {"enabled": False, "output_path": "auto", "job_name": "auto"},
    "comms_logger": {
        "enabled": False, "verbose": False, "prof_all": True, "debug": False, "prof_ops": ["all_reduce"],
    },
    "checkpoint": {
        "tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False,
        "parallel_write": {"pipeline_stage": False},
    },
    "compile": {"deepcompile": False, "passes": None, "offload_activation": False},
    "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"},
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
}  # fmt: skip


def test_what_deepspeed_documents_passes(check):
    taken_out = {"optimizer", "scheduler", "data_parallel_size", "sequence_parallel_size"}
    assert check(DOCUMENTED).keys() == DOCUMENTED.keys() - taken_out


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
def test_what_is_off_may_be_null(check, key):
    assert check({"zero_optimization": {"stage": 3, key: None}})["zero_optimization"][key] is None


def test_deepspeeds_own_remarks_are_left_to_the_run(check, caplog):
    logger = logging.getLogger("DeepSpeed")
    before, logger.propagate = logger.propagate, True
    try:
        check({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": False}})
    finally:
        logger.propagate = before
    assert caplog.text == "" and not logger.disabled


# ---------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("value", [1, "auto", None])
@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        ("", "gradient_cliping", "gradient_clipping"),
        ("", "zero_optimisation", "zero_optimization"),
        ("", "train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("zero_optimization", "stage3_prefetch_buckt_size", "stage3_prefetch_bucket_size"),
        ("zero_optimization", "reduce_buket_size", "reduce_bucket_size"),
        ("bf16", "enbled", "enabled"),
        ("tensorboard", "outptu_path", "output_path"),
        ("optimizer", "parms", "params"),
        ("scheduler", "parms", "params"),
        ("data_types", "grad_accum_type", "grad_accum_dtype"),
        ("activation_checkpointing", "partition_activation", "partition_activations"),
        ("comms_logger", "prof_al", "prof_all"),
        ("aio", "queue_deph", "queue_depth"),
    ],
)
def test_a_mistyped_key_is_named_with_the_nearest(refusal, section, name, meant, value):
    config, key = ({section: {name: value}}, f"{section}.{name}") if section else ({name: value}, name)
    assert refusal(config) == f"zero.json: {key}: unknown key, did you mean {meant}?"


def test_a_mistyped_key_in_a_section_of_a_section(refusal):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu", "pin_memry": True}}
    expected = "zero.json: zero_optimization.offload_param.pin_memry: unknown key, did you mean pin_memory?"
    assert refusal({"zero_optimization": zero}) == expected


def test_a_key_that_is_near_to_none(refusal):
    assert refusal({"xyz": 1}) == "zero.json: xyz: unknown key; remove it"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
         'zero.json: zero_optimization.offload_param: found "cpu", wanted a mapping'),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
         'zero.json: zero_optimization.offload_optimizer.device: found "gpu", wanted none, cpu or nvme'),
        ({"zero_optimization": {"reduce_bucket_size": "big"}},
         'zero.json: zero_optimization.reduce_bucket_size: found "big", wanted a whole number'),
        ({"zero_optimization": {"reduce_bucket_size": 0}},
         "zero.json: zero_optimization.reduce_bucket_size: found 0, wanted a number above 0"),
        ({"zero_optimization": {"overlap_comm": "perhaps"}},
         'zero.json: zero_optimization.overlap_comm: found "perhaps", wanted true or false'),
        ({"zero_optimization": {"stage": "3x"}},
         'zero_optimization.stage in zero.json is "3x"; wanted 0, 1, 2 or 3'),
        ({"csv_monitor": {"enabled": 7}}, "zero.json: csv_monitor.enabled: found 7, wanted true or false"),
        ({"wandb": None}, "zero.json: wandb: found null, wanted a mapping"),
        ({"communication_data_type": "fp8"},
         'zero.json: communication_data_type: found "fp8", which DeepSpeed refuses: '
         "Invalid communication_data_type"),
        ({"checkpoint": 3}, "zero.json: checkpoint: found 3, wanted a mapping"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 2}}},
         "zero_optimization.offload_optimizer.ratio=2 in zero.json keeps a part of the optimizer"),
    ],
)  # fmt: skip
def test_a_value_that_deepspeed_cannot_take(refusal, config, expected):
    assert refusal(config).startswith(expected)
