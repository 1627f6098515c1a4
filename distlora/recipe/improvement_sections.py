"""`train.early_stopping` and `train.keep_best`: what follows from the evaluations of a run."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distlora.recipe.values import Count, NotNegative, Section, Text

Mode = Annotated[
    Literal["max", "min"] | None,
    Field(
        description="whether more or less is better; null: less of loss and perplexity, more of all others"
    ),
]


class EarlyStopping(Section):
    """Ends a run that no longer improves. `early_stopping: 5` stands for `{patience: 5}`."""

    metric: Text = Field("loss", description="of the evaluation, as its tag is called after eval/")
    patience: Count = Field(3, description="evaluations in a row without an improvement")
    min_delta: NotNegative = Field(0.0, description="a smaller improvement is none")
    mode: Mode = None


class KeepBest(Section):
    """Keeps the checkpoint with the best evaluation. `keep_best: f1` stands for `{metric: f1}`."""

    metric: Text = Field("loss", description="of the evaluation, as its tag is called after eval/")
    mode: Mode = None


def _stopping(value: Any) -> Any:
    if isinstance(value, bool):
        return {} if value else None
    return {"patience": value} if isinstance(value, int | float) else value


def _kept(value: Any) -> Any:
    if isinstance(value, bool):
        return {} if value else None
    return {"metric": value} if isinstance(value, str) else value


#: true stands for the defaults, and false for null.
EarlyStoppingField = Annotated[EarlyStopping | None, BeforeValidator(_stopping)]
KeepBestField = Annotated[KeepBest | None, BeforeValidator(_kept)]
