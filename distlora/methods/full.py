"""Full fine-tuning: the target weights themselves are trained. The yardstick of every other method."""

from typing import ClassVar, Literal

from distlora.maths.low_rank import LowRank
from distlora.methods.contract import Factors, Method


class Full(Method):
    name: Literal["full"] = "full"

    summary: ClassVar[str] = "train the target weights themselves"
    source: ClassVar[str] = "-"
    path: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ()
    trains_weight: ClassVar[bool] = True

    def problem_with_base(self, kind: Literal["nf4", "int8"], partitioned: bool) -> str | None:
        return f"method {self.name} trains the weights themselves, which {kind} cannot hold while they move; set it to null"

    def delta(self, factors: Factors) -> LowRank:
        raise TypeError("full fine-tuning has no low-rank update")
