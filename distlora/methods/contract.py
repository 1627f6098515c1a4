"""The core of the method contract: what every fine-tuning method must answer, in tensors alone.

Shape legend, the same in every file:

    W  (out, in)   the pretrained weight       g  (out, in)   dL/dW, the full fine-tuning gradient
    B  (out, r)    left factor                 A  (r, in)     right factor
    R  (r, r)      core                        m  (out,)      magnitude
    s              scaling; the adapted weight is W + s·B·A or W + s·B·R·A
    ‖·‖_row        norm of every row, over the input dimension

A method knows no module, rank, device or engine. It is a frozen pydantic model, and its fields *are* the
`method:` section of a recipe. A method is one file of this package: the recipe, the command line,
checkpoints, exports and the contract tests find it by its `name`. The first line of the file's docstring says
what the method is; `distlora methods` prints it.

What only some methods can do is not in here: `distlora.methods.capabilities` has a base class for each.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from distlora.maths.functional import linear
from distlora.maths.low_rank import LowRank

Factors = dict[str, Tensor]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerInit:
    """What a method is told about the layer that it initialises.

    shape: (out, in). source: what `Method.source_matrix` asked for, (out, in) float32 (for "gradient": the
    mean over the probe's samples), or None; it may lie in host memory, and must not be changed. generator:
    the layer's own, on the CPU, seeded by the recipe's seed and the layer's name; the global one is never
    touched. dtype: in which the forward pass will use the factors. eta: size of the first step, for a method
    that takes one. device: where large matrices are factorised.
    """

    shape: tuple[int, int]
    source: Tensor | None
    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    eta: float = 1.0
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Init:
    """What `Method.initialise` answers.

    factors: on the CPU; a trained one in float32, a frozen one in float32 or already in the layer's dtype.
    report: numbers worth logging under `init/`. base_update: what is added to the frozen weight so that the
    adapted weight stays what it was; made of factors that were cast to the layer's dtype first, because the
    two nearly cancel. reserve: components for later, in the order of their use: column i of left (out, n) and
    row i of right (n, in) form one component. On the CPU, in the layer's dtype.
    """

    factors: Factors
    report: dict[str, float] = field(default_factory=dict)
    base_update: LowRank | None = None
    reserve: LowRank | None = None


def _names(value: Any) -> Any:
    """One name stands for a list of it. A tuple, because methods are keys of caches."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Method(BaseModel):
    """Base of all methods. A subclass with a default for `name` is registered under that name.

    A usual method sets `name`, `trains` and `zero_gradient_at_start`, and implements `initialise`; the rest
    follows from `path`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rank: int = Field(8, ge=1, description="r: columns of B, rows of A")
    alpha: float | None = Field(
        None, gt=0, description="numerator of the scaling; null: the method's own choice"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of dropping an element of the adapter's input"
    )
    modules_to_save: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_names)] = (
        Field(
            (), description="modules that are trained whole beside the adapter, by name or last part of names"
        )
    )

    #: The factors that are multiplied, in the order in which they are applied to the input; () for no
    #: adapter.
    path: ClassVar[tuple[str, ...]] = ("A", "B")
    #: The factors that the optimizer trains. The others are frozen.
    trains: ClassVar[tuple[str, ...]] = ("A", "B")
    #: Trained factors without a gradient at the first step, because another factor starts at zero.
    zero_gradient_at_start: ClassVar[tuple[str, ...]] = ()

    @property
    def scaling(self) -> float:
        """s in `W + s·B·A`."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    # ------------------------------------------------------------------ what it is put on

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """Shape of every factor of one layer, trained or frozen."""
        full = {"A": (self.rank, in_features), "R": (self.rank, self.rank), "B": (out_features, self.rank)}
        return {name: full[name] for name in self.path}

    def problem_with(self, out_features: int, in_features: int) -> str | None:
        """Why a layer of this shape cannot be adapted, and what to set instead, as the end of a sentence;
        None if it can be.
        """
        least = min(out_features, in_features)
        if self.path and self.rank > least:
            return f"rank {self.rank} is above min(out, in) = {least}; lower method.rank"
        return None

    def fitted(self, shapes: Sequence[tuple[int, int]]) -> "Method":
        """The method for layers of these shapes (out, in), with every field set that was left open for the
        layers to decide.
        """
        return self

    # ------------------------------------------------------------------ initialisation

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        """What `initialise` is given: the pretrained weight, the mean gradient of a probe, or nothing."""
        return None

    @abstractmethod
    def initialise(self, layer: LayerInit) -> Init:
        """The factors of one layer. Deterministic: equal arguments give equal factors."""

    # ------------------------------------------------------------------ the layer's mathematics

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: Factors,
        training: bool,
        base: Linear = linear,
        along: Linear = linear,
    ) -> Tensor:
        """The adapted layer `x Wᵀ + s·(…(x Aᵀ)…)Bᵀ + b`. x: (…, in). Returns (…, out).

        training: whether dropout acts. base: computes `x Wᵀ + b`. along: computes `u Fᵀ` of a factor F.
        """
        return base(x, weight, bias) + self._update(x, factors, training, along)

    def _update(self, x: Tensor, factors: Factors, training: bool, along: Linear = linear) -> Tensor:
        """What the path adds to the output of the pretrained layer: (…, in) to (…, out)."""
        return self._along_path(self._dropped(x, training), factors, along)

    def _dropped(self, x: Tensor, training: bool) -> Tensor:
        """The input of the path: x itself where dropout does not act."""
        return torch.nn.functional.dropout(x, self.dropout, training) if self.dropout else x

    def _along_path(self, u: Tensor, factors: Factors, along: Linear = linear) -> Tensor:
        """`s·(…(u Aᵀ)…)Bᵀ`: (…, in) to (…, out)."""
        *inner, last = self.path
        for name in inner:
            u = along(u, factors[name], None)
        # The r-wide tensor is scaled, not the out-wide one.
        return along(u if self.scaling == 1.0 else u * self.scaling, factors[last], None)

    def delta(self, factors: Factors) -> LowRank:
        """What the path adds to W: `left @ right = s·B·A` (or `s·B·R·A`), in the dtype of the factors."""
        left = factors[self.path[-1]] * self.scaling
        for name in self.path[-2:0:-1]:
            left = left @ factors[name]
        return LowRank(left, factors[self.path[0]])

    def export_low_rank(self, factors: Factors) -> LowRank:
        """The update of W0 as an ordinary LoRA pair with scaling 1: `W_trained = W0 + left @ right`, float32.

        With a magnitude, the rows of that sum are then scaled to the norms in it.
        """
        return self.delta({name: factor.float() for name, factor in factors.items()})
