"""Full fine-tuning: the target weights themselves are trained. The yardstick of every other method."""

from typing import ClassVar, Literal

from distlora.methods.base import Factors, LowRank, Method


class Full(Method):
    name: Literal["full"] = "full"

    summary: ClassVar[str] = "train the target weights themselves"
    source: ClassVar[str] = "-"
    path: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ()
    trains_weight: ClassVar[bool] = True

    def delta(self, factors: Factors) -> LowRank:
        raise TypeError("full fine-tuning has no low-rank update")
