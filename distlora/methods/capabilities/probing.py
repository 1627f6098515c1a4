"""Methods that start from full fine-tuning gradients, which a probe samples."""

from abc import abstractmethod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from distlora.methods.contract import Method


class ProbeSettings(BaseModel):
    """What a method asks of the probe; part of its recipe section."""

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
        description="size of the first step: a number, the schedule's first rate that is not zero, or a line "
        "search",
    )


class NeedsProbe(Method):
    """The factors are made of the mean gradient of a probe: `source_matrix` answers "gradient"."""

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "gradient"

    @abstractmethod
    def probe_settings(self) -> ProbeSettings | None:
        """How the gradients are sampled; None where the settings of the method need no gradient, and
        `source_matrix` says so.
        """

    def proportional_to_eta(self) -> str | None:
        """The factor that eta only scales, so that a line search can try sizes without another `initialise`;
        None where there is no such factor.
        """
        return None
