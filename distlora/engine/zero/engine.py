"""The engine on DeepSpeed ZeRO, stages 0 to 3: the only file that knows how ZeRO lays tensors out.

What is relied upon, by stage and optimizer wrapper (DeepSpeed 0.19), each with a test in tests/distributed:

    stage  dtype  wrapper                      low precision          float32 master and moments        averaged gradient
    0      fp32   none                         the parameter          the parameter itself              parameter.grad
    0      bf16   FP16_UnfusedOptimizer        the parameter          fp32_groups, one a parameter      parameter.grad
    1      bf16   BF16_Optimizer (grads fp32)  whole on every rank    own fragment: _hp_mapping         _hp_mapping
    1, 2   any    DeepSpeedZeroOptimizer       whole on every rank    own fragment: _hp_mapping         _hp_mapping
    3      any    DeepSpeedZeroOptimizer_Stage3  own shard: ds_tensor own shard: grad_position          safe_get_local_grad

A ZeRO-3 shard is flat and row-major: rank k owns elements [k·ps, (k+1)·ps) of ps = ceil(numel / world), the
tail is padding.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.ledger import Ledger
from distlora.engine.optimizers import OptimizerSpec, moment_of, restore_state, set_rate, steps_taken
from distlora.engine.protocol import (
    GradientMap,
    Part,
    StepInfo,
    adapter_layers,
    clip_factor,
    left_factors,
    tell_changed,
    transform,
    transforming,
)
from distlora.errors import UserError
from distlora.maths.low_rank import LowRank, add_low_rank
from distlora.maths.rounding import Rounding
from distlora.methods import Factors

#: Elements that one collective makes whole when gradients are to be replaced.
GRADIENT_BUCKET = 1 << 24


@dataclass(frozen=True)
class Slice:
    """The part of one trained tensor whose master and moments lie on this rank: elements [start, start +
    length) of the flat tensor. master: (length,) view. flat: the optimizer's own parameter that the view lies
    in, from `offset` on."""

    start: int
    length: int
    master: Tensor
    flat: Tensor
    offset: int

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """(length,) the slice's part of the optimizer's state: see `moment_of`."""
        return moment_of(optimizer, self.flat, key, self.offset, self.length)


class _Runner(nn.Module):
    """What DeepSpeed wraps: runs any function of the bare model as one forward pass, so that all of ZeRO's
    hooks see it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *arguments):
        return function(self.model, *arguments)


class ZeroEngine:
    """See `distlora.engine.protocol.Engine`. config: a DeepSpeed config without any "auto"."""

    def __init__(self, comm: Comm, config: dict[str, Any]):
        self.comm, self._config = comm, config
        self.ledger: Ledger | None = None
        zero = config.get("zero_optimization", {})
        self.stage = int(zero.get("stage", 0))
        self._clip = config.get("gradient_clipping")
        self.dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        self._offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
        # DeepSpeed's own CPU Adam is faster but has to be compiled; the config says whether it must be used.
        self._cpu_adam = self._offload and config.get("zero_force_ds_cpu_optimizer", True)
        # Before the first zero.Init, which would otherwise read the config as for one rank. The process group
        # is there already.
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that an operator was built
            deepspeed.init_distributed(comm.backend, auto_mpi_discovery=False, verbose=False)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    # ------------------------------------------------------------------ coming to life

    @contextmanager
    def loading(self, whole: bool = False) -> Iterator[None]:
        # from_pretrained looks the object up through a weak reference: partitioned loading lasts as long as
        # this variable.
        partitioned = HfDeepSpeedConfig(self._config) if self.stage == 3 and not whole else None
        yield
        del partitioned

    def attaching(self) -> AbstractContextManager:
        # With hpZ the groups of ranks may be made only once, which loading has done; `start` partitions the
        # factors then.
        if self.stage < 3 or self._config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            return nullcontext()
        # The dtype comes from the config: one that is given here DeepSpeed 0.19 replaces by bfloat16 on a CPU
        # without float16.
        return deepspeed.zero.Init(config_dict_or_path=self._config)

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        self.module, self.optimizer = model, optimizer
        if self.stage == 3:
            # DeepSpeed places what it partitions; the buffers of a model that was loaded whole are still on
            # the host.
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.comm.device)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._layers = adapter_layers(model)
        self._transforming = transforming(self._layers)
        # DeepSpeed would clip by the norm of the transformed gradients: `_transform` has clipped by then.
        config = {**self._config, "gradient_clipping": 0.0} if self._transforming else self._config
        built = self._build(optimizer, optimizer.groups(trained, left_factors(self._layers)))
        self._engine, *_ = deepspeed.initialize(
            model=_Runner(model), optimizer=built, config=config, dist_init_required=False
        )
        self._parameters = dict(model.named_parameters())
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._slices = self._locate()
        # Under stage 0 in float32 DeepSpeed keeps no wrapper, and `optimizer` is the base optimizer itself.
        wrapper = self._engine.optimizer
        self._optimizer = wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer
        # FP16_UnfusedOptimizer takes a step with zero gradients when it is made, which would put Adam's count
        # one off.
        self._optimizer.state.clear()

    def _build(self, spec: OptimizerSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not self._cpu_adam:
            return spec.build(groups)
        return DeepSpeedCPUAdam(
            groups, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, adamw_mode=True
        )

    def _locate(self) -> dict[str, Slice | None]:
        """The own slice of every trained tensor, by the table in the module's docstring; None where the rank
        owns nothing.
        """
        wrapper = self._engine.optimizer
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            return {name: self._stage3_slice(wrapper, p) for name, p in self._trained.items()}
        if isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
            partitioned = isinstance(wrapper, DeepSpeedZeroOptimizer)
            flats = (
                wrapper.single_partition_of_fp32_groups if partitioned else wrapper.fp32_groups_flat_partition
            )
            return {name: _fragment_slice(flats, p) for name, p in self._trained.items()}
        if isinstance(wrapper, FP16_UnfusedOptimizer):
            pairs = zip(sum(wrapper.fp16_groups, []), sum(wrapper.fp32_groups, []))
            masters = {id(low): high for low, high in pairs}
            return {name: _whole_slice(masters[id(p)]) for name, p in self._trained.items()}
        if isinstance(wrapper, torch.optim.Optimizer):
            return {name: _whole_slice(p) for name, p in self._trained.items()}
        raise UserError(
            f"DeepSpeed chose the optimizer wrapper {type(wrapper).__name__}, whose layout is not known here; "
            "use ZeRO stage 0-3 in float32 or bfloat16 without ZenFlow or SuperOffload",
            agreed=True,
        )

    def _stage3_slice(self, wrapper: DeepSpeedZeroOptimizer_Stage3, parameter: nn.Parameter) -> Slice | None:
        group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start, length = self._shard(parameter)
        flat = wrapper.fp32_partitioned_groups_flat[group]
        return Slice(start, length, flat.detach().narrow(0, offset, length), flat, offset) if length else None

    def _shard(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First element and number of elements, padding left out, of the own ZeRO-3 shard."""
        size = parameter.ds_tensor.ds_numel
        start = min(self.comm.rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    # ------------------------------------------------------------------ stepping

    def train_mode(self, on: bool) -> None:
        self._engine.train(on)

    def run(self, function: Callable, *arguments):
        return self._engine(function, *arguments)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the accumulation steps and averages over ranks; both are undone, so that
        # gradients add up.
        self._engine.backward(loss * (self._engine.gradient_accumulation_steps() * self.comm.world_size))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self) -> StepInfo:
        norm = None
        if self._transforming:
            norm = self._transform()
        elif self.stage == 0 and self.dtype == torch.float32:
            norm = self._plain_norm()
        self._engine.step()
        for layer in self._layers.values():
            layer.changed()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return StepInfo(float(norm), skipped=not self._engine.was_step_applied())

    def _plain_norm(self) -> Tensor:
        """DeepSpeed reports no norm at stage 0 in float32."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])

    def _transform(self) -> float:
        """Transformed gradients for the layers whose method wants them, and all gradients clipped by the norm
        of before.

        Returns that norm.
        """
        norm = self._norm()
        scale = clip_factor(norm, self._clip)

        def change(layer: AdapterLinear, gradients: Factors, factors: Factors) -> Factors:
            new = gradients | transform(layer, gradients, factors)
            return {factor: scale * gradient for factor, gradient in new.items()}

        self.map_gradients(self._transforming, change)
        clipped = {f"{layer.name}.{factor}" for layer in self._transforming for factor in layer.method.trains}
        for name in self._trained:
            gradient = None if name in clipped else self._gradient(name)
            if gradient is not None:
                self._set_part(name, scale * gradient)
        return norm

    def set_rate(self, rate: float) -> None:
        set_rate(self._optimizer, rate)

    # ------------------------------------------------------------------ gradients at the boundary

    def silent_tensors(self) -> dict[str, str]:
        counts = torch.zeros(len(self._trained), 2, device=self.comm.device)
        for row, name in enumerate(self._trained):
            gradient = self._gradient(name)
            if gradient is not None:
                counts[row, 0] = gradient.count_nonzero()
                counts[row, 1] = (~gradient.isfinite()).sum()
        verdicts = {}
        for name, (nonzero, broken) in zip(self._trained, self.comm.all_reduce(counts).tolist()):
            if broken or not nonzero:
                verdicts[name] = "not finite" if broken else "zero"
        return verdicts

    def clip_factor(self) -> float:
        return clip_factor(self._norm(), self._clip)

    def _norm(self) -> float:
        """L2 norm of all averaged gradients, as they are now."""
        squares = [
            self._gradient(name).double().square().sum() for name in self._trained if self._speaks_for(name)
        ]
        (total,) = self.comm.sum(float(sum(squares)))
        return total**0.5

    def _speaks_for(self, name: str) -> bool:
        """Whether this rank's part counts in a sum over ranks: at stage 0 every rank holds everything, and
        rank 0 speaks.
        """
        return self._slices[name] is not None and (self.stage > 0 or self.comm.is_main)

    def parts(self, layer: AdapterLinear, gradients: bool = False) -> dict[str, Part]:
        names = {factor: f"{layer.name}.{factor}" for factor in layer.method.trains}
        return {
            factor: self._part(name, gradients)
            for factor, name in names.items()
            if self._slices[name] is not None
        }

    def _part(self, name: str, gradients: bool) -> Part:
        own, gradient = self._slices[name], self._gradient(name) if gradients else None
        keys = self.optimizer.moments_in_place() if own.flat in self._optimizer.state else ()
        moments = {key: own.moment(self._optimizer, key) for key in keys}
        if gradient is not None:  # at stage 3 DeepSpeed answers on the accelerator, wherever the master lies
            gradient = gradient.to(own.master.device, torch.float32)
        return Part(own.start, self._speaks_for(name), own.master, gradient, moments)

    def map_gradients(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        for bucket in _buckets(layers, self._cut_up, GRADIENT_BUCKET):
            self._map_bucket(bucket, change)

    def _cut_up(self, layer: AdapterLinear) -> dict[tuple[str, str], int]:
        """Sizes of what a collective has to make whole to change a layer's gradients: those, and at stage 3
        the factors.
        """
        names = [("gradient", factor) for factor in layer.method.trains]
        if self.stage == 3:
            names += [("factor", factor) for factor in layer.method.factor_names]
        return {
            (kind, f"{layer.name}.{factor}"): self._size(f"{layer.name}.{factor}") for kind, factor in names
        }

    def _map_bucket(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        """One collective makes all of a bucket whole; then every rank keeps its own slices of the new
        gradients.
        """
        sizes = {key: size for layer in layers for key, size in self._cut_up(layer).items()}
        flat = torch.zeros(sum(sizes.values()), device=self.comm.device)
        views = dict(zip(sizes, flat.split(list(sizes.values()))))
        for (kind, name), view in views.items():
            if kind == "factor":
                start, length = self._shard(self._parameters[name])
                view[start : start + length] = self._parameters[name].ds_tensor.data[:length]
            elif self._speaks_for(name):
                own = self._slices[name]
                view[own.start : own.start + own.length] = self._gradient(name)
        self.comm.all_reduce(flat)
        whole = {key: view.view(self._shape(key[1])) for key, view in views.items()}
        for layer in layers:
            gradients = {
                factor: whole["gradient", f"{layer.name}.{factor}"] for factor in layer.method.trains
            }
            if self.stage == 3:
                factors = {
                    factor: whole["factor", f"{layer.name}.{factor}"] for factor in layer.method.factor_names
                }
            else:
                factors = {name: factor.detach().float() for name, factor in layer.factors().items()}
            for factor, gradient in change(layer, gradients, factors).items():
                self._set_gradient(f"{layer.name}.{factor}", gradient.float())

    def _gradient(self, name: str) -> Tensor | None:
        """The own slice (length,) of the averaged gradient; None where the rank owns nothing."""
        parameter, own = self._trained[name], self._slices[name]
        if own is None:
            return None
        if self.stage == 0:
            return None if parameter.grad is None else parameter.grad.reshape(-1)
        if self.stage == 3:
            return safe_get_local_grad(parameter)[: own.length]
        return self._fragment_gradient(parameter, own)

    def _fragment_gradient(self, parameter: nn.Parameter, own: Slice) -> Tensor:
        fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        # BF16_Optimizer accumulates the whole tensor on every rank, and steps with its own part of it.
        return (
            fragment.narrow(0, own.start, own.length) if fragment.numel() == parameter.numel() else fragment
        )

    def _set_gradient(self, name: str, gradient: Tensor) -> None:
        """Keeps the own slice of a whole gradient."""
        own = self._slices[name]
        if own is not None:
            self._set_part(name, gradient.reshape(-1)[own.start : own.start + own.length])

    def _set_part(self, name: str, part: Tensor) -> None:
        """Overwrites the own slice of a gradient, (length,); the norm that DeepSpeed clips by follows."""
        parameter, own = self._trained[name], self._slices[name]
        if self.stage == 0:
            parameter.grad.copy_(part.view_as(parameter.grad))
        elif self.stage == 3:
            # The setter wants the padding too.
            padded = torch.zeros(parameter.ds_tensor.ds_numel, device=part.device)
            padded[: own.length] = part
            safe_set_local_grad(parameter, padded)
        else:
            self._fragment_gradient(parameter, own).copy_(part)
            if self._offload:
                # With optimizer offload the norm was taken during backward.
                wrapper = self._engine.optimizer
                wrapper.norm_for_param_grads[wrapper.get_param_id(parameter)] = part.double().norm(2)

    # ------------------------------------------------------------------ passes that train nothing

    @contextmanager
    def probe_pass(self) -> Iterator[None]:
        self._settle()
        yield
        # A frozen embedding stays marked active after a backward pass that did not go through the engine.
        self._settle()

    def run_probe(self, function: Callable, *arguments):
        return self._engine.module(function, *arguments)

    @contextmanager
    def whole_model(self) -> Iterator[bool]:
        if self.stage < 3:
            yield True
            return
        self._settle()
        if not self._fits():
            yield False
            self._settle()
            return
        with (
            deepspeed.zero.GatheredParameters(list(self._parameters.values())),
            _without_hooks(self._engine.module),
        ):
            yield True

    def _fits(self) -> bool:
        """Whether every rank can hold the model whole beside what it holds now."""
        if self.comm.device.type == "cpu":
            return True
        free = get_accelerator().available_memory()
        needed = sum(p.ds_numel * p.element_size() for p in self._parameters.values())
        (too_small,) = self.comm.sum(float(needed > 0.8 * free))
        return not too_small

    def _settle(self) -> None:
        """Releases whatever forward passes left gathered or in flight, so that the next one reads `ds_tensor`
        again.
        """
        if self.stage == 3:
            self._engine.empty_partition_cache()

    # ------------------------------------------------------------------ reading and writing

    def read(self, layer: AdapterLinear) -> Factors:
        return {
            factor: self._read_everywhere(f"{layer.name}.{factor}") for factor in layer.method.factor_names
        }

    def _read_everywhere(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        flat = torch.zeros(self._size(name), dtype=torch.float32, device=self.comm.device)
        if name in self._trained:
            self._place(flat, name, lambda own: own.master)
            return self.comm.all_reduce(flat).view(self._shape(name))
        if self.stage < 3:
            return parameter.detach().clone()
        shards = self.comm.all_gather(parameter.ds_tensor.detach().to(self.comm.device))
        return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)

    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        for factor, value in factors.items():
            self._overwrite(f"{layer.name}.{factor}", value)

    @torch.no_grad()
    def _overwrite(self, name: str, value: Tensor) -> None:
        """Writes a whole tensor into both copies: the low-precision one that forward reads and the own slice
        of the master.
        """
        tell_changed(self._layers, name)
        self._write_low_precision(self._parameters[name], value)
        own = self._slices.get(name)
        if own is not None:
            own.master.copy_(value.reshape(-1)[own.start : own.start + own.length])

    def _write_low_precision(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage < 3:
            parameter.data.copy_(value)
            return
        with self._shard_for_writing(parameter) as (start, shard):
            shard.copy_(value.reshape(-1)[start : start + shard.numel()])

    @contextmanager
    def _shard_for_writing(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """(first element, the own ZeRO-3 shard without padding), such that the next forward pass reads what
        is written.
        """
        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            # Persistent, or left gathered by a forward pass: the next one would read the gathered copy, not
            # the shard.
            self._settle()
        start, length = self._shard(parameter)
        yield start, parameter.ds_tensor.data[:length]
        # hpZ gathers a frozen parameter from its secondary copy, which only a trained one renews by itself.
        parameter.ds_secondary_tensor = None

    @torch.no_grad()
    def add_low_rank(self, layer: AdapterLinear, update: LowRank, rounding: Rounding, key: int) -> float:
        weight, device = layer.weight, self.comm.device
        layer.changed()
        if self.stage < 3:
            error = add_low_rank(weight.data.view(-1), 0, update, rounding, key, device)
            return error if self.comm.is_main else 0.0
        with self._shard_for_writing(weight) as (start, shard):
            return add_low_rank(shard, start, update, rounding, key, device)

    def weight_at_owner(self, layer: AdapterLinear, owner: int) -> Tensor | None:
        weight = layer.weight
        if self.stage < 3:
            return layer.whole_weight() if self.comm.rank == owner else None
        shards = self.comm.gather_to(weight.ds_tensor.detach().to(self.comm.device), owner)
        return layer.whole_weight(torch.cat(shards)[: weight.ds_numel]) if self.comm.rank == owner else None

    @torch.no_grad()
    def weight_from_owner(self, layer: AdapterLinear, owner: int, weight: Tensor | None) -> float:
        stored, error = (
            torch.zeros(layer.packing.elements, dtype=layer.packing.storage, device=self.comm.device),
            0.0,
        )
        failure = None
        try:
            if self.comm.rank == owner:
                stored, error = layer.packed(weight)
        except Exception as problem:  # the others wait in a broadcast: tell them before this rank leaves
            failure = problem
        self.comm.agree(failure)
        for tensor in (stored, *layer.packing.scales()):
            self.comm.broadcast(tensor, owner)
        self._write_low_precision(layer.weight, stored)
        layer.changed()
        return error

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shape(name) for name in self._trained}

    def read_trained(self, name: str) -> dict[str, Tensor] | None:
        # After a restore a rank that owns nothing of any tensor has no state.
        (stateful,) = self.comm.sum(float(bool(self._optimizer.state)))
        moments = self.optimizer.moments() if stateful else ()
        whole = {"master": self._collect(name, lambda own: own.master)}
        for key in moments:
            whole[key] = self._collect(name, lambda own, key=key: own.moment(self._optimizer, key))
        return whole if self.comm.is_main else None

    def _collect(self, name: str, part: Callable[[Slice], Tensor]) -> Tensor:
        """One whole float32 tensor from everyone's slices; what other ranks than 0 get is undefined."""
        flat = torch.zeros(self._size(name), dtype=torch.float32, device=self.comm.device)
        self._place(flat, name, part)
        return self.comm.reduce_to(flat, 0).view(self._shape(name)).cpu()

    def _place(self, flat: Tensor, name: str, part: Callable[[Slice], Tensor]) -> None:
        """Copies the own part to its place, once in the group."""
        if self._speaks_for(name):
            own = self._slices[name]
            flat[own.start : own.start + own.length] = part(own).reshape(-1)

    @torch.no_grad()
    def write_trained(self, name: str, tensors: dict[str, Tensor] | None, steps: int) -> None:
        keys = self.comm.share(list(tensors) if self.comm.is_main else None)
        moments = [key for key in self.optimizer.moments() if key in keys]
        self._overwrite(name, self._from_main(name, tensors, "master"))
        own = self._slices[name]
        if own is not None:
            restore_state(self._optimizer, own.flat, moments, steps)
        for key in moments:
            value = self._from_main(name, tensors, key).reshape(-1)
            if own is not None:
                own.moment(self._optimizer, key).copy_(value[own.start : own.start + own.length])

    def _from_main(self, name: str, tensors: dict[str, Tensor] | None, key: str) -> Tensor:
        value = torch.zeros(self._shape(name), dtype=torch.float32, device=self.comm.device)
        if self.comm.is_main:
            value.copy_(tensors[key])
        return self.comm.broadcast(value, 0)

    def read_parameter(self, name: str) -> Tensor | None:
        parameter = self._parameters[name]
        if self.stage < 3:
            return parameter.detach().cpu() if self.comm.is_main else None
        shards = self.comm.gather_to(parameter.ds_tensor.detach().to(self.comm.device), 0)
        return (
            torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape).cpu()
            if self.comm.is_main
            else None
        )

    @torch.no_grad()
    def write_parameter(self, name: str, value: Tensor | None) -> None:
        whole = torch.zeros(self._shape(name), dtype=self._parameters[name].dtype, device=self.comm.device)
        if self.comm.is_main:
            whole.copy_(value)
        self._overwrite(name, self.comm.broadcast(whole, 0))

    def steps_taken(self) -> int:
        return steps_taken(self._optimizer)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """(tag, value, step) to whatever monitors the DeepSpeed config turns on."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events(events)

    def write_details(self, events: list[tuple[str, float, int]]) -> None:
        board = self._engine.monitor.tb_monitor  # None where it is off, and on other ranks
        if board is not None:
            board.write_events(events)

    def write_image(self, tag: str, image: Tensor, step: int) -> None:
        board = self._engine.monitor.tb_monitor
        if board is not None:
            board.summary_writer.add_image(tag, image.numpy(), step, dataformats="HWC")
            board.flush()

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self._parameters[name]
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def _size(self, name: str) -> int:
        parameter = self._parameters[name]
        return parameter.ds_numel if self.stage == 3 else parameter.numel()


def _whole_slice(master: Tensor) -> Slice:
    return Slice(0, master.numel(), master.detach().view(-1), master, 0)


def _fragment_slice(flats: list[Tensor], parameter: nn.Parameter) -> Slice | None:
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    low, high = fragment.lp_fragment_address, fragment.hp_fragment_address
    return Slice(
        low.start, low.numel, fragment.hp_fragment.detach(), flats[fragment.param_group_index], high.start
    )


def _buckets(
    layers: list[AdapterLinear], sizes: Callable[[AdapterLinear], dict], limit: int
) -> Iterator[list[AdapterLinear]]:
    """Runs of layers whose sizes add up to at most `limit` (or one layer that has more)."""
    bucket, size = [], 0
    for layer in layers:
        elements = sum(sizes(layer).values())
        if bucket and size + elements > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(layer)
        size += elements
    if bucket:
        yield bucket


@contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """Takes every module's hooks away and puts the same ones back: over gathered weights ZeRO's would release
    them.
    """
    tables = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    kept = [(module, table, getattr(module, table)) for module in root.modules() for table in tables]
    try:
        for module, table, hooks in kept:
            setattr(module, table, type(hooks)())
        yield
    finally:
        for module, table, hooks in kept:
            setattr(module, table, hooks)
