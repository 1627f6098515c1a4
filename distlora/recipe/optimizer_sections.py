"""`train.optimizer` and `train.lr_search`."""

from pydantic import Field, model_validator

from distlora.engine.optimizers import OptimizerName
from distlora.recipe.values import Count, NotNegative, Positive, Section


class OptimizerSection(Section):
    name: OptimizerName = Field(
        "adamw", description="those with 8bit or paged in their names are of bitsandbytes"
    )
    betas: tuple[NotNegative, NotNegative] = Field((0.9, 0.999), description="not for sgd")
    eps: Positive = Field(1e-8, description="not for sgd")
    momentum: NotNegative = Field(0.0, lt=1, description="sgd only")
    lora_plus_ratio: Positive | None = Field(
        None, description="LoRA+: learning rate of B over that of the rest; null: the same"
    )

    @model_validator(mode="after")
    def _consistent(self):
        if max(self.betas) >= 1:
            raise ValueError(f"betas are {list(self.betas)}, wanted two numbers below 1")
        if self.momentum and self.name != "sgd":
            raise ValueError(
                f"momentum is for sgd, and name is {self.name}; set momentum to 0 or name to sgd"
            )
        return self


#: In the place of a learning rate: one that is found before the first step.
SEARCH = "search"


class RateSearchSection(Section):
    """How `train.lr: search` goes about it."""

    lowest: Positive = Field(1e-5, description="learning rate")
    highest: Positive = Field(3e-2, description="learning rate")
    rates: int = Field(5, ge=2, description="tried from the lowest to the highest; two finer ones follow")
    steps: Count = Field(6, description="optimizer steps with each rate")
    samples: Count = Field(32, description="training samples, held back from those steps, that decide")

    @model_validator(mode="after")
    def _consistent(self):
        if self.lowest >= self.highest:
            raise ValueError(
                f"lowest is {self.lowest:g}, wanted less than highest, which is {self.highest:g}"
            )
        return self
