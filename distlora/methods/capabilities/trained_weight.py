"""Methods that train the target weights themselves."""

from typing import ClassVar

from distlora.maths.low_rank import LowRank
from distlora.methods.contract import Factors, Init, LayerInit, Method


class TrainsWeight(Method):
    """The target weights are trained where they are. There are no factors and no adapter layers."""

    path: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ()

    def initialise(self, layer: LayerInit) -> Init:
        raise TypeError(f"{self.name} has no factors to initialise")

    def delta(self, factors: Factors) -> LowRank:
        raise TypeError(f"{self.name} has no low-rank update")
