"""Whole tensors in and out of a live DeepSpeed engine, however ZeRO has cut them up."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.ledger import Ledger
from distlora.engine.optimizers import OptimizerSpec, restore_state, steps_taken
from distlora.engine.protocol import adapter_layers, tell_changed
from distlora.engine.rehearsal import on_host
from distlora.engine.zero.layout import Slice, base_optimizer, locate, shard_of
from distlora.maths.checksum import bit_sum
from distlora.maths.low_rank import LowRank
from distlora.maths.rounding import Rounding
from distlora.methods import Factors


class ZeroTensors:
    """What of `distlora.engine.protocol.Engine` reads and writes. `_take_over` comes before all else."""

    comm: Comm
    stage: int
    ledger: Ledger | None = None

    def _take_over(self, engine: DeepSpeedEngine, model: nn.Module, optimizer: OptimizerSpec) -> None:
        """engine: which trains what requires a gradient in `model` now. model: the bare one."""
        self._engine, self.module, self.optimizer = engine, model, optimizer
        self.layers = adapter_layers(model)
        self._parameters = dict(model.named_parameters())
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._slices = locate(engine.optimizer, self._trained, self.comm.rank)
        self._optimizer = base_optimizer(engine)

    def _settle(self) -> None:
        """Releases whatever forward passes left gathered or in flight, so that the next one reads `ds_tensor`
        again.
        """
        if self.stage == 3:
            self._engine.empty_partition_cache()

    def _speaks_for(self, name: str) -> bool:
        """Whether this rank's part counts in a sum over ranks: at stage 0 every rank holds everything, and
        rank 0 speaks.
        """
        return self._slices[name] is not None and (self.stage > 0 or self.comm.is_main)

    # ------------------------------------------------------------------ reading and writing

    def read(self, layer: AdapterLinear) -> Factors:
        return {factor: self._read_everywhere(f"{layer.name}.{factor}") for factor in layer.factors()}

    def _read_everywhere(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        flat = torch.zeros(self._size(name), dtype=torch.float32, device=self.comm.device)
        if name in self._trained:
            self._place(flat, name, lambda own: own.master)
            return self.comm.all_reduce(flat).view(self._shape(name))
        if self.stage < 3:
            return parameter.detach().clone()
        return self._joined(parameter).view(parameter.ds_shape)

    def _joined(self, parameter: nn.Parameter) -> Tensor:
        """A parameter of stage 3, flat and without padding, on every rank."""
        shards = self.comm.all_gather(parameter.ds_tensor.detach().to(self.comm.device))
        return shards.view(-1)[: parameter.ds_numel]

    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        for factor, value in factors.items():
            self._overwrite(f"{layer.name}.{factor}", value)

    @torch.no_grad()
    def _overwrite(self, name: str, value: Tensor) -> None:
        """Writes a whole tensor into both copies: the low-precision one that forward reads and the own slice
        of the master.
        """
        tell_changed(self.layers, name)
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

    def _own_storage(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies in host memory of what this rank stores of the named parameters as forward passes read them.
        Not collective.
        """
        self._settle()
        return {name: on_host(self._stored(self._parameters[name])) for name in names}

    def _stored(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.data
        return parameter.ds_tensor.data[: shard_of(parameter, self.comm.rank)[1]]

    @torch.no_grad()
    def _put_back(self, stored: dict[str, Tensor]) -> None:
        """Puts back what `_own_storage` gave. Not collective."""
        for name, value in stored.items():
            parameter = self._parameters[name]
            if self.stage < 3:
                parameter.data.copy_(value)
            else:
                with self._shard_for_writing(parameter) as (_, shard):
                    shard.copy_(value)

    @contextmanager
    def _shard_for_writing(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """(first element, the own ZeRO-3 shard without padding), such that the next forward pass reads what
        is written.
        """
        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            # Persistent, or left gathered by a forward pass: the next one would read the gathered copy, not
            # the shard.
            self._settle()
        start, length = shard_of(parameter, self.comm.rank)
        yield start, parameter.ds_tensor.data[:length]
        # hpZ gathers a frozen parameter from its secondary copy, which only a trained one renews by itself.
        parameter.ds_secondary_tensor = None

    @torch.no_grad()
    def add_low_rank(self, layer: AdapterLinear, update: LowRank, rounding: Rounding, key: int) -> float:
        weight, device = layer.weight, self.comm.device
        layer.changed()
        if self.stage < 3:
            error = layer.add_to_part(weight.data.view(-1), 0, update, rounding, key, device)
            return error if self.comm.is_main else 0.0
        with self._shard_for_writing(weight) as (start, shard):
            return layer.add_to_part(shard, start, update, rounding, key, device)

    def weight_at_owner(self, layer: AdapterLinear, owner: int) -> Tensor | None:
        weight = layer.weight
        if self.stage < 3:
            return layer.whole_weight() if self.comm.rank == owner else None
        joined = self._joined(weight)
        return layer.whole_weight(joined) if self.comm.rank == owner else None

    def weight_checksum(self, layer: AdapterLinear) -> int:
        weight = layer.weight
        if self.stage < 3:
            return int(bit_sum(weight))
        _, length = shard_of(weight, self.comm.rank)
        own = bit_sum(weight.ds_tensor.data[:length]).to(self.comm.device)
        return int(self.comm.all_reduce(own))

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
        joined = self._joined(parameter).view(parameter.ds_shape)
        return joined.cpu() if self.comm.is_main else None

    @torch.no_grad()
    def write_parameter(self, name: str, value: Tensor | None) -> None:
        whole = torch.zeros(self._shape(name), dtype=self._parameters[name].dtype, device=self.comm.device)
        if self.comm.is_main:
            whole.copy_(value)
        self._overwrite(name, self.comm.broadcast(whole, 0))

    def steps_taken(self) -> int:
        return steps_taken(self._optimizer)

    def engine_steps(self) -> int:
        return self._engine.global_steps

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self._parameters[name]
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def _size(self, name: str) -> int:
        parameter = self._parameters[name]
        return parameter.ds_numel if self.stage == 3 else parameter.numel()
