"""How often something happens in a run: every so many steps, or every share of an epoch."""

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

_SHARE = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?(epochs?|%)")


def _told(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError(f'{value:g} is no number of steps; for a share of an epoch write "{value:g} epoch"')
    return value


def _readable(value: int | str | None) -> int | str | None:
    if isinstance(value, str) and not _share(value):
        raise ValueError(
            f'found "{value}", wanted a number of steps, or a share of an epoch above 0, as in 0.25 epoch '
            "or 25%"
        )
    return value or None


def _share(text: str) -> Fraction | None:
    """Of an epoch; None where the text says none, or none above 0."""
    found = _SHARE.fullmatch(text.strip())
    if not found:
        return None
    return Fraction(found[1]) / (100 if found[2] == "%" else 1) or None


#: Steps, or a share of an epoch as a text; 0 and null mean "off".
Every = Annotated[Annotated[int, Field(ge=0)] | str | None, BeforeValidator(_told), AfterValidator(_readable)]


def is_due(every: int | str | None, step: int, steps_per_epoch: int) -> bool:
    """Whether it happens after this many steps. every: as a recipe says it. Of shares of an epoch that are no
    whole number of steps, it happens after the first step that completes one; at the ends of epochs exactly.
    """
    if every is None:
        return False
    length = every if isinstance(every, int) else _share(every) * steps_per_epoch
    return step // length > (step - 1) // length
