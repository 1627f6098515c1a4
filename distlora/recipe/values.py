"""What sections of a recipe are made of: their base class, and the values that several keys have."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: From 0 to 1.
Share = Annotated[float, Field(ge=0, le=1)]
# In the next three, 0 and null mean the same: "off".
OffOrCount = Annotated[Annotated[int, Field(ge=0)] | None, AfterValidator(lambda value: value or None)]
#: Stored as 0, the other two as None.
ZeroOrCount = Annotated[Annotated[int, Field(ge=0)] | None, AfterValidator(lambda value: value or 0)]
OffOrNumber = Annotated[NotNegative | None, AfterValidator(lambda value: value or None)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
