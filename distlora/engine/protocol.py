"""What it means to train: the protocol of an engine.

An engine owns the live model. It can run it, step its optimizer, and read and write layers as whole tensors,
however they are laid out. `loss` handed to `backward` is this micro-batch's share of the loss of the *global*
batch; gradients add up over micro-batches and ranks, and nothing is divided afterwards.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.optimizers import OptimizerSpec
from distlora.maths.low_rank import LowRank
from distlora.maths.rounding import Rounding
from distlora.methods import Factors, TransformsGradients, last_trained_factor

if TYPE_CHECKING:
    from distlora.engine.ledger import Ledger

#: A change of gradients: from (layer, gradients of its trained factors, all its factors as the forward pass
#: uses them) to new gradients; whole tensors in float32. A factor that is left out of the answer keeps its
#: gradient.
GradientMap = Callable[[AdapterLinear, Factors, Factors], Factors]


@dataclass(frozen=True)
class StepInfo:
    """grad_norm: L2 norm of the whole averaged gradient, before the method transformed it and before
    clipping. skipped: the optimizer refused the step."""

    grad_norm: float
    skipped: bool = False


@dataclass(frozen=True)
class Part:
    """The part of one trained tensor that lies on this rank: elements [start, start + n) of the row-major
    tensor.

    counted: whether a sum over ranks counts it (where every rank holds the whole, rank 0's counts). master:
    (n,) float32 view of what the optimizer steps from. gradient: (n,) float32, averaged, not yet clipped;
    None unless asked for. moments: (n,) views of the optimizer's state, empty before its first step and where
    it keeps 8-bit numbers. All on one device (the host where the optimizer is offloaded). Views may be
    changed in place.
    """

    start: int
    counted: bool
    master: Tensor
    gradient: Tensor | None
    moments: dict[str, Tensor]


class Engine(Protocol):
    """See the module's docstring. Every method is collective: all ranks call it, in the same order, with
    equal arguments.
    """

    module: nn.Module
    comm: Comm
    dtype: torch.dtype
    optimizer: OptimizerSpec
    #: Norm to which gradients are clipped, by `step` or, where a method transforms them, before it; None:
    #: not.
    clip: float | None
    #: The adapted layers by name, once the engine has started.
    layers: dict[str, AdapterLinear]
    #: What was added to frozen weights; None before `open_ledger`.
    ledger: "Ledger | None"

    def loading(self, whole: bool = False) -> AbstractContextManager[bool]:
        """Under which pretrained weights are read (ZeRO-3: each rank keeps its part only, unless they are
        wanted whole). Yields whether that is collective.
        """

    def attaching(self) -> AbstractContextManager:
        """Under which adapter layers are made."""

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        """Takes the model over; what requires a gradient now is what is trained."""

    def train_mode(self, on: bool) -> None: ...

    def run(self, function: Callable, *arguments):
        """`function(module, *arguments)` as the forward pass of a training step or an evaluation."""

    def run_probe(self, function: Callable, *arguments):
        """The same inside `probe_pass`, with any backward pass called on the result by hand."""

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        """Adds d(loss) to the gradients. last: whether it is the last call before a step; None: exactly
        `accumulation` calls come between two steps.
        """

    def at_boundary(self) -> bool:
        """After a backward pass: whether the gradients of a whole step have been added up."""

    def step(self) -> StepInfo:
        """Clips by `clip_factor()`, unless a method has transformed the gradients, steps the optimizer, and
        forgets the gradients. See `distlora.engine.boundary` for what comes before and after.
        """

    def drop_step(self) -> None:
        """In the place of `step`: forgets the gradients. Weights, moments and generators stay as they are, to
        the bit. Under ZeRO every rank holds its own part of these in host memory meanwhile.
        """

    def release(self) -> None:
        """Lets go of the model, for another engine in this process. Nothing else is called after that."""

    def set_rate(self, rate: float) -> None: ...

    def rehearsal(self) -> AbstractContextManager[Callable[[], None]]:
        """Around training steps that are taken back, before the first step that counts.

        Yields what takes them back: parameters, masters, the optimizer's state, generators and counters are
        what they were when the context was entered, to the bit. It is called between whole steps, and at the
        end by itself; an exception passes through as it is. Nothing but steps and evaluations belongs inside.
        Every rank keeps its own part, in host memory.
        """

    def silent_tensors(self) -> dict[str, str]:
        """After the last backward, before the step: trained tensors whose averaged gradient is wrong, as
        {name: "zero" or "not finite"}."""

    def map_gradients(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        """Replaces averaged gradients after the last backward, before the step, which then knows only the new
        ones.
        """

    def scale_gradients(self, factor: float, but: Collection[str] = ()) -> None:
        """Multiplies all averaged gradients but those of the named tensors."""

    def gradient_norm(self) -> float:
        """L2 norm of all averaged gradients, as they are now."""

    def clip_factor(self) -> float:
        """After the last backward, before the step: what clipping is going to multiply every gradient by."""

    def parts(self, layer: AdapterLinear, gradients: bool = False) -> dict[str, Part]:
        """This rank's parts of a layer's trained factors; a factor of which it holds nothing is left out. Not
        collective.

        gradients: with their gradients, which are there after the last backward, before the step.
        """

    def probe_pass(self) -> AbstractContextManager:
        """Around forward and backward passes that train nothing; no counter of the engine moves."""

    def whole_model(self) -> AbstractContextManager[bool]:
        """Around no-gradient passes over the bare model (`module`), with every parameter gathered once if
        that fits.

        Yields False where it does not fit: then each layer is gathered as it is needed, and all ranks must
        make the same passes. Nothing may be written inside.
        """

    @property
    def monitored(self) -> bool:
        """Whether the engine was told to have any monitor; the same on all ranks."""

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """(tag, value, step) to the engine's monitors; rank 0's are kept. What fails there raises nothing."""

    def on_board(self, action: Callable[[Any], object]) -> None:
        """Calls `action` with TensorBoard's `SummaryWriter` where the engine has one, which is on rank 0
        alone. What fails there raises nothing.
        """

    def read(self, layer: AdapterLinear) -> Factors:
        """All factors, whole, on every rank: float32 masters of the trained ones, the others as the forward
        uses them.
        """

    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        """Writes whole factors into every copy: what the next forward reads, and what the optimizer steps
        from.
        """

    def add_low_rank(self, layer: AdapterLinear, update: LowRank, rounding: Rounding, key: int) -> float:
        """`W ← round(W + left @ right)` of a frozen weight that is not packed: every rank works on its own
        part, none travels.

        key: of the draws of stochastic rounding. Returns this rank's share of the squared rounding error; the
        shares add up.
        """

    def weight_at_owner(self, layer: AdapterLinear, owner: int) -> Tensor | None:
        """W (out, in) in float32 on rank `owner`, None elsewhere."""

    def weight_checksum(self, layer: AdapterLinear) -> int:
        """Of the bits of a frozen weight that is not packed, the same at every stage and world size."""

    def weight_from_owner(self, layer: AdapterLinear, owner: int, weight: Tensor | None) -> float:
        """Packs a packed weight anew, from what rank `owner` brings: (out, in), float32. What travels is the
        packed form.

        Returns the squared error of packing on the owner, 0 elsewhere.
        """

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all trained tensors by name, in one order on every rank."""

    def read_trained(self, name: str) -> dict[str, Tensor] | None:
        """On rank 0 the whole "master" and, once there are any, the optimizer's moments, float32 on the CPU;
        None elsewhere.
        """

    def write_trained(self, name: str, tensors: dict[str, Tensor] | None, steps: int) -> None:
        """Rank 0 brings what `read_trained` gave: every copy and the moments are overwritten (those that are
        not given are forgotten), and the optimizer's count becomes `steps`."""

    def read_parameter(self, name: str) -> Tensor | None:
        """Any parameter as the forward pass uses it, whole, on rank 0's CPU; None elsewhere."""

    def write_parameter(self, name: str, value: Tensor | None) -> None:
        """Overwrites a frozen parameter with rank 0's value."""

    def steps_taken(self) -> int:
        """The optimizer's own step count."""

    def engine_steps(self) -> int:
        """Steps that this engine has made itself, whatever was restored into it."""


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
    last = {name: last_trained_factor(layer.method) for name, layer in layers.items()}
    return {f"{name}.{factor}" for name, factor in last.items() if factor is not None}


def clip_factor(norm: float, clip: float | None) -> float:
    """What clipping to `clip` multiplies gradients of this norm by, in torch's and DeepSpeed's form."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def transforming(layers: dict[str, AdapterLinear]) -> list[AdapterLinear]:
    """The layers whose method transforms gradients, in the model's order."""
    return [layer for layer in layers.values() if isinstance(layer.method, TransformsGradients)]
