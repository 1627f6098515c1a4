"""Every key of a DeepSpeed config, sorted by what it does to a run of this library.

    honoured  the run follows it, or the recipe decides it (then a contradiction is refused)
    harmless  whatever its value, the run computes what the recipe says
    refused   DeepSpeed would compute something else, break off, or keep tensors where no engine looks

Values matter: most of the refused keys have values at which they change nothing, and those are accepted. A
key that is not in this table is unknown: a newer DeepSpeed's is refused until it is sorted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

#: What the integration of Hugging Face writes where the trainer decides.
AUTO = "auto"


class Sort(Enum):
    HONOURED, HARMLESS, REFUSED = "honoured", "harmless", "refused"


@dataclass(frozen=True)
class Rule:
    """sort: of the key. accepts: whether a value of a refused key changes nothing. why: end of the sentence
    that refuses the others, after the key and its value.
    """

    sort: Sort
    accepts: Callable[[Any], bool] = lambda value: True
    why: str = ""

    def refuses(self, value: Any) -> bool:
        """An "auto" is judged once it is filled, unless no value is accepted."""
        return not self.accepts(value) and (value != AUTO or self.accepts is _never)


def _never(value: Any) -> bool:
    return False


def _is_exact(dtype: Any) -> bool:
    return str(dtype).lower() not in ("bf16", "fp16")


def _is_near(device: Any) -> bool:
    return device != "nvme"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_mean(value: Any) -> bool:
    return str(value).lower() == "mean"


def _is_interval(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)


_ADAM = (
    "lr betas eps weight_decay momentum adam_w_mode adamw_mode amsgrad bias_correction capturable dampening "
    "decoupled_weight_decay differentiable foreach fp32_optimizer_states fused maximize nesterov torch_adam "
    "max_grad_norm freeze_step var_freeze_step cuda_aware comm_backend_name max_coeff min_coeff"
)
_SCHEDULE = (
    "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps warmup_min_ratio cos_min_ratio "
    "last_batch_iteration"
)
_RANDOM_LTD = (
    "total_layer_num random_ltd_layer_num random_ltd_layer_id model_mask_name model_type hidden_state_order "
    "micro_batch_size global_batch_size random_ltd_schedule layer_token_lr_schedule"
)

#: By section; "" is the top.
_HONOURED = {
    "": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "data_parallel_size zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
    "bf16": "enabled",
    "bfloat16": "enabled",
    "comet": "enabled samples_log_interval project workspace api_key experiment_name "
    "experiment_key online mode",
    "csv_monitor": "enabled output_path job_name",
    "data_types": "param_dtype",
    "optimizer": "type",
    "optimizer.params": _ADAM,
    "scheduler": "type",
    "scheduler.params": _SCHEDULE,
    "tensorboard": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "zero_optimization": "stage reduce_bucket_size stage3_prefetch_bucket_size memory_efficient_linear "
    "stage3_param_persistence_threshold stage3_max_live_parameters allgather_bucket_size "
    "zero_hpz_partition_size",
    "zero_optimization.leaf_module": "classes names name_suffixes",
    "zero_optimization.offload_optimizer": "pin_memory",
    "zero_optimization.offload_param": "pin_memory",
}

#: DeepSpeed's own checkpoints, data loader, pipelines and activation checkpoints are not used here, and what
#: a section needs is of no account while the section is off.
_HARMLESS = {
    "": "dataloader_drop_last disable_allgather disable_python_gc dump_state memory_breakdown "
    "seq_parallel_communication_data_type use_data_before_expert_parallelism vocabulary_size "
    "wall_clock_breakdown",
    "activation_checkpointing": "partition_activations contiguous_memory_optimization cpu_checkpointing "
    "number_checkpoints synchronize_checkpoint_boundary profile",
    "aio": "block_size queue_depth intra_op_parallelism thread_count single_submit overlap_events use_gds",
    "autotuning": "fast results_dir exps_dir overwrite start_profile_step end_profile_step metric "
    "metric_path tuner_type tuner_early_stopping tuner_num_trials arg_mappings model_info "
    "model_info_path mp_size max_train_batch_size min_train_batch_size max_train_micro_batch_size_per_gpu "
    "min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes",
    "autotuning.model_info": "profile num_params hidden_size num_layers",
    "bf16": "check_grad_overflow immediate_grad_update",
    "bfloat16": "check_grad_overflow immediate_grad_update",
    "checkpoint": "tag_validation checkpoint_serialization load_universal use_node_local_storage",
    "checkpoint.parallel_write": "pipeline_stage",
    "comms_logger": "enabled verbose prof_all prof_ops debug",
    "compile": "free_activation free_activation_threshold offload_activation offload_activation_pin_memory "
    "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
    "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
    "keep_all_input_tensors autoep_non_moe",
    "data_efficiency": "seed",
    "data_efficiency.data_routing.random_ltd": _RANDOM_LTD,
    "data_efficiency.data_sampling": "num_epochs num_workers pin_memory",
    "data_efficiency.data_sampling.curriculum_learning": "data_cluster_path curriculum_metrics",
    "data_efficiency.data_sampling.dynamic_batching": "metrics_path lr_scaling_method min_batch_size "
    "max_batch_size sequence_picking_order max_tokens verbose",
    "data_types": "keep_in_fp32_modules",
    "expert_parallel": "autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan "
    "preset_model moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm "
    "route_norm route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend "
    "comm_num_sm comm_qp_margin comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func "
    "top_k load_balance_coeff routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr "
    "top_k_attr has_shared_experts shared_experts_pattern shared_experts_gate_pattern expert_activation",
    "flops_profiler": "recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "fp16": "loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale",
    "hybrid_engine": "max_out_tokens inference_tp_size release_inference_cache pin_parameters "
    "tp_gather_partition_size enable_cuda_graph",
    "optimizer": "legacy_fusion",
    "pipeline": "partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned",
    "tensor_parallel": "dtype tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend "
    "injection_policy_tuple partition_config preset_model keep_module_on_host replace_with_kernel_inject "
    "kernel_inject",
    "tensor_parallel.tensor_parallel": "tp_grain_size mpu tp_group",
    "tensor_parallel.tp": "tp_grain_size mpu tp_group",
    "timers.throughput": "enabled synchronized",
    "torch_autocast": "dtype lower_precision_safe_modules",
    "weight_quantization": "enabled num_bits q_type q_groups",
    "zero_optimization": "allgather_partitions contiguous_gradients cpu_offload_use_pin_memory "
    "elastic_checkpoint enable_sanity_checks load_from_fp32_weights log_trace_cache_warnings overlap_comm "
    "parameter_alignment pipeline_loading_checkpoint reduce_scatter round_robin_gradients "
    "save_muon_momentum_buffer_in_memory stage3_allgather_sequential stage3_max_reuse_distance "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_model_persistence_threshold stage3_use_all_reduce_for_fetch_params sub_group_size "
    "use_multi_rank_bucket_allreduce",
    "zero_optimization.offload_optimizer": "buffer_count cpuadam_cores_perc fast_init nvme_path "
    "pipeline_read pipeline_write",
    "zero_optimization.offload_param": "buffer_count buffer_size max_in_cpu nvme_path",
}

#: Keys that are true or false and whose kind DeepSpeed does not check: any text would be true.
SWITCHES = (
    "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state", "memory_breakdown",
    "use_data_before_expert_parallelism", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip

#: Sections whose content DeepSpeed leaves to the user.
_FREE = (
    "autotuning.arg_mappings",
    "data_efficiency.data_routing.random_ltd.layer_token_lr_schedule",
    "data_efficiency.data_routing.random_ltd.random_ltd_schedule",
    "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics",
    "tensor_parallel.partition_config",
)

_PRECISION = "is not supported: the precision is that of the recipe's model.dtype; set it to false or auto"
_DATA = "leaves out or reorders what the recipe's data section has chosen; set it to false or remove it"
_WHOLE = "splits the model between ranks, and here all ranks are data parallel; set it to {} or remove it"
_BF16 = "rounds masters, sums and moments to bfloat16, which loses small steps; set it to false or remove it"
_NVME = "is not supported; set it to cpu or none"
_OLD_OFFLOAD = "is an old name; set {}.device to cpu in its place"
_QUANTISED = "is not supported: it rounds {} to a few bits; set it to false or remove it"
_SECTION = "is not supported; set it to false or remove the section: "

#: Refused as a whole, whatever they hold.
_WHOLE_SECTIONS = ("checkpoint.writer", "datastates_ckpt", "zero_optimization.zenflow")

#: (key, values at which it changes nothing, why the others are refused)
_REFUSED: list[tuple[str, tuple | Callable[[Any], bool], str]] = [
    ("managed_gradient_accumulation", (True,),
     "makes DeepSpeed take a step at every micro-batch; set it to true or remove it"),
    ("sequence_parallel_size", (1,), _WHOLE.format(1)),
    ("tensor_parallel.autotp_size", (0, 1), _WHOLE.format(0)),
    ("tensor_parallel.tp.tp_size", (1,), _WHOLE.format(1)),
    ("tensor_parallel.tensor_parallel.tp_size", (1,), _WHOLE.format(1)),
    ("expert_parallel.enabled", (False,), _SECTION + "it splits the experts between ranks"),
    ("pipeline.stages", (1,), "splits the model between ranks, and here there are no pipelines; remove it"),
    ("hybrid_engine.enabled", (False,), _SECTION + "it replaces the model's layers"),
    ("compile.deepcompile", (False,), _SECTION + "it replaces the hooks of ZeRO"),
    ("compile.passes", (None, []), "is for DeepSpeed's compiler, which is not used here; remove it"),
    ("bf16.bf16_master_weights_and_grads", (False,), _BF16),
    ("bf16.bf16_optimizer_states", (False,), _BF16),
    ("bfloat16.bf16_master_weights_and_grads", (False,), _BF16),
    ("bfloat16.bf16_optimizer_states", (False,), _BF16),
    ("fp16.enabled", (False,), _PRECISION),
    ("fp16.auto_cast", (False,), "rounds inputs to float16; set it to false or remove it"),
    ("fp16.fp16_master_weights_and_grads", (False,),
     "keeps masters in float16; set it to false or remove it"),
    ("torch_autocast.enabled", (False,), _PRECISION),
    ("data_types.buffer_dtype", (None,),
     "rounds the model's buffers, such as the frequencies of its positions; remove it"),
    ("data_types.grad_accum_dtype", (None, "fp32", "float32", "float", "torch.float32"),
     "rounds the sum of the micro-batches; set it to fp32 or remove it"),
    ("communication_data_type", _is_exact,
     "rounds gradients on their way between ranks; set it to fp32 or remove it"),
    ("gradient_allreduce_op", _is_mean,
     "is not supported: the loss is a mean over the global batch; set it to mean"),
    ("gradient_predivide_factor", (1,),
     "divides gradients before they are summed, which float32 and bfloat16 do not need; set it to 1 "
     "or remove it"),
    ("prescale_gradients", (False,),
     "divides gradients before they are summed, which float32 and bfloat16 do not need; set it to "
     "false or remove it"),
    ("data_efficiency.enabled", (False,), _DATA),
    ("data_efficiency.data_routing.enabled", (False,), _DATA),
    ("data_efficiency.data_routing.random_ltd.enabled", (False,), _DATA),
    ("data_efficiency.data_sampling.enabled", (False,), _DATA),
    ("data_efficiency.data_sampling.curriculum_learning.enabled", (False,), _DATA),
    ("data_efficiency.data_sampling.dynamic_batching.enabled", (False,), _DATA),
    ("autotuning.enabled", (False,), _SECTION + "it ends a run after a few steps"),
    ("flops_profiler.enabled", (False,),
     _SECTION + "it counts by torch's functions, which adapter layers do not call"),
    ("checkpoint.writer", (None,), "sets DeepSpeed's own checkpoints, which are not used here; remove it"),
    ("datastates_ckpt", (False,), "sets DeepSpeed's own checkpoints, which are not used here; remove it"),
    ("weight_quantization.quantized_initialization", (None, {}),
     "quantises weights while they load; remove it, and set the recipe's model.quantization"),
    ("weight_quantization.post_init_quant", (None, {}),
     "quantises weights; remove it, and set the recipe's model.quantization"),
    ("steps_per_print", _is_interval,
     "is not a number of steps; set it to one above 0 or remove it"),
    ("log_level", (None, "debug", "info", "warning", "error", "critical"),
     "is no level of DeepSpeed's log; set it to debug, info, warning, error or critical"),
    ("zero_optimization.compute_grad_norm", (True,),
     "leaves out the norm of the gradient, which every step reports; set it to true or remove it"),
    ("zero_optimization.ignore_unused_parameters", (True,),
     "ends a run whose batch does not reach every trained tensor; set it to true or remove it"),
    ("zero_optimization.legacy_stage1", (False,),
     "is an old form that DeepSpeed itself refuses; remove it"),
    ("zero_optimization.override_module_apply", (True,),
     "spoils weights that are made while the model loads; set it to true or remove it"),
    ("zero_optimization.stage3_module_granularity_threshold", (0,),
     "gathers small modules as one, over which gradients cannot be probed; set it to 0 or remove it"),
    ("zero_optimization.zero_quantized_weights", (False,), _QUANTISED.format("weights")),
    ("zero_optimization.zero_quantized_nontrainable_weights", (False,), _QUANTISED.format("weights")),
    ("zero_optimization.zero_quantized_gradients", (False,), _QUANTISED.format("gradients")),
    ("zero_optimization.zenflow", (None,),
     "is not supported: it leaves parts of the gradient to later steps; remove it"),
    ("zero_optimization.cpu_offload", (None, False), _OLD_OFFLOAD.format("offload_optimizer")),
    ("zero_optimization.cpu_offload_param", (None, False), _OLD_OFFLOAD.format("offload_param")),
    ("zero_optimization.offload_optimizer.device", _is_near, _NVME),
    ("zero_optimization.offload_optimizer.ratio", (1,),
     "keeps a part of the optimizer on the GPU, which is not supported; set it to 1 or remove it"),
    ("zero_optimization.offload_optimizer.super_offload", (False,),
     "is not supported; set it to false or remove it"),
    ("zero_optimization.offload_param.device", _is_near, _NVME),
]  # fmt: skip

#: What DeepSpeed has removed, and what to do without it.
_REMOVED = {
    "amp": "the recipe's model.dtype sets the precision",
    "compression_training": "the recipe's model.quantization stores weights in fewer bits",
    "curriculum_learning": "the recipe's data section chooses the samples",
    "eigenvalue": "nothing here needs it",
    "elasticity": "a run resumes on any number of ranks",
    "graph_harvesting": "nothing here needs it",
    "nebula": "the recipe's train.save_every sets checkpoints",
    "progressive_layer_drop": "every step trains all layers",
    "quantize_training": "the recipe's model.quantization stores weights in fewer bits",
    "sparse_attention": "the recipe's model.attention sets the attention",
    "sparse_gradients": "gradients of adapters are dense",
    "zero_optimization.mics_hierarchical_params_gather": "use zero_hpz_partition_size",
    "zero_optimization.mics_shard_size": "use zero_hpz_partition_size",
    "zero_optimization.zeropp_loco_param": "gradients are summed in float32",
}

#: Names of DeepSpeed's own fields that it takes beside the documented keys, and those keys.
FIELDS = {
    f"zero_optimization.{name}": f"zero_optimization.stage3_{name}"
    for name in (
        "allgather_sequential", "gather_16bit_weights_on_model_save", "max_live_parameters",
        "max_reuse_distance", "model_persistence_threshold", "module_granularity_threshold",
        "param_persistence_threshold", "prefetch_bucket_size", "use_all_reduce_for_fetch_params",
    )
}  # fmt: skip


def _rules() -> Iterator[tuple[str, Rule]]:
    for sort, table in ((Sort.HONOURED, _HONOURED), (Sort.HARMLESS, _HARMLESS)):
        for section, names in table.items():
            for name in names.split():
                yield (f"{section}.{name}" if section else name), Rule(sort)
    for key, values, why in _REFUSED:
        yield key, Rule(Sort.REFUSED, values if callable(values) else values.__contains__, why)
    for key, instead in _REMOVED.items():
        yield key, Rule(Sort.REFUSED, _never, f"was removed from DeepSpeed; remove it: {instead}")
    for field in FIELDS:
        yield field, Rule(Sort.HONOURED)


def _with_sections(rules: dict[str, Rule]) -> dict[str, Rule]:
    """The rules, and one for every section that holds keys."""
    sections = {key.rsplit(".", depth)[0] for key in rules for depth in range(1, key.count(".") + 1)}
    return {section: Rule(Sort.HONOURED) for section in sections} | rules


#: The table: every key and every section by its dotted name.
RULES = _with_sections(dict(_rules()))


def names_in(section: str) -> list[str] | None:
    """The keys of a section ("" is the top). None where any name may stand, or where it is no section."""
    if section in _FREE or section in _REMOVED or section in _WHOLE_SECTIONS:
        return None
    start = f"{section}." if section else ""
    inside = (key.removeprefix(start) for key in RULES if key.startswith(start))
    return [name for name in inside if "." not in name] or None


def refused(config: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any, str]]:
    """What of a config is refused: the dotted key, its value and why."""
    for name, value in config.items():
        key = f"{section}.{name}" if section else name
        rule = RULES.get(key)
        if rule is not None and rule.refuses(value):
            yield key, value, rule.why
        elif isinstance(value, dict):
            yield from refused(value, key)
