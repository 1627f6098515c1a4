"""The engine in plain PyTorch on one process. It defines the meaning that the others are tested against."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distlora.adapter.layer import AdapterLinear
from distlora.engine import boundary
from distlora.engine.comm import Comm
from distlora.engine.gradient_sums import sum_in_float32
from distlora.engine.ledger import Ledger
from distlora.engine.optimizers import OptimizerSpec, moment_of, restore_state, set_rate, spec_of, steps_taken
from distlora.engine.protocol import (
    GradientMap,
    Part,
    StepInfo,
    adapter_layers,
    clip_factor,
    left_factors,
    tell_changed,
    transforming,
)
from distlora.engine.rehearsal import Kept
from distlora.errors import UserError
from distlora.maths.checksum import bit_sum
from distlora.maths.low_rank import LowRank
from distlora.maths.rounding import Rounding
from distlora.methods import Factors


class LocalEngine:
    """Plain PyTorch on one process. Defines the meaning that the others are tested against.

    dtype bfloat16: the forward pass uses bfloat16 parameters, the optimizer float32 masters of them.
    Gradients are summed in float32.
    """

    def __init__(self, comm: Comm, dtype: torch.dtype = torch.float32, clip: float | None = None):
        self.comm, self.dtype, self.clip = comm, dtype, clip
        self.ledger: Ledger | None = None

    @classmethod
    def around(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None
    ) -> "LocalEngine":
        """A model that the user trains with an optimizer of his own, which has no masters beside the
        parameters: of this engine only the methods that read, write, probe and look at gradients are for use.

        clip: norm to which gradients are to be clipped where a method transforms them. Errors: UserError for
        several ranks, an optimizer that lacks a trained parameter, and one whose state is not known here.
        """
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trained:
            raise UserError("no parameter of the model requires a gradient, so there is nothing to train")
        layers = adapter_layers(model).values()
        first = next((layer.weight for layer in layers), next(iter(trained.values())))
        if first.dtype == torch.float16:
            raise UserError(
                "float16 needs scaled gradients, which are not supported; use bfloat16 or float32"
            )
        comm = Comm.of_running_group(first.device)
        if comm.world_size > 1:
            raise UserError(
                f"{comm.world_size} ranks need DeepSpeed: hand over the engine of deepspeed.initialize"
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, parameter in trained.items() if id(parameter) not in held]
        if missing:
            raise UserError(
                f"the optimizer does not train {missing[0]} ({len(missing)} of {len(trained)} trained "
                "parameters): attach before it is made, and give it every parameter that requires a gradient"
            )
        self = cls(comm, first.dtype, clip)
        self._take_over(model, spec_of(optimizer), trained, optimizer)
        return self

    @contextmanager
    def loading(self, whole: bool = False) -> Iterator[bool]:
        yield False

    def attaching(self) -> AbstractContextManager:
        return nullcontext()

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        model = model.to(self.comm.device)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in trained.items()
        }
        sum_in_float32(trained.values())
        built = optimizer.build(optimizer.groups(masters, left_factors(adapter_layers(model))))
        self._take_over(model, optimizer, masters, built)

    def _take_over(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        masters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.module, self.optimizer, self._masters, self._optimizer = model, spec, masters, optimizer
        self.layers = adapter_layers(model)
        self._parameters = dict(model.named_parameters())
        self._trained = {name: self._parameters[name] for name in masters}

    def train_mode(self, on: bool) -> None:
        self.module.train(on)

    def run(self, function: Callable, *arguments):
        return function(self.module, *arguments)

    run_probe = run

    # ------------------------------------------------------------------ stepping

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        loss.backward()

    def at_boundary(self) -> bool:
        return True

    def step(self) -> StepInfo:
        norm = self._total_norm()
        for name, parameter in self._trained.items():
            if self._masters[name] is not parameter and parameter.grad is not None:
                self._masters[name].grad, parameter.grad = parameter.grad.float(), None
        if self.clip and not transforming(self.layers):
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self.clip, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])
        return StepInfo(float(norm))

    def drop_step(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None

    def release(self) -> None:
        return

    def set_rate(self, rate: float) -> None:
        set_rate(self._optimizer, rate)

    @contextmanager
    def rehearsal(self) -> Iterator[Callable[[], None]]:
        kept = Kept(self.comm.device, self._optimizer, self._masters.values())
        kept.keep(p for name, p in self._trained.items() if self._masters[name] is not p)

        def take_back() -> None:
            kept.put_back()
            boundary.after_step(self)

        yield take_back
        take_back()

    def silent_tensors(self) -> dict[str, str]:
        verdicts = {name: _verdict(p.grad) for name, p in self._trained.items()}
        return {name: verdict for name, verdict in verdicts.items() if verdict}

    def map_gradients(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        for layer in layers:
            trained = {name: getattr(layer, name) for name in layer.method.trains}
            for parameter in trained.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            gradients = {name: parameter.grad.float() for name, parameter in trained.items()}
            factors = {name: factor.detach().float() for name, factor in layer.factors().items()}
            for name, gradient in change(layer, gradients, factors).items():
                trained[name].grad.copy_(gradient)

    def scale_gradients(self, factor: float, but: Collection[str] = ()) -> None:
        for name, parameter in self._trained.items():
            if name not in but and parameter.grad is not None:
                parameter.grad.mul_(factor)

    def gradient_norm(self) -> float:
        return float(self._total_norm())

    def clip_factor(self) -> float:
        return clip_factor(self.gradient_norm(), self.clip)

    def _total_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(
            [p.grad.float() for p in self._trained.values() if p.grad is not None]
        )

    def parts(self, layer: AdapterLinear, gradients: bool = False) -> dict[str, Part]:
        return {factor: self._part(f"{layer.name}.{factor}", gradients) for factor in layer.method.trains}

    def _part(self, name: str, gradients: bool) -> Part:
        gradient, master = self._trained[name].grad if gradients else None, self._masters[name]
        moments = self._moments(name, self.optimizer.moments_in_place())
        return Part(
            0,
            True,
            master.detach().view(-1),
            None if gradient is None else gradient.float().view(-1),
            moments,
        )

    @contextmanager
    def probe_pass(self) -> Iterator[None]:
        yield

    @contextmanager
    def whole_model(self) -> Iterator[bool]:
        yield True

    #: The plain engine has no monitor beyond the run's own metrics file.
    monitored = False

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """See `monitored`."""

    def on_board(self, action: Callable[[Any], object]) -> None:
        """See `monitored`."""

    # ------------------------------------------------------------------ reading and writing

    def read(self, layer: AdapterLinear) -> Factors:
        return {name: self._best_copy(f"{layer.name}.{name}").detach().clone() for name in layer.factors()}

    @torch.no_grad()
    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        for name, value in factors.items():
            self._overwrite(f"{layer.name}.{name}", value)

    def add_low_rank(self, layer: AdapterLinear, update: LowRank, rounding: Rounding, key: int) -> float:
        layer.changed()
        return layer.add_to_part(layer.weight.detach().view(-1), 0, update, rounding, key, self.comm.device)

    def weight_at_owner(self, layer: AdapterLinear, owner: int) -> Tensor | None:
        return layer.whole_weight()

    def weight_checksum(self, layer: AdapterLinear) -> int:
        return int(bit_sum(layer.weight))

    @torch.no_grad()
    def weight_from_owner(self, layer: AdapterLinear, owner: int, weight: Tensor | None) -> float:
        stored, error = layer.packed(weight)
        layer.weight.copy_(stored)
        layer.changed()
        return error

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._trained.items()}

    def read_trained(self, name: str) -> dict[str, Tensor] | None:
        master = self._masters[name]
        moments = {
            key: moment.view_as(master)
            for key, moment in self._moments(name, self.optimizer.moments()).items()
        }
        tensors = {"master": master, **moments}
        return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}

    def _moments(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """(n,) each; none before the first step."""
        master = self._masters[name]
        return (
            {key: moment_of(self._optimizer, master, key) for key in keys}
            if self._optimizer.state.get(master)
            else {}
        )

    @torch.no_grad()
    def write_trained(self, name: str, tensors: dict[str, Tensor] | None, steps: int) -> None:
        self._overwrite(name, tensors["master"])
        moments = [key for key in self.optimizer.moments() if key in tensors]
        state = restore_state(self._optimizer, self._masters[name], moments, steps)
        for key in moments:
            state[key].copy_(tensors[key])

    def read_parameter(self, name: str) -> Tensor | None:
        return self._parameters[name].detach().to("cpu", copy=True)

    @torch.no_grad()
    def write_parameter(self, name: str, value: Tensor | None) -> None:
        self._overwrite(name, value)

    def steps_taken(self) -> int:
        return steps_taken(self._optimizer)

    def engine_steps(self) -> int:
        return steps_taken(self._optimizer)

    def _best_copy(self, name: str) -> Tensor:
        return self._masters.get(name, self._parameters[name])

    def _overwrite(self, name: str, value: Tensor) -> None:
        self._parameters[name].copy_(value)
        if name in self._masters:
            self._masters[name].copy_(value)
        tell_changed(self.layers, name)


def _verdict(gradient: Tensor | None) -> str | None:
    if gradient is None or not gradient.any():
        return "zero"
    return None if bool(gradient.isfinite().all()) else "not finite"
