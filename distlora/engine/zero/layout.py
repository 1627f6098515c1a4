"""Where ZeRO keeps the master, the moments and the averaged gradient of a trained tensor.

What is relied upon, by stage and optimizer wrapper (DeepSpeed 0.19), each with a test in tests/distributed:

    stage  dtype  wrapper                  low precision        master and moments         averaged gradient
    0      fp32   none                     the parameter        the parameter itself       parameter.grad
    0      bf16   FP16_UnfusedOptimizer    the parameter        fp32_groups, one each      parameter.grad (1)
    1      bf16   BF16_Optimizer (2)       whole on every rank  own fragment: _hp_mapping  _hp_mapping
    1, 2   any    DeepSpeedZeroOptimizer   whole on every rank  own fragment: _hp_mapping  _hp_mapping
    3      any    ..._Stage3               own shard: ds_tensor own shard: grad_position   safe_get_local_grad

(1) in float32: see `distlora.engine.gradient_sums`. (2) with gradients summed in float32, as the program asks
for, and without offload; a user's own engine may sum in bfloat16. A ZeRO-3 shard is flat and row-major:
rank k owns elements [k·ps, (k+1)·ps) of ps = ceil(numel / world), the tail is padding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from distlora.engine.optimizers import moment_of
from distlora.errors import UserError


@dataclass(frozen=True)
class Slice:
    """The part of one trained tensor whose master and moments lie on this rank: elements [start, start +
    length) of the flat tensor.

    master: (length,) view. flat: the optimizer's own parameter that the view lies in, from `offset` on.
    """

    start: int
    length: int
    master: Tensor
    flat: Tensor
    offset: int

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """(length,) the slice's part of the optimizer's state: see `moment_of`."""
        return moment_of(optimizer, self.flat, key, self.offset, self.length)


def refuse_unknown_layout(engine: DeepSpeedEngine, world_size: int) -> None:
    """UserError, in one sentence, for an engine whose tensors lie where this file does not know, or whose
    ranks do not all hold the same model.
    """
    problem = None
    if isinstance(engine, PipelineEngine):
        problem = (
            "is a PipelineEngine, of which every stage holds other layers; use ZeRO instead of pipelines"
        )
    elif engine.fp16_enabled():
        problem = (
            "trains in float16, whose scaled gradients are not supported; set bf16.enabled, or use float32"
        )
    elif engine.torch_autocast_enabled():
        problem = "runs under torch_autocast; turn it off, and load the model in bfloat16 or float32"
    elif engine.optimizer is None:
        problem = "has no optimizer; give deepspeed.initialize one, or name one in its config"
    elif engine.autotp_size() > 1 or engine.dp_world_size != world_size:
        problem = (
            "splits the model between ranks (tensor or sequence parallel); let all ranks be data parallel"
        )
    elif not engine.managed_gradient_accumulation():
        problem = "leaves accumulation to its caller; set managed_gradient_accumulation to true"
    elif engine.bf16_master_weights_and_gradients():
        problem = "keeps masters in bfloat16; remove bf16_master_weights_and_grads"
    elif engine.zenflow:
        problem = "leaves parts of the gradient to later steps; remove zenflow"
    elif _on_nvme(engine.zero_offload_optimizer()) or _on_nvme(engine.zero_offload_param()):
        problem = "keeps tensors on NVMe; set the device of its offload sections to cpu or none"
    elif engine.zero_quantized_weights() or engine.zero_quantized_nontrainable_weights():
        problem = "quantises weights for communication; remove zero_quantized_weights and its like"
    if problem:
        raise UserError(f"this DeepSpeed engine {problem}", agreed=True)


def refuse_parameters_outside(engine: DeepSpeedEngine, model: nn.Module) -> None:
    """UserError where the engine trains what the adapted model does not hold: neither checkpoints nor the
    norm of the gradient would know of it.
    """
    held = {id(parameter) for parameter in model.parameters()}
    named = engine.module.named_parameters()
    outside = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in held]
    if outside:
        raise UserError(
            f"the DeepSpeed engine also trains {outside[0]}, outside of the adapted model: attach to the "
            "module that holds all, with targets= and also_train=",
            agreed=True,
        )


def _on_nvme(offload: Any) -> bool:
    """offload: an offload section of DeepSpeed's config, None without one."""
    return offload is not None and getattr(offload.device, "value", offload.device) == "nvme"


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer inside the wrapper; at stage 0 in float32 there is no wrapper."""
    wrapper = engine.optimizer
    return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer


def locate(wrapper: Any, trained: dict[str, nn.Parameter], rank: int) -> dict[str, Slice | None]:
    """The own slice of every trained tensor, by the table above; None where the rank owns nothing.

    Errors: UserError for a wrapper that is not in the table, and for a parameter that it does not hold.
    """
    # The very class: subclasses (MiCS, for one) shard otherwise.
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        _refuse_missing(wrapper.fp16_groups, trained)
        return {name: _stage3_slice(wrapper, p, rank) for name, p in trained.items()}
    if type(wrapper) in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        partitioned = type(wrapper) is DeepSpeedZeroOptimizer
        _refuse_missing(wrapper.bit16_groups if partitioned else wrapper.bf16_groups, trained)
        flats = wrapper.single_partition_of_fp32_groups if partitioned else wrapper.fp32_groups_flat_partition
        return {name: _fragment_slice(flats, p) for name, p in trained.items()}
    if type(wrapper) is FP16_UnfusedOptimizer:
        _refuse_missing(wrapper.fp16_groups, trained)
        pairs = zip(sum(wrapper.fp16_groups, []), sum(wrapper.fp32_groups, []))
        masters = {id(low): high for low, high in pairs}
        return {name: whole_slice(masters[id(p)]) for name, p in trained.items()}
    if isinstance(wrapper, torch.optim.Optimizer):
        _refuse_missing([group["params"] for group in wrapper.param_groups], trained)
        return {name: whole_slice(p) for name, p in trained.items()}
    if type(wrapper) is FP16_Optimizer:
        raise UserError(
            "DeepSpeed wraps its fused Adam at stage 0 in bfloat16 in a way that is not supported; use "
            "stage 1, or torch_adam: true in the optimizer's params",
            agreed=True,
        )
    raise UserError(
        f"DeepSpeed chose the optimizer wrapper {type(wrapper).__name__}, whose layout is not known here; "
        "use ZeRO stage 0-3 in float32 or bfloat16 without ZenFlow or SuperOffload",
        agreed=True,
    )


def _refuse_missing(groups: list[list[nn.Parameter]], trained: dict[str, nn.Parameter]) -> None:
    held = {id(parameter) for group in groups for parameter in group}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        raise UserError(
            f"the DeepSpeed engine does not train {missing[0]} ({len(missing)} of {len(trained)} trained "
            "parameters): attach before deepspeed.initialize, and give it every parameter that requires a "
            "gradient",
            agreed=True,
        )


def _stage3_slice(wrapper: DeepSpeedZeroOptimizer_Stage3, parameter: nn.Parameter, rank: int) -> Slice | None:
    group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start, length = shard_of(parameter, rank)
    flat = wrapper.fp32_partitioned_groups_flat[group]
    return Slice(start, length, flat.detach().narrow(0, offset, length), flat, offset) if length else None


def shard_of(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """First element and number of elements, padding left out, of the rank's own ZeRO-3 shard."""
    size = parameter.ds_tensor.ds_numel
    start = min(rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def _fragment_slice(flats: list[Tensor], parameter: nn.Parameter) -> Slice | None:
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    low, high = fragment.lp_fragment_address, fragment.hp_fragment_address
    flat = flats[fragment.param_group_index]
    return Slice(low.start, low.numel, fragment.hp_fragment.detach(), flat, high.start)


def fragment_gradient(parameter: nn.Parameter, own: Slice) -> Tensor:
    """(length,) view of the own part of an averaged gradient at stages 1 and 2."""
    fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    # BF16_Optimizer accumulates the whole tensor on every rank, and steps with its own part of it.
    return fragment.narrow(0, own.start, own.length) if fragment.numel() == parameter.numel() else fragment


def whole_slice(master: Tensor) -> Slice:
    """Of a tensor that every rank holds whole."""
    return Slice(0, master.numel(), master.detach().view(-1), master, 0)
