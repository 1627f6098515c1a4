"""Full fine-tuning: train the target weights themselves. The yardstick of every other method."""

from typing import Literal

from distlora.methods.capabilities import TrainsWeight


class Full(TrainsWeight):
    name: Literal["full"] = "full"
