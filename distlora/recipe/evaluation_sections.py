"""`data.eval`: several evaluation sets, by name."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from distlora.recipe.values import Count, Section, Text


class EvaluationSet(Section):
    """What an evaluation set has of its own; null: as the data section says. `held_out: "test[:100]"` stands
    for `held_out: {split: "test[:100]"}`.
    """

    split: Text = Field("test", description="as in data.split")
    path: Text | None = None
    task: Text | None = Field(None, description="another one that the same model can do")
    fields: dict[str, Text] | None = None
    template: Text | None = None
    max_new_tokens: Count | None = None


def _named(sets: dict[str, EvaluationSet] | None) -> dict[str, EvaluationSet] | None:
    for name in sets or ():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f'the name "{name}" is part of a tag: use letters, digits, _, . and - alone')
    if sets is not None and not sets:
        raise ValueError("no set is named; name one, or set it to null")
    return sets


def _split_alone(value: Any) -> Any:
    return {"split": value} if isinstance(value, str) else value


EvaluationSets = Annotated[
    dict[str, Annotated[EvaluationSet, BeforeValidator(_split_alone)]] | None, AfterValidator(_named)
]
