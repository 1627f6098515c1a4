"""`train.schedule`: a name of `transformers.get_scheduler`, alone or with its settings."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from distlora.engine.schedules import SETTINGS, Curve, Schedule, ScheduleName
from distlora.recipe.values import Count, Positive, Section, Share

#: Names of transformers that are refused, and what their rates follow.
_FOLLOW = {"reduce_lr_on_plateau": "the evaluations", "greedy": "the loss of each step"}


def _known_in_advance(name: Any) -> Any:
    if isinstance(name, str) and name in _FOLLOW:
        raise ValueError(
            f"the rates of {name} follow {_FOLLOW[name]}, and those of a run are fixed before its first "
            "step; take cosine_with_min_lr or warmup_stable_decay, and train.early_stopping to end a run "
            "that no longer improves"
        )
    return name


class ScheduleSection(Section):
    """Learning rates by step. `schedule: linear` stands for `{name: linear}`."""

    name: Annotated[ScheduleName, BeforeValidator(_known_in_advance)] = "cosine"
    cycles: Positive | None = Field(None, description="waves, null: 0.5; of cosine_with_restarts: 1")
    min_ratio: Share | None = Field(None, description="least rate, as a share of lr")
    decay_ratio: Share = Field(0.1, description="share of the steps in which warmup_stable_decay decays")
    decay: Curve = Field("cosine", description="of warmup_stable_decay")
    warmup: Curve = Field("linear", description="of warmup_stable_decay")
    power: Positive = Field(1.0, description="of polynomial")
    timescale: Count | None = Field(None, description="steps of inverse_sqrt; null: those of the warm-up")
    first_ratio: Share | None = Field(
        None, description="first rate of cosine_warmup_with_min_lr, as a share of lr; null: 1 / warm-up steps"
    )
    warmup_from_zero: bool | None = Field(
        None,
        description="whether the first warm-up step has rate 0; null: not under cosine, linear, constant",
    )

    @model_validator(mode="after")
    def _has_these_settings(self) -> Self:
        for setting in set(type(self).model_fields) - {"name", "warmup_from_zero"}:
            changed = getattr(self, setting) != type(self).model_fields[setting].default
            if changed and setting not in SETTINGS[self.name]:
                having = [name for name, settings in SETTINGS.items() if setting in settings]
                raise ValueError(
                    f"{setting} is for {' or '.join(having)}, and name is {self.name}; leave it out"
                )
        if self.name.endswith("with_min_lr") and self.min_ratio is None:
            raise ValueError(f"{self.name} needs its least rate, as a share of lr, as in min_ratio: 0.1")
        return self

    def of_run(self, peak: float, steps: int, warmup_ratio: float) -> Schedule:
        """The rates of a run of so many steps."""
        settings = dict(self)
        return Schedule(settings.pop("name"), peak, steps, warmup_ratio, **settings)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


#: The name alone stands for a section with it.
ScheduleField = Annotated[ScheduleSection, BeforeValidator(_named)]
