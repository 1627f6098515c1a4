"""What cannot be trained by an adapted trainer, each in one sentence."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from distlora.adapter.layer import AdapterLinear
from distlora.api import Adapted
from distlora.errors import UserError

ATTACH = (
    'call adapted = distlora.attach(model, "lora_sb", rank=32) first, and give the trainer adapted=adapted'
)


def refuse_model(model: Any, adapted: Adapted | None, settings: dict[str, Any]) -> None:
    """UserError where the trainer is given something else than the adapted model."""
    if settings.get("model_init") is not None:
        raise UserError(f"model_init= would make models without an adapter; load the model, and {ATTACH}")
    if settings.get("peft_config") is not None:
        raise UserError("peft_config= asks for an adapter of PEFT beside the attached one: leave it out")
    if _has_peft(model) or (isinstance(adapted, Adapted) and _has_peft(adapted.model)):
        raise UserError(f"the model has an adapter of PEFT already; load it without that, and {ATTACH}")
    if adapted is None:
        found = isinstance(model, nn.Module) and any(isinstance(m, AdapterLinear) for m in model.modules())
        raise UserError(f"adapted= is missing{'' if found else ', and the model has no adapter'}: {ATTACH}")
    if not isinstance(adapted, Adapted):
        raise UserError(
            f"adapted= is of the class {type(adapted).__name__}; give what distlora.attach has returned"
        )
    if model is not None and model is not adapted.model:
        what = f"the name {model}" if isinstance(model, str) else "another model than the adapted one"
        raise UserError(f"model= is {what}: leave it out, adapted= brings its model")


def _has_peft(model: Any) -> bool:
    return isinstance(model, nn.Module) and hasattr(model, "peft_config")


def refuse_arguments(args: Any) -> None:
    """UserError for what in `TrainingArguments` an adapter cannot be trained with."""
    for problem in filter(None, map(lambda find: find(args), _PROBLEMS)):
        raise UserError(problem)


def _best_model(args: Any) -> str | None:
    if args.load_best_model_at_end:
        return (
            "load_best_model_at_end=True would load another checkpoint into a model that training has "
            "changed; set it to False, and load the adapter that lies in trainer.state.best_model_checkpoint"
        )
    return None


def _batch_size(args: Any) -> str | None:
    if args.auto_find_batch_size:
        return (
            "auto_find_batch_size=True begins a run again on a changed model; set it to False, and "
            "per_device_train_batch_size to what fits"
        )
    return None


def _precision(args: Any) -> str | None:
    if args.fp16:
        return "fp16=True scales gradients, which no method here can work with; use bf16=True, or float32"
    return None


def _compilation(args: Any) -> str | None:
    if args.torch_compile:
        return "torch_compile=True is not supported with layers whose weights may change; set it to False"
    return None


def _sharding(args: Any) -> str | None:
    if args.fsdp:
        return "fsdp= splits tensors in a way that is not known here; use deepspeed= with ZeRO stage 2 or 3"
    return None


def _checkpointing(args: Any) -> str | None:
    settings = getattr(args, "activation_checkpointing_kwargs", None) or {}
    if isinstance(settings, dict) and settings.get("use_reentrant"):
        return (
            "use_reentrant=True gives an adapter on a frozen model no gradient; set "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    return None


_PROBLEMS = (_best_model, _batch_size, _precision, _compilation, _sharding, _checkpointing)


def refuse_surroundings(trainer: Any, adapted: Adapted) -> None:
    """UserError for ranks, and for a DeepSpeed config, under which this trainer cannot work."""
    args = trainer.args
    if trainer.is_fsdp_enabled:
        raise UserError(
            "accelerate is set to FSDP, which is not known here; use DeepSpeed with ZeRO stage 2 or 3"
        )
    if trainer.is_deepspeed_enabled:
        _refuse_whole_model(trainer, adapted)
    elif args.world_size > 1:
        raise UserError(
            f"{args.world_size} ranks need DeepSpeed: give TrainingArguments deepspeed=, a ZeRO config"
        )
    elif args.n_gpu > 1:
        raise UserError(
            f"one process would split batches over {args.n_gpu} GPUs (DataParallel): make one visible by "
            "CUDA_VISIBLE_DEVICES, or start a process for each with deepspeed="
        )


def refuse_other_ranks(args: Any, ranks: int) -> None:
    """UserError where the trainer would not share samples between the ranks of the engine."""
    if args.world_size != ranks:
        raise UserError(
            f"DeepSpeed runs on {ranks} ranks and the trainer on {args.world_size}, so all would read the "
            "same samples: without an accelerator set use_cpu=True in the TrainingArguments",
            agreed=True,
        )


def _refuse_whole_model(trainer: Any, adapted: Adapted) -> None:
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    whole = not any(hasattr(parameter, "ds_id") for parameter in adapted.model.parameters())
    if stage == 3 and whole and isinstance(adapted.model, PreTrainedModel):
        raise UserError(
            "at ZeRO stage 3 the model was loaded whole on every rank: make the TrainingArguments with "
            "deepspeed= first, and call from_pretrained and distlora.attach after that"
        )
