"""The method contract: what a fine-tuning method must answer, in tensors alone.

Shape legend, the same in every file:

    W  (out, in)   the pretrained weight       g  (out, in)   dL/dW, the full fine-tuning gradient
    B  (out, r)    left factor                 A  (r, in)     right factor
    R  (r, r)      core                        s              scaling; the adapted weight is W + s·B·A or W + s·B·R·A
    m  (out,)      magnitude                   ‖·‖_row        norm of every row, over the input dimension

A method knows no module, rank, device or engine. It is a frozen pydantic model, and its fields *are* the
`method:` section of a recipe. Adding a method is adding one file to this package: the recipe, the command
line, checkpoints, exports and the contract tests find it by its `name`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distlora.maths.functional import linear
from distlora.maths.importance import ElementScores
from distlora.maths.low_rank import LowRank
from distlora.maths.recomposition_schedule import Switching
from distlora.maths.rounding import Rounding

Factors = dict[str, Tensor]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerInit:
    """What a method is told about the layer that it initialises.

    shape: (out, in). source: what `Method.source_matrix` asked for, (out, in) float32 (for "gradient": the
    mean over the probe's samples), or None; it may lie in host memory, and is not to be changed. generator:
    the layer's own, on the CPU, seeded by the recipe's seed and the layer's name; the global one is never
    touched. dtype: in which the forward pass will use the factors. eta: size of the first step, where the
    method takes one. device: where large matrices are factorised.
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
    report: numbers worth logging under `init/`.
    base_update: what is added to the frozen weight, so that the adapted one stays what it was; made of
    factors that were cast to the layer's dtype first, because pairs nearly cancel.
    reserve: components for later, in the order of their use: column i of left (out, n) and row i of right (n,
    in) are the B and A of one. On the CPU, in the layer's dtype.
    """

    factors: Factors
    report: dict[str, float] = field(default_factory=dict)
    base_update: LowRank | None = None
    reserve: LowRank | None = None


@dataclass(frozen=True)
class Recomposition:
    """What `Method.fuse` answers for one layer.

    factors: whole, float32, the replaced components new and the others as they were. base_update: what is
    added to the frozen weight; its columns are first what was fused and then, negated, the new components,
    both in the order of `replaced` (with nothing new: what was fused alone). replaced: numbers of the
    components that are new.
    """

    factors: Factors
    base_update: LowRank
    replaced: tuple[int, ...]


class ProbeSettings(BaseModel):
    """What a method that starts from gradients asks of the probe; part of its recipe section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: float = Field(
        0.001, gt=0, description="training samples of the probe; below 1 a fraction, of which at least 25"
    )
    micro_batch_size: int = Field(1, ge=1, description="samples a pass of the probe")
    sums: Literal["host", "device"] = Field(
        "host", description="where the owner of a layer keeps its gradient sum"
    )
    eta: float | Literal["search", "schedule"] = Field(
        "search",
        description="size of the first step: a number, the schedule's first rate that is not zero, or a line search",
    )


class Method(BaseModel):
    """Base of all methods. Subclasses set `name` and the class variables, and override what differs.

    A subclass with a default for `name` is registered under it.
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

    #: One line for `distlora methods`.
    summary: ClassVar[str]
    #: Where the method was published.
    source: ClassVar[str]
    #: The factors in the order in which they are applied to the input, first to last; () for no adapter.
    path: ClassVar[tuple[str, ...]] = ("A", "B")
    #: The trained factor (out,) that sets the norm of every row of the adapted weight, beside the path; None
    #: where rows keep the norm that they get.
    magnitude: ClassVar[str | None] = None
    #: Whether `prepare` answers anything: only then is the layer's weight made whole for it.
    prepares: ClassVar[bool] = False
    #: The factors that the optimizer trains. The others are frozen.
    trains: ClassVar[tuple[str, ...]] = ("A", "B")
    #: Trained factors without a gradient at the first step, because another factor starts at zero.
    zero_gradient_at_start: ClassVar[tuple[str, ...]] = ()
    #: True where `transform_gradients` is to be called before every optimizer step.
    transforms_gradients: ClassVar[bool] = False
    #: True where `Init.base_update` takes the factors' start out of the weight.
    takes_from_weight: ClassVar[bool] = False
    #: True where the target weights themselves are trained, and no factors exist.
    trains_weight: ClassVar[bool] = False
    #: The adapted network before its first step, beside the pretrained one: the same up to rounding, near it
    #: by a small random part, or moved on purpose.
    at_start: ClassVar[Literal["same", "near", "moved"]] = "same"
    #: The format of adapters that an export is, in words; where there is an adapter.
    export_kind: ClassVar[str] = "LoRA"
    #: Whether `initialise` takes a singular value decomposition of the source matrix.
    decomposes: ClassVar[bool] = False

    # ------------------------------------------------------------------ shapes and scaling

    @property
    def scaling(self) -> float:
        """s in `W + s·B·A`."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def factor_names(self) -> tuple[str, ...]:
        """All factors, trained or frozen: those of the path, and the magnitude."""
        return self.path if self.magnitude is None else (*self.path, self.magnitude)

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """Shape of every factor of one layer, trained or frozen."""
        full = {"A": (self.rank, in_features), "R": (self.rank, self.rank), "B": (out_features, self.rank)}
        return {name: (out_features,) if name == self.magnitude else full[name] for name in self.factor_names}

    def fitted(self, shapes: Sequence[tuple[int, int]]) -> "Method":
        """The method as it is put on layers of these shapes (out, in): what was left open for them to decide
        is decided.
        """
        return self

    def problem_with(self, out_features: int, in_features: int) -> str | None:
        """Why a layer of this shape cannot be adapted, and what to set instead, as the end of a sentence;
        None if it can.
        """
        if self.path and self.rank > min(out_features, in_features):
            return f"rank {self.rank} is above min(out, in) = {min(out_features, in_features)}; lower method.rank"
        return None

    def problem_with_base(self, kind: Literal["nf4", "int8"], partitioned: bool) -> str | None:
        """Why target weights that are stored so cannot be adapted, as the end of a sentence that begins with
        `model.quantization` and says what to set; None if they can. partitioned: cut up between the ranks
        (ZeRO-3)."""
        return None

    @property
    def left_factor(self) -> str | None:
        """The trained factor that LoRA+ gives a learning rate of its own; None where B is frozen or absent."""
        return "B" if "B" in self.trains else None

    @property
    def changes_weight(self) -> bool:
        """Whether the frozen weight of a layer is ever written, at the start or later."""
        return False

    # ------------------------------------------------------------------ initialisation

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        """What `initialise` is given: the pretrained weight, the probe's mean gradient, or nothing."""
        return None

    def probe_settings(self) -> ProbeSettings | None:
        """How the gradients of the first step are to be sampled; None where `source_matrix` is not
        "gradient".
        """
        return None

    @property
    def needs(self) -> tuple[str, ...]:
        """What factors are made of, at the start and later, in words."""
        svd = "SVD of " if self.decomposes else ""
        at_start = {"weight": (f"{svd}W",), "gradient": (f"{svd}gradients",), None: ()}[self.source_matrix()]
        return at_start if self.refill_probe() is None else (*at_start, "SVD of gradients")

    def proportional_to_eta(self) -> str | None:
        """The factor that eta only scales, so that a line search can try sizes without another `initialise`."""
        return None

    def initialise(self, layer: LayerInit) -> Init:
        """The factors of one layer. Deterministic: equal arguments give equal factors."""
        raise TypeError(f"{self.name} has no factors to initialise")

    # ------------------------------------------------------------------ the layer's mathematics

    def prepare(self, weight: Tensor, factors: Factors) -> Factors:
        """What the forward pass needs of all of W and of the factors, and what changes only when they do; {}
        for nothing.

        Asked without gradients, once after every change (an optimizer step, a write, an addition to W),
        inside the layer's own forward pass, where W is whole at every ZeRO stage. The answer is kept until
        the next change, and used by all micro-batches, evaluations and recomputations in between: small
        tensors only.
        """
        return {}

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: Factors,
        training: bool,
        base: Linear = linear,
        prepared: Factors | None = None,
    ) -> Tensor:
        """The adapted layer. x: (…, in). Returns (…, out): `(x Wᵀ + s·(…(x Aᵀ)…)Bᵀ) ⊙ c + b`, c of
        `row_scale`.

        base: computes `x Wᵀ + b`. prepared: what `prepare` answers for this weight and these factors; None to
        ask it here.
        """
        if prepared is None:
            with torch.no_grad():
                prepared = self.prepare(weight, factors)
        scale = self.row_scale(factors, prepared)
        if scale is None:
            return base(x, weight, bias) + self.update(x, factors, training)
        y = base(x, weight, None) + self.update(x, factors, training)
        return y * scale if bias is None else torch.addcmul(bias, y, scale)

    def row_scale(self, factors: Factors, prepared: Factors) -> Tensor | None:
        """c (out,), what the rows of the adapted weight are multiplied by; None for nothing. prepared: of
        `prepare`.
        """
        return None

    def update(self, x: Tensor, factors: Factors, training: bool) -> Tensor:
        """What the path adds to the pretrained layer's output: (…, in) to (…, out)."""
        u = torch.nn.functional.dropout(x, self.dropout, training) if self.dropout else x
        *inner, last = self.path
        for name in inner:
            u = linear(u, factors[name])
        # The r-wide tensor is scaled, not the out-wide one.
        return linear(u if self.scaling == 1.0 else u * self.scaling, factors[last])

    def delta(self, factors: Factors) -> LowRank:
        """What the path adds to W: `left @ right = s·B·A` (or `s·B·R·A`), computed in the factors' dtype."""
        left = factors[self.path[-1]] * self.scaling
        for name in self.path[-2:0:-1]:
            left = left @ factors[name]
        return LowRank(left, factors[self.path[0]])

    def gradient_map(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        """Linear corrections of gradients, as `{factor: (P, Q)}`: the optimizer is given `P g Q` for that
        factor's gradient g.

        Linear, so it commutes with accumulation and with averaging over ranks: it is applied to each gradient
        as it appears. factors: as the forward pass uses them (cast), computed here in float32. {} for no
        correction.
        """
        return {}

    # ------------------------------------------------------------------ training

    def transform_gradients(self, gradients: Factors, factors: Factors) -> Factors:
        """What the optimizer is given for one layer's gradients, where `transforms_gradients` is set. Leaves
        its arguments alone.

        gradients: of every trained factor, whole, float32, averaged, not clipped. factors: all of them,
        whole, as the forward pass uses them (cast), in float32. Returns float32 of the same shapes; a factor
        that is left out keeps its gradient. Clipping goes by the norm of what came in, and multiplies what
        comes out.
        """
        raise TypeError(f"{self.name} transforms no gradients")

    def problem_with_decay(self, weight_decay: float) -> str | None:
        """Why this method must not be trained with weight decay, as a sentence that begins with a key of the
        recipe and says what to set; None if it may."""
        return None

    def problem_with_length(self, steps: int) -> str | None:
        """Why a run of so many optimizer steps cannot use this method, as such a sentence; None if it can."""
        return None

    def switching(self, steps: int) -> Switching | None:
        """When components are replaced in a run of so many steps; None for never."""
        return None

    def element_scores(self) -> ElementScores | None:
        """How the importance of single elements is followed through training; None where nothing depends on
        it.
        """
        return None

    def refill_from(self) -> Literal["reserve", "gradient", "restart"]:
        """Where new components come from: `Init.reserve`, the mean gradient of a new probe, or a new
        `initialise` of the whole adapter after all of it was fused."""
        return "reserve"

    def keeps_function_at_restart(self) -> bool:
        """Whether a restarted adapter begins as no change at all, instead of with a step of its own."""
        return False

    def refill_probe(self) -> ProbeSettings | None:
        """How the gradient for new components is to be sampled; None where `refill_from` is not "gradient"."""
        return None

    def new_components(self, layer: LayerInit, magnitude: float, count: int) -> LowRank:
        """Components made of a gradient (`layer.source`), cast to `layer.dtype`: B's as columns, A's as rows.

        magnitude: of each, as the singular value of its s·B·A.
        """
        raise TypeError(f"{self.name} makes no components of gradients")

    def update_rounding(self) -> Rounding:
        """How the frozen weight is rounded at a recomposition."""
        return "nearest"

    def fuses_beside(self, packed: bool) -> bool:
        """Whether what is fused at a recomposition stays beside the frozen weight, as a pair that the forward
        pass adds, and the weight is left as it is. packed: the weight is kept in few bits, and would have to
        be quantised anew."""
        return packed

    def choose(self, scores: Tensor | None) -> tuple[int, ...]:
        """Numbers of the components to be replaced, ascending. scores: (r,) importance of each, where there
        are element scores.
        """
        raise TypeError(f"{self.name} replaces no components")

    def fuse(
        self, factors: Factors, used: Factors, replaced: tuple[int, ...], new: LowRank | None
    ) -> Recomposition:
        """Fuses components of one layer into its frozen weight, and puts new ones in their places.

        factors: whole, the optimizer's float32 values. used: the same as the forward pass uses them (cast),
        in float32: what is fused are these. new: left (out, k), right (k, in), the B and A of the new
        components, cast; None for `restart`, where the fused factors become zero and `initialise` follows.
        """
        raise TypeError(f"{self.name} replaces no components")

    @property
    def export_rank(self) -> int:
        """Rank of the LoRA that an export is, before anything is recomposed."""
        return self.rank

    def export_low_rank(self, factors: Factors) -> LowRank:
        """The update of W0 as an ordinary LoRA pair with scaling 1: `W_trained = W0 + left @ right`, float32.

        With a magnitude, the rows of that sum are then scaled to the norms in it.
        """
        return self.delta({name: factor.float() for name, factor in factors.items()})


class HoldsPretrained(Method):
    """Base of methods whose trained tensors begin as a part of the pretrained weight, which weight decay
    would shrink.
    """

    decay_pretrained: bool = Field(
        False, description="allow weight decay, which here draws layers away from W"
    )

    #: What weight decay does to those tensors, as a verb and its object.
    under_decay: ClassVar[str]

    def problem_with_decay(self, weight_decay: float) -> str | None:
        if weight_decay > 0 and not self.decay_pretrained:
            return (
                f"train.weight_decay={weight_decay:g} {self.under_decay} under {self.name}: "
                "set it to 0, or method.decay_pretrained to true"
            )
        return None


class TakenFromWeight(HoldsPretrained):
    """Base of methods whose factors begin as something that is taken out of the weight: `W − s·B₀·A₀ +
    s·B·A`.
    """

    takes_from_weight: ClassVar[bool] = True

    @property
    def changes_weight(self) -> bool:
        return True

    @property
    def export_rank(self) -> int:
        """2r: what is trained, and what was taken from W for it."""
        return 2 * self.rank
