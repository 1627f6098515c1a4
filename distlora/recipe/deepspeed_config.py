"""The user's DeepSpeed config, made complete: "auto" gets a value, contradictions to the recipe are refused.

DeepSpeed itself does not know "auto": it drops it or misreads it. This file works on plain dictionaries and
does not import DeepSpeed.
"""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.methods import TransformsGradients
from distlora.recipe.deepspeed_file import read_deepspeed
from distlora.recipe.deepspeed_keys import AUTO, FIELDS, refused
from distlora.recipe.deepspeed_resolution import Resolution
from distlora.recipe.sections import Recipe
from distlora.recipe.strict import show

#: Keys that may be left out for "auto": it is DeepSpeed's own word and its default there, or accelerate fills
#: it with what this library does not use.
_NATIVE_AUTOS = (
    "data_types.keep_in_fp32_modules",
    "pipeline.stages",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
)
#: Parameters of an optimizer section, with the values that do not change what the recipe's optimizer
#: computes.
_NEUTRAL_PARAMS = {
    "torch_adam": (True, False),
    "adam_w_mode": (True,),
    "amsgrad": (False,),
    "bias_correction": (True,),
    "dampening": (0,),
    "foreach": (True, False, None),
    "fp32_optimizer_states": (True,),
    "fused": (True, False, None),
    "nesterov": (False,),
}
#: DeepSpeed's types, in lower case, for an optimizer of the recipe, if there are others than its own name.
#: DeepSpeed's "Adam" is AdamW unless `adam_w_mode` is false.
_OPTIMIZER_TYPES = {"adamw": ("adamw", "adam")}
#: DeepSpeed's words for a dtype of the recipe.
_TYPES = {
    "bfloat16": ("bf16", "bfloat16", "torch.bfloat16"),
    "float32": ("fp32", "float32", "float", "torch.float32"),
}
_SCHEDULER_TYPES = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant": "WarmupLR"}
_MAPPINGS = (
    "bf16", "bfloat16", "csv_monitor", "data_types", "fp16", "optimizer", "optimizer.params", "scheduler",
    "scheduler.params", "tensorboard", "torch_autocast", "zero_optimization",
)  # fmt: skip


def plan_batches(recipe: Recipe, world_size: int) -> int:
    """How many micro-batches each rank accumulates for an optimizer step.

    Raises UserError if the batch cannot be divided so.
    """
    whole, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    steps, rest = divmod(whole, micro * world_size)
    if rest:
        nearest = max(1, round(whole / (micro * world_size))) * micro * world_size
        raise UserError(
            f"train.global_batch_size={whole} is not divisible by train.micro_batch_size={micro} times "
            f"{_ranks(world_size)}; the nearest that is: {nearest}"
        )
    return steps


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"


def given_deepspeed(recipe: Recipe) -> tuple[dict, str]:
    """The DeepSpeed config as the recipe gives it, and what messages call it."""
    if recipe.deepspeed is None:
        raise ValueError("the recipe has no DeepSpeed config")
    if isinstance(recipe.deepspeed, str):
        return read_deepspeed(recipe.deepspeed)
    return recipe.deepspeed, recipe.deepspeed_source


def resolve_deepspeed(recipe: Recipe, world_size: int, hidden_size: int | None) -> tuple[dict, list[str]]:
    """The config for DeepSpeed, without any "auto"; and a line for each key that was filled, added or
    removed.

    hidden_size: of the model; None if it has no such number. The `optimizer` and `scheduler` sections are
    compared with the recipe and removed, because DeepSpeed gets optimizer and schedule as objects. Keys that
    this file does not name stay as they are. Raises UserError for a contradiction (it names both places), and
    for an "auto" that means nothing here.
    """
    config, source = given_deepspeed(recipe)
    r = Resolution(copy.deepcopy(config), source)
    for section in _MAPPINGS:
        if not isinstance(r.get(section, {}), dict):
            raise UserError(f"{section} in {source} is {json.dumps(r.get(section))}; a mapping is wanted")
    _fields(r)
    for key, value, why in refused(r.config):
        raise UserError(f"{key}={show(value, key)} in {source} {why}")
    _batches(r, recipe, world_size)
    _precision(r, recipe)
    _zero(r, world_size, hidden_size)
    _sums(r, recipe, plan_batches(recipe, world_size))
    _optimizer(r, recipe)
    _scheduler(r, recipe)
    _monitors(r, recipe)
    _rest(r, world_size)
    return r.config, r.lines


def _fields(r: Resolution) -> None:
    """Writes the documented keys in the place of the names of DeepSpeed's fields."""
    for field, key in FIELDS.items():
        value = r.get(field, r)
        if value is r:
            continue
        if r.get(key, r) is not r:
            raise UserError(f"{field} in {r.source} is another name of {key}, which is there too; remove it")
        r.remove(field, f"another name of {key}")
        r.set(key, value, "under its documented name")


def _batches(r: Resolution, recipe: Recipe, world_size: int) -> None:
    train = recipe.train
    accumulation = plan_batches(recipe, world_size)
    r.settle(
        "train_batch_size",
        train.global_batch_size,
        f"train.global_batch_size={train.global_batch_size}",
        add=True,
    )
    micro = f"train.micro_batch_size={train.micro_batch_size}"
    r.settle("train_micro_batch_size_per_gpu", train.micro_batch_size, micro, add=True)
    both = f"train.global_batch_size={train.global_batch_size} with {micro} on {_ranks(world_size)}"
    r.settle(
        "gradient_accumulation_steps", accumulation, f"{both} ({accumulation} accumulation steps)", add=True
    )
    r.settle("gradient_clipping", train.clip or 0.0, f"train.clip={json.dumps(train.clip)}", add=True)
    if train.clip and isinstance(recipe.method, TransformsGradients):
        r.lines.append(
            "deepspeed.gradient_clipping: applied by distlora, by the norm before "
            f"{recipe.method.name} transforms the gradients; DeepSpeed itself does not clip"
        )


def _precision(r: Resolution, recipe: Recipe) -> None:
    for section in ("fp16", "torch_autocast"):
        r.fill(f"{section}.enabled", False)
    if "bfloat16" in r.config:
        old = r.config.pop("bfloat16")
        r.config.setdefault("bf16", old)
        r.lines.append("deepspeed.bfloat16: the old name of bf16")
    wanted, dtype = recipe.model.dtype == "bfloat16", f"model.dtype={recipe.model.dtype}"
    r.settle("bf16.enabled", wanted, dtype, add=wanted)
    if r.get("data_types.param_dtype") not in (None, AUTO, *_TYPES[recipe.model.dtype]):
        raise r.contradiction("data_types.param_dtype", dtype)
    r.drop("data_types.param_dtype", "removed, the precision is the recipe's")


def _sums(r: Resolution, recipe: Recipe, accumulation: int) -> None:
    """Gradients are summed in float32, over micro-batches and over ranks. DeepSpeed's own choice is the dtype
    of the weights."""
    if recipe.model.dtype == "float32":
        return
    key, stage, zero = "data_types.grad_accum_dtype", "zero_optimization.stage", "zero_optimization"
    if r.get(stage, 0) == 0:
        r.drop(key, "removed, distlora itself sums in float32 at stage 0")
    elif r.get(key, AUTO) in (None, AUTO):
        r.set(key, "fp32", "so that gradients are summed in float32")
    if r.get(stage) == 2 and accumulation > 1 and r.get(f"{zero}.offload_optimizer.device") == "cpu":
        r.set(stage, 1, "since with an offloaded optimizer DeepSpeed's stage 2 sums gradients in bfloat16")
    if r.get("communication_data_type", AUTO) in (None, AUTO):
        r.set("communication_data_type", "fp32", "so that ranks add up gradients in float32")


def _zero(r: Resolution, world_size: int, hidden_size: int | None) -> None:
    stage = r.get("zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"zero_optimization.stage in {r.source} is {json.dumps(stage)}; wanted 0, 1, 2 or 3")
    h = hidden_size or 0
    sizes = {
        "reduce_bucket_size": h * h,
        "stage3_prefetch_bucket_size": int(0.9 * h * h),
        "stage3_param_persistence_threshold": 10 * h,
    }
    for name, value in sizes.items():
        key = f"zero_optimization.{name}"
        if r.get(key) == AUTO and hidden_size is None:
            raise UserError(
                f"{key} is auto in {r.source}, but the model's config has no hidden_size; give a number"
            )
        r.fill(key, value)
    key = "zero_optimization.zero_hpz_partition_size"
    group = r.get(key, 1)
    if isinstance(group, int) and group > 1 and world_size % min(group, world_size):
        raise UserError(f"{key}={group} in {r.source} does not divide {world_size} ranks")


def _optimizer(r: Resolution, recipe: Recipe) -> None:
    train, own = recipe.train, recipe.train.optimizer
    if "optimizer" in r.config:
        r.fill("optimizer.type", own.name)
        kind = r.get("optimizer.type")
        if kind is not None and str(kind).lower() not in _OPTIMIZER_TYPES.get(own.name, (own.name,)):
            raise r.contradiction("optimizer.type", f"train.optimizer.name={own.name}")
        values = {"lr": ("train.lr", train.lr), "weight_decay": ("train.weight_decay", train.weight_decay)}
        names = ("momentum",) if own.name == "sgd" else ("betas", "eps")
        values |= {name: (f"train.optimizer.{name}", getattr(own, name)) for name in names}
        for name, given in (r.get("optimizer.params") or {}).items():
            if name in values:
                place, value = values[name]
                value = list(value) if isinstance(value, tuple) else value
                r.settle(f"optimizer.params.{name}", value, f"{place}={json.dumps(value)}")
            elif given not in _NEUTRAL_PARAMS.get(name, ()):
                raise UserError(
                    f"optimizer.params.{name}={json.dumps(given)} in {r.source} has no counterpart "
                    f"in the recipe's train.optimizer ({own.name}); remove it"
                )
        r.remove("optimizer", "removed, the optimizer is the recipe's")
    if own.name != "adamw":
        _untested_optimizer(r, own.name)


def _untested_optimizer(r: Resolution, name: str) -> None:
    """For optimizers other than AdamW, two keys must tell DeepSpeed that they are meant."""
    key, untested = "zero_allow_untested_optimizer", f"train.optimizer.name={name}"
    if r.get(key, AUTO) == AUTO:
        r.set(key, True, f"for {name}")
    if not r.get(key) and r.get("zero_optimization.stage", 0) > 0:
        raise UserError(f"{key}=false in {r.source} forbids {untested}; set it to true or auto, or use adamw")
    offloaded = r.get("zero_optimization.offload_optimizer.device") == "cpu"
    if offloaded and r.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"{untested} has no form in DeepSpeed for zero_optimization.offload_optimizer in {r.source}; "
            "use adamw, or set zero_force_ds_cpu_optimizer to false there"
        )


def _scheduler(r: Resolution, recipe: Recipe) -> None:
    """A scheduler section may say only what the recipe says: the schedule's type, its rates, and "auto"."""
    if "scheduler" not in r.config:
        return
    schedule = recipe.train.schedule.name
    own = _SCHEDULER_TYPES.get(schedule)
    if own is not None:
        r.fill("scheduler.type", own)
    kind = r.get("scheduler.type")
    if kind not in (None, AUTO, own):
        other = next((name for name, its in _SCHEDULER_TYPES.items() if its == kind), None)
        either = f", or train.schedule to {other}" if other else ""
        raise UserError(
            f"recipe train.schedule={schedule} contradicts scheduler.type={json.dumps(kind)} in {r.source}; "
            f"set the latter to {' or '.join(filter(None, ('auto', own)))}{either}"
        )
    said = {"warmup_min_lr": 0, "warmup_max_lr": recipe.train.lr}
    for name, value in (r.get("scheduler.params") or {}).items():
        if value != AUTO and (name not in said or isinstance(value, bool) or value != said[name]):
            raise UserError(
                f"scheduler.params.{name}={json.dumps(value)} in {r.source} contradicts the recipe, whose "
                "train section decides it; set it to auto or remove it"
            )
    r.remove("scheduler", "removed, the schedule is the recipe's")


def _monitors(r: Resolution, recipe: Recipe) -> None:
    for section in ("tensorboard", "csv_monitor"):
        r.fill(f"{section}.output_path", str(Path(recipe.output_dir) / section))
        r.fill(f"{section}.job_name", ".")


def _rest(r: Resolution, world_size: int) -> None:
    ranks = r.get("data_parallel_size", AUTO)
    if ranks not in (AUTO, world_size):
        raise UserError(
            f"data_parallel_size={show(ranks)} in {r.source} is not the number of ranks, "
            f"{world_size}; remove it"
        )
    for key in ("data_parallel_size", "sequence_parallel_size"):
        r.drop(key, "removed, all ranks are data parallel")
    r.fill("gradient_allreduce_op", "mean")
    for key in _NATIVE_AUTOS:
        if r.get(key) == AUTO:
            r.remove(key, "left to DeepSpeed (auto)")
    left = next(_autos(r.config, ""), None)
    if left:
        raise UserError(
            f"{left} is auto in {r.source}, and nothing in the recipe decides it; give a value or remove it"
        )


def _autos(node: Any, key: str) -> Iterable[str]:
    """The dotted keys of every "auto"."""
    if node == AUTO:
        yield key
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        yield from _autos(child, f"{key}.{name}" if key else str(name))
