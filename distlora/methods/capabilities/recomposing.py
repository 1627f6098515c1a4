"""Methods that fuse components of the adapter into the frozen weight, and put new ones in their places."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distlora.maths.importance import ElementScores
from distlora.maths.low_rank import LowRank
from distlora.maths.recomposition_schedule import RecompositionSchedule
from distlora.maths.rounding import Rounding
from distlora.methods.capabilities.probing import ProbeSettings
from distlora.methods.contract import Factors, LayerInit, Method


@dataclass(frozen=True)
class Recomposition:
    """What `Recomposes.fuse` answers for one layer.

    factors: whole, float32, the replaced components new and the others as they were. base_update: what is
    added to the frozen weight. Its columns are what was fused and then, negated, the new components, both in
    the order of `replaced`; without new components they are what was fused alone. replaced: numbers of the
    components that are new.
    """

    factors: Factors
    base_update: LowRank
    replaced: tuple[int, ...]


class Recomposes(Method):
    """At the steps of a schedule, components of every layer are replaced. Nothing but `recomposes` is asked
    where that is False.
    """

    # ------------------------------------------------------------------ when

    @property
    @abstractmethod
    def recomposes(self) -> bool:
        """Whether components are replaced at all, as the method is set."""

    @abstractmethod
    def recomposition_schedule(self, steps: int) -> RecompositionSchedule:
        """When components are replaced in a run of so many optimizer steps."""

    def problem_with_length(self, steps: int) -> str | None:
        """Why the schedule does not fit into a run of so many steps, as a sentence that says what to set;
        None if it fits.
        """
        return None

    # ------------------------------------------------------------------ what

    @abstractmethod
    def choose(self, scores: Tensor | None) -> tuple[int, ...]:
        """Numbers of the components to be replaced, ascending. scores: (r,) importance of each component, if
        there are element scores.
        """

    def element_scores(self) -> ElementScores | None:
        """How the importance of single elements is followed through training; None if nothing depends on
        it.
        """
        return None

    def component_axis(self, factor: str) -> int | None:
        """The axis of a factor of the path that counts the components: 0 for A (r, in), 1 for B (out, r).
        None for a core, which belongs to all components.
        """
        return {self.path[0]: 0, self.path[-1]: 1}.get(factor)

    # ------------------------------------------------------------------ by what

    @abstractmethod
    def refill_from(self) -> Literal["reserve", "gradient", "restart"]:
        """Where new components come from: `Init.reserve`, the mean gradient of a new probe, or a new
        `initialise` of the whole adapter after all of it was fused."""

    def keeps_function_at_restart(self) -> bool:
        """Whether an adapter that starts anew begins as no change at all, instead of with a step of its
        own.
        """
        return False

    def refill_probe(self) -> ProbeSettings | None:
        """How the gradient for new components is sampled; None unless `refill_from` is "gradient"."""
        return None

    def new_components(self, layer: LayerInit, magnitude: float, count: int) -> LowRank:
        """Components made of a gradient (`layer.source`), cast to `layer.dtype`: left (out, count) and right
        (count, in).

        magnitude: the singular value of each component's s·B·A.
        """
        raise TypeError(f"{self.name} makes no components of gradients")

    # ------------------------------------------------------------------ how the weight changes

    @abstractmethod
    def fuse(
        self, factors: Factors, used: Factors, replaced: tuple[int, ...], new: LowRank | None
    ) -> Recomposition:
        """Fuses components of one layer into its frozen weight, and puts new ones in their places.

        factors: whole, the optimizer's float32 values. used: the same as the forward pass uses them (cast),
        in float32; these are fused. new: left (out, k) and right (k, in) of the new components, cast. None
        where `refill_from` is "restart": the fused factors become zero, and `initialise` follows.
        """

    def update_rounding(self) -> Rounding:
        """How the frozen weight is rounded at a recomposition."""
        return "nearest"

    def fuses_beside(self, packed: bool) -> bool:
        """Whether fused components stay beside the frozen weight, as a pair that the forward pass adds.
        packed: whether the weight is stored in few bits, and would have to be quantised anew.
        """
        return packed
