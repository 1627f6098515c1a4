"""Methods whose trained tensors begin as a part of the pretrained weight."""

from pydantic import Field

from distlora.methods.contract import Method


class HoldsPretrained(Method):
    """What is trained begins as a part of the pretrained weight. Weight decay would shrink that part."""

    decay_pretrained: bool = Field(
        False, description="allow weight decay, which here draws layers away from W"
    )


class TakesFromWeight(HoldsPretrained):
    """What the factors begin as is taken out of the weight: `W − s·B₀·A₀ + s·B·A`.

    `Init.base_update` is that change of W. Over packed weights the factors are made of the pretrained weight,
    and what remains of it is packed.
    """
