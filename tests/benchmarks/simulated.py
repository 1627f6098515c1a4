"""One rank of ZeRO-3 whose tensors have shapes but no memory: a 7B model's run fits on any machine.

Used under `FakeTensorMode`. The rank holds 1/world of every large parameter; a module's own parameters are
whole inside its own forward and backward passes only. Collectives exchange nothing, since nothing has values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm, Course
from distlora.engine.optimizers import OptimizerSpec, set_rate
from distlora.engine.protocol import StepInfo, adapter_layers
from distlora.methods import Factors

#: Smaller parameters stay whole on every rank, as under DeepSpeed's default of
#: stage3_param_persistence_threshold.
PERSISTENT_ELEMENTS = 100_000


class Guesses(TorchDispatchMode):
    """Answers where a program asks for values that fake tensors do not have.

    `a <= b` holds (an iteration that waits for convergence ends) and no other comparison does, each number
    read is larger than the last (a search for the least loss ends soon), and `nonzero` finds `response`
    elements (the tokens that have a loss).
    """

    def __init__(self, response: int):
        super().__init__()
        self._response, self._numbers = response, 0.0
        self._holding = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((self._response, args[0].ndim), dtype=torch.int64)
        try:
            result = operation(*args, **(kwargs or {}))
            if operation is torch.ops.aten.le.Tensor:
                self._holding[result] = True
            return result
        except DataDependentOutputException:
            if args[0].dtype == torch.bool:
                return args[0] in self._holding
            self._numbers += 1
            return int(self._numbers) if not args[0].dtype.is_floating_point else self._numbers


class SilentComm(Comm):
    """Rank 0 of a group whose other ranks do not exist."""

    def __init__(self, world_size: int):
        self.rank, self.world_size, self.local_rank, self.device = 0, world_size, 0, torch.device("cpu")
        self.course = Course()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_to(self, tensor: Tensor, owner: int) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return tensor

    def sum(self, *values: float) -> tuple[float, ...]:
        return values

    sum_or_stop = sum

    def share(self, value):
        return value

    def agree(self, error: Exception | None) -> None:
        if error is not None:
            raise error


class OneRankOfZero3:
    """What LoRA-SB's initialisation and a training step ask of a `distlora.engine.protocol.Engine`.

    DeepSpeed also keeps parameters that it has prefetched or expects to need again, and buckets for
    gradients, up to limits of its config. They are left out: they are the same in every pass.
    """

    def __init__(self, comm: SilentComm, dtype: torch.dtype, persistent: int = PERSISTENT_ELEMENTS):
        self.comm, self.dtype, self._persistent = comm, dtype, persistent
        self.ledger, self.clip = None, None

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        self.module, self.layers = model, adapter_layers(model)
        self._parameters = dict(model.named_parameters())
        self._shapes = {parameter: tuple(parameter.shape) for parameter in self._parameters.values()}
        self._shards = {
            parameter: torch.empty(self._share(parameter), dtype=parameter.dtype)
            for parameter in self._parameters.values()
            if self.comm.world_size > 1 and parameter.numel() > self._persistent
        }
        self._left_whole: set[nn.Module] = set()
        for parameter in self._shards:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        for module in model.modules():
            if any(parameter in self._shards for parameter in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._before_forward)
                module.register_forward_hook(self._after_forward)
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._masters = {name: nn.Parameter(torch.zeros(self._share(p))) for name, p in self._trained.items()}
        self._optimizer = optimizer.build(self._masters.values())

    def _share(self, parameter: nn.Parameter) -> int:
        """Elements of a parameter that belong to one rank."""
        return -(-prod(self._shapes[parameter]) // self.comm.world_size)

    # ------------------------------------------------------------------ gathering

    def _before_forward(self, module: nn.Module, inputs: tuple) -> tuple:
        self._gather(module)
        first, *others = inputs
        return (_Passed.apply(first, lambda: self._release(module)), *others)

    def _after_forward(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._release(module)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._gather(module))

    def _gather(self, module: nn.Module) -> None:
        # One whose input needs no gradient does not see its backward pass end, nor does a recomputation that
        # stops early.
        for other in self._left_whole - {module}:
            self._release(other)
        self._left_whole.add(module)
        for parameter in module.parameters(recurse=False):
            if parameter in self._shards and parameter.numel() == 0:
                parameter.data = torch.empty(self._shapes[parameter], dtype=parameter.dtype)

    def _release(self, module: nn.Module) -> None:
        self._left_whole.discard(module)
        for parameter in module.parameters(recurse=False):
            if parameter in self._shards:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def keep_gradient_shards(self, parameters: list[nn.Parameter]) -> None:
        """For the naive way: of each whole gradient, as soon as it is there, the rank keeps its own part."""
        self._gradient_shards: dict[nn.Parameter, Tensor] = {}

        def keep(parameter: nn.Parameter) -> None:
            self._gradient_shards[parameter] = parameter.grad.reshape(-1)[: self._share(parameter)].clone()
            parameter.grad = None

        for parameter in parameters:
            if parameter in self._shards:
                parameter.register_post_accumulate_grad_hook(keep)

    # ------------------------------------------------------------------ passes

    def train_mode(self, on: bool) -> None:
        self.module.train(on)

    def run(self, function: Callable, *arguments):
        return function(self.module, *arguments)

    run_probe = run

    @contextmanager
    def probe_pass(self) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        for name, parameter in self._trained.items():
            self._masters[name].grad = parameter.grad.reshape(-1)[: self._share(parameter)].float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepInfo(grad_norm=1.0)

    def set_rate(self, rate: float) -> None:
        set_rate(self._optimizer, rate)

    # ------------------------------------------------------------------ reading and writing

    def read(self, layer: AdapterLinear) -> Factors:
        return {factor: torch.zeros(shape) for factor, shape in layer.method.shapes(*layer.shape).items()}

    @torch.no_grad()
    def write(self, layer: AdapterLinear, factors: Factors) -> None:
        for factor, value in factors.items():
            parameter = getattr(layer, factor)
            if parameter in self._shards:
                share = self._shards[parameter]
                share.copy_(value.reshape(-1)[: share.numel()])
            else:
                parameter.copy_(value)


class _Passed(torch.autograd.Function):
    """Its input; calls `done` when the gradient of the input has come back."""

    @staticmethod
    def forward(ctx, x: Tensor, done: Callable[[], None]) -> Tensor:
        ctx.done = done
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.done()
        return gradient, None
