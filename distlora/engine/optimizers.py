"""The optimizer: ours, and handed to whatever engine runs the model."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distlora.errors import UserError
from distlora.files.packages import is_installed
from distlora.maths.blockwise import BLOCK

OptimizerName = Literal["adamw", "sgd", "adamw8bit", "paged_adamw", "paged_adamw8bit"]

#: Classes of torch and DeepSpeed that keep `exp_avg` and `exp_avg_sq`, under these names.
ADAMS = ("AdamW", "Adam", "FusedAdam", "DeepSpeedCPUAdam")

#: Key of a parameter group: its learning rate over that of the schedule.
RATE_RATIO = "rate_ratio"


@runtime_checkable
class PackedMoments(Protocol):
    """An optimizer that keeps its moments in a form of its own, and can give and take them as torch's
    optimizers keep them.
    """

    def moment(self, parameter: Tensor, key: str, start: int, length: int) -> Tensor:
        """(length,) float32: elements of the moment `key`; a view if it is kept so, else a copy."""

    def moment_keys(self) -> list[str]:
        """All that `moment` knows."""

    def forget(self, parameter: Tensor) -> None:
        """Makes the state of `parameter` what it is before the first step, in the memory that it has."""

    def unpack(self, parameter: Tensor) -> None:
        """Until the next step the state of `parameter` holds every moment under its key, float32 and shaped
        like it.
        """


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer before it has parameters.

    lr: rate of the first step. betas, eps: AdamW's. momentum: SGD's. weight_decay: decoupled for AdamW, L2
    for SGD. lora_plus_ratio: learning rate of B over that of everything else (LoRA+, arXiv 2402.12354); None:
    they are the same.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    lora_plus_ratio: float | None = None

    def groups(
        self, parameters: Mapping[str, nn.Parameter], left_factors: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """The groups of named parameters to build an optimizer of. left_factors: names of those that LoRA+
        calls B.
        """
        ratio = self.lora_plus_ratio
        if ratio is None:
            return [{"params": list(parameters.values())}]
        left = [parameter for name, parameter in parameters.items() if name in left_factors]
        rest = [parameter for name, parameter in parameters.items() if name not in left_factors]
        groups = [{"params": rest}, {"params": left, "lr": ratio * self.lr, RATE_RATIO: ratio}]
        return [group for group in groups if group["params"]]

    def build(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """parameters: or groups of them, as `groups` gives them."""
        parameters = list(parameters)
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        settings = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        if self.of_bitsandbytes:
            from distlora.engine.bitsandbytes_adamw import BitsandbytesAdamW  # seconds, and an extra package

            return BitsandbytesAdamW(
                parameters, bits=8 if self.eight_bit else 32, paged=self.name.startswith("paged"), **settings
            )
        return torch.optim.AdamW(parameters, fused=_on_cuda(parameters) or None, **settings)

    @property
    def of_bitsandbytes(self) -> bool:
        return self.name not in ("adamw", "sgd")

    @property
    def eight_bit(self) -> bool:
        """Whether moments are kept as 8-bit numbers, in blocks with a common scale."""
        return self.name.endswith("8bit")

    def moments(self) -> tuple[str, ...]:
        """Keys of the elementwise state that the built optimizer keeps, under torch's names.

        For 8-bit moments also the scales that they were rounded with, a block's for each of its elements:
        without them a moment that is read and written again would be rounded otherwise.
        """
        if self.name == "sgd":
            return ("momentum_buffer",) if self.momentum else ()
        return ("exp_avg", "exp_avg_sq", *(("exp_avg_scale", "exp_avg_sq_scale") if self.eight_bit else ()))

    def moments_in_place(self) -> tuple[str, ...]:
        """Those that views can be had of."""
        return () if self.eight_bit else self.moments()

    def bytes_per_element(self) -> float:
        """Of the float32 master and the moments of one trained number, in large tensors."""
        if self.eight_bit:
            return 4 + 2 * (1 + 4 / BLOCK)
        return 4 + 4 * len(self.moments())

    def problem(self) -> str | None:
        """What this machine lacks for the optimizer, as a sentence about the recipe; None if nothing."""
        if self.of_bitsandbytes and not is_installed("bitsandbytes"):
            return (
                f"train.optimizer.name={self.name} needs the package bitsandbytes, which is not installed; "
                'pip install "distlora[bnb]", or set it to adamw'
            )
        return None


def spec_of(optimizer: torch.optim.Optimizer) -> OptimizerSpec:
    """What is known of an optimizer that the user has made: which moments it keeps, and how fast they forget.

    Errors: UserError for one whose state is not known here.
    """
    first, name = optimizer.param_groups[0], type(optimizer).__name__
    # Of several groups the largest decay counts: which one a factor lies in cannot be told after flattening.
    decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    known = {"lr": first["lr"], "weight_decay": decay}
    if isinstance(optimizer, torch.optim.SGD):
        return OptimizerSpec("sgd", momentum=first["momentum"], **known)
    adam = "adamw" if name in ADAMS and not first.get("amsgrad") else None
    if isinstance(optimizer, PackedMoments):
        adam = "adamw8bit" if "exp_avg_scale" in optimizer.moment_keys() else "paged_adamw"
    if adam:
        return OptimizerSpec(adam, betas=tuple(first["betas"]), eps=first["eps"], **known)
    raise UserError(
        f"the optimizer {name} keeps a state that is not known here; use AdamW, Adam without amsgrad, or SGD",
        agreed=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """rate: of the schedule; a group of LoRA+ gets its multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_RATIO, 1.0)


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The step count that the optimizer's state holds; 0 before the first step (and always 0 for SGD, which
    keeps none).
    """
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=0)


def moment_of(
    optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, start: int = 0, length: int | None = None
) -> Tensor:
    """(length,) elements of a moment of one of the optimizer's (flat) parameters, which it has stepped: a
    view of its state, a copy where the moments are 8-bit."""
    length = parameter.numel() - start if length is None else length
    if isinstance(optimizer, PackedMoments):
        return optimizer.moment(parameter, key, start, length)
    return optimizer.state[parameter][key].view(-1).narrow(0, start, length)


def restore_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Iterable[str], steps: int
) -> dict:
    """State of one of the optimizer's (flat) parameters as after `steps` steps, to be filled in place.

    Moments that are there stay, new ones are zero, and without any moments the optimizer forgets the
    parameter.
    """
    moments = tuple(moments)
    if not moments:
        optimizer.state.pop(parameter, None)
        return {}
    if isinstance(optimizer, PackedMoments):
        optimizer.unpack(parameter)
    state = optimizer.state[parameter]
    for key in moments:
        if key not in state:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if "exp_avg" in state:
        state["step"] = _step_count(optimizer, parameter, steps)
    return state


def has_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether the optimizer has stepped one of its (flat) parameters, or was given a state of it."""
    return bool(optimizer.state.get(parameter))


def forget_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Makes the state of one of the optimizer's (flat) parameters what it is before the first step."""
    if isinstance(optimizer, PackedMoments):
        optimizer.forget(parameter)
    else:
        optimizer.state.pop(parameter, None)


def _step_count(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> Tensor | int:
    """As the optimizer keeps it: torch's as a tensor (a fused one beside the parameter), those of other
    houses as an integer.
    """
    if not type(optimizer).__module__.startswith("torch."):
        return steps
    return torch.tensor(float(steps), device=parameter.device if optimizer.defaults.get("fused") else None)


def _on_cuda(parameters: list) -> bool:
    """Whether all parameters, or those of all groups, lie where torch has one kernel for a whole step."""
    single = [p for each in parameters for p in (each["params"] if isinstance(each, dict) else [each])]
    return all(parameter.is_cuda for parameter in single)
