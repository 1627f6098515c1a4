"""What it means to train: the engine's protocol, and its plain PyTorch form, which is the reference for every other.

An engine owns the live model. It can run it, step its optimizer, and read and write layers as whole tensors, however they are
laid out. `loss` handed to `backward` is this micro-batch's share of the loss of the *global* batch; gradients add up over
micro-batches and ranks, and nothing is divided afterwards.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from distlora.comm import Comm
from distlora.fusing import add_low_rank
from distlora.layer import AdapterLinear
from distlora.methods import Factors, LowRank
from distlora.optimizer import OptimizerSpec, moment_of, restore_state, set_rate, steps_taken
from distlora.rounding import Rounding

#: A change of gradients: from (layer, gradients of its trained factors, all its factors as the forward pass uses them) to new
#: gradients; whole tensors in float32. A factor that is left out of the answer keeps its gradient.
GradientMap = Callable[[AdapterLinear, Factors, Factors], Factors]


@dataclass(frozen=True)
class StepInfo:
    """grad_norm: L2 norm of the whole averaged gradient, before the method transformed it and before clipping. skipped: the
    optimizer refused the step."""

    grad_norm: float
    skipped: bool = False


@dataclass(frozen=True)
class Part:
    """The part of one trained tensor that lies on this rank: elements [start, start + n) of the row-major tensor.

    counted: whether a sum over ranks counts it (where every rank holds the whole, rank 0's counts). master: (n,) float32 view
    of what the optimizer steps from. gradient: (n,) float32, averaged, not yet clipped; None unless asked for. moments: (n,)
    views of the optimizer's state, empty before its first step and where it keeps 8-bit numbers. All on one device (the host
    where the optimizer is offloaded). Views may be changed in place.
    """

    start: int
    counted: bool
    master: Tensor
    gradient: Tensor | None
    moments: dict[str, Tensor]


class Engine(Protocol):
    """See the module's docstring. Every method is collective: all ranks call it, in the same order, with equal arguments."""

    module: nn.Module
    comm: Comm
    dtype: torch.dtype
    optimizer: OptimizerSpec

    def loading(self, whole: bool = False) -> AbstractContextManager:
        """Under which pretrained weights are read (ZeRO-3: each rank keeps its part only, unless they are wanted whole)."""

    def attaching(self) -> AbstractContextManager:
        """Under which adapter layers are made."""

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        """Takes the model over; what requires a gradient now is what is trained."""

    def train_mode(self, on: bool) -> None: ...

    def run(self, function: Callable, *arguments):
        """`function(module, *arguments)` as the forward pass of a training step or an evaluation."""

    def run_probe(self, function: Callable, *arguments):
        """The same inside `probe_pass`, with any backward pass called on the result by hand."""

    def backward(self, loss: Tensor) -> None:
        """Adds d(loss) to the gradients. Exactly `accumulation` calls come between two steps."""

    def step(self) -> StepInfo:
        """Lets methods that transform gradients do so, clips, steps the optimizer, forgets the gradients.

        The clipping coefficient is `clip_factor()` of the gradients as they are on entry, and multiplies what was made of them.
        """

    def set_rate(self, rate: float) -> None: ...

    def silent_tensors(self) -> dict[str, str]:
        """After the last backward, before the step: trained tensors whose averaged gradient is wrong, as {name: "zero" or
        "not finite"}."""

    def map_gradients(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        """Replaces averaged gradients after the last backward, before the step, which then knows only the new ones."""

    def clip_factor(self) -> float:
        """After the last backward, before the step: what clipping is going to multiply every gradient by."""

    def parts(self, layer: AdapterLinear, gradients: bool = False) -> dict[str, Part]:
        """This rank's parts of a layer's trained factors; a factor of which it holds nothing is left out. Not collective.

        gradients: with their gradients, which are there after the last backward, before the step.
        """

    def probe_pass(self) -> AbstractContextManager:
        """Around forward and backward passes that train nothing; no counter of the engine moves."""

    def whole_model(self) -> AbstractContextManager[bool]:
        """Around no-gradient passes over the bare model (`module`), with every parameter gathered once if that fits.

        Yields False where it does not fit: then each layer is gathered as it is needed, and all ranks must make the same passes.
        Nothing may be written inside.
        """

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """(tag, value, step) to the engine's monitors; rank 0's are kept."""

    def write_details(self, events: list[tuple[str, float, int]]) -> None:
        """The same for a tag of every layer, to TensorBoard alone: other monitors keep a file or a chart for each tag."""

    def write_image(self, tag: str, image: Tensor, step: int) -> None:
        """image: (height, width, 3) uint8, to the engine's monitors that take pictures; rank 0's is kept."""

    def read(self, layer: AdapterLinear) -> Factors:
        """All factors, whole, on every rank: float32 masters of the trained ones, the others as the forward uses them."""

    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        """Writes whole factors into every copy: what the next forward reads, and what the optimizer steps from."""

    def add_low_rank(self, layer: AdapterLinear, update: LowRank, rounding: Rounding, key: int) -> float:
        """`W ← round(W + left @ right)` of a frozen weight that is not packed: every rank works on its own part, none travels.

        key: of the draws of stochastic rounding. Returns this rank's share of the squared rounding error; the shares add up.
        """

    def weight_at_owner(self, layer: AdapterLinear, owner: int) -> Tensor | None:
        """W (out, in) in float32 on rank `owner`, None elsewhere."""

    def weight_from_owner(self, layer: AdapterLinear, owner: int, weight: Tensor | None) -> float:
        """Packs a packed weight anew, from what rank `owner` brings: (out, in), float32. What travels is the packed form.

        Returns the squared error of packing on the owner, 0 elsewhere.
        """

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all trained tensors by name, in one order on every rank."""

    def read_trained(self, name: str) -> dict[str, Tensor] | None:
        """On rank 0 the whole "master" and, once there are any, the optimizer's moments, float32 on the CPU; None elsewhere."""

    def write_trained(self, name: str, tensors: dict[str, Tensor] | None, steps: int) -> None:
        """Rank 0 brings what `read_trained` gave: every copy and the moments are overwritten (those that are not given are
        forgotten), and the optimizer's count becomes `steps`."""

    def read_parameter(self, name: str) -> Tensor | None:
        """Any parameter as the forward pass uses it, whole, on rank 0's CPU; None elsewhere."""

    def write_parameter(self, name: str, value: Tensor | None) -> None:
        """Overwrites a frozen parameter with rank 0's value."""

    def steps_taken(self) -> int:
        """The optimizer's own step count."""


class LocalEngine:
    """Plain PyTorch on one process. Defines the meaning that the others are tested against.

    dtype bfloat16: the forward pass uses bfloat16 parameters, the optimizer float32 masters of them.
    """

    def __init__(self, comm: Comm, dtype: torch.dtype = torch.float32, clip: float | None = None):
        self.comm, self.dtype, self.clip = comm, dtype, clip

    @contextmanager
    def loading(self, whole: bool = False) -> Iterator[None]:
        yield

    def attaching(self) -> AbstractContextManager:
        return nullcontext()

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        self.module = model.to(self.comm.device)
        self._parameters = dict(self.module.named_parameters())
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in self._trained.items()
        }
        self.optimizer = optimizer
        self._layers = adapter_layers(self.module)
        self._transforming = transforming(self._layers)
        self._optimizer = optimizer.build(optimizer.groups(self._masters, left_factors(self._layers)))

    def train_mode(self, on: bool) -> None:
        self.module.train(on)

    def run(self, function: Callable, *arguments):
        return function(self.module, *arguments)

    run_probe = run

    # ------------------------------------------------------------------ stepping

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        norm = self._norm()
        self.map_gradients(self._transforming, transform)
        for name, parameter in self._trained.items():
            if self._masters[name] is not parameter and parameter.grad is not None:
                self._masters[name].grad, parameter.grad = parameter.grad.float(), None
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self.clip, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])
        for layer in self._layers.values():
            layer.changed()
        return StepInfo(float(norm))

    def set_rate(self, rate: float) -> None:
        set_rate(self._optimizer, rate)

    def silent_tensors(self) -> dict[str, str]:
        verdicts = {name: _verdict(p.grad) for name, p in self._trained.items()}
        return {name: verdict for name, verdict in verdicts.items() if verdict}

    def map_gradients(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        for layer in layers:
            trained = {name: getattr(layer, name) for name in layer.method.trains}
            for parameter in trained.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = {name: parameter.grad.float() for name, parameter in trained.items()}
            factors = {name: factor.detach().float() for name, factor in layer.factors().items()}
            for name, gradient in change(layer, gradients, factors).items():
                trained[name].grad.copy_(gradient)

    def clip_factor(self) -> float:
        return clip_factor(float(self._norm()), self.clip)

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad.float() for p in self._trained.values() if p.grad is not None])

    def parts(self, layer: AdapterLinear, gradients: bool = False) -> dict[str, Part]:
        return {factor: self._part(f"{layer.name}.{factor}", gradients) for factor in layer.method.trains}

    def _part(self, name: str, gradients: bool) -> Part:
        gradient, master = self._trained[name].grad if gradients else None, self._masters[name]
        moments = self._moments(name, self.optimizer.moments_in_place())
        return Part(0, True, master.detach().view(-1), None if gradient is None else gradient.float().view(-1), moments)

    @contextmanager
    def probe_pass(self) -> Iterator[None]:
        yield

    @contextmanager
    def whole_model(self) -> Iterator[bool]:
        yield True

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """The plain engine has no monitor beyond the run's own metrics file."""

    write_details = write_events

    def write_image(self, tag: str, image: Tensor, step: int) -> None:
        """See `write_events`."""

    # ------------------------------------------------------------------ reading and writing

    def read(self, layer: AdapterLinear) -> Factors:
        return {name: self._best_copy(f"{layer.name}.{name}").detach().clone() for name in layer.method.factor_names}

    @torch.no_grad()
    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        for name, value in factors.items():
            self._overwrite(f"{layer.name}.{name}", value)

    def add_low_rank(self, layer: AdapterLinear, update: LowRank, rounding: Rounding, key: int) -> float:
        layer.changed()
        return add_low_rank(layer.weight.detach().view(-1), 0, update, rounding, key, self.comm.device)

    def weight_at_owner(self, layer: AdapterLinear, owner: int) -> Tensor | None:
        return layer.whole_weight()

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
        moments = {key: moment.view_as(master) for key, moment in self._moments(name, self.optimizer.moments()).items()}
        tensors = {"master": master, **moments}
        return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}

    def _moments(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """(n,) each; none before the first step."""
        master = self._masters[name]
        return {key: moment_of(self._optimizer, master, key) for key in keys} if self._optimizer.state.get(master) else {}

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

    def _best_copy(self, name: str) -> Tensor:
        return self._masters.get(name, self._parameters[name])

    def _overwrite(self, name: str, value: Tensor) -> None:
        self._parameters[name].copy_(value)
        if name in self._masters:
            self._masters[name].copy_(value)
        tell_changed(self._layers, name)


def adapter_layers(module: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers of a bare model, by name."""
    return {layer.name: layer for layer in module.modules() if isinstance(layer, AdapterLinear)}


def tell_changed(layers: dict[str, AdapterLinear], parameter: str) -> None:
    """Tells the layer that has this parameter, if there is one, that it has another value now."""
    layer = layers.get(parameter.rpartition(".")[0])
    if layer is not None:
        layer.changed()


def left_factors(layers: dict[str, AdapterLinear]) -> set[str]:
    """Names of the trained factors that LoRA+ calls B."""
    return {f"{name}.{layer.method.left_factor}" for name, layer in layers.items() if layer.method.left_factor}


def clip_factor(norm: float, clip: float | None) -> float:
    """What clipping to the norm `clip` multiplies gradients of this norm by, in torch's and DeepSpeed's form."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def transforming(layers: dict[str, AdapterLinear]) -> list[AdapterLinear]:
    """The layers whose method transforms gradients, in the model's order."""
    return [layer for layer in layers.values() if layer.method.transforms_gradients]


def transform(layer: AdapterLinear, gradients: Factors, factors: Factors) -> Factors:
    """The method's own change of gradients, as a GradientMap."""
    return layer.method.transform_gradients(gradients, factors)


def _verdict(gradient: Tensor | None) -> str | None:
    if gradient is None or not gradient.any():
        return "zero"
    return None if bool(gradient.isfinite().all()) else "not finite"
