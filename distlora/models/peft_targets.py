"""Layers of mixtures of experts that PEFT does not adapt as modules."""

from transformers import conversion_mapping

from distlora.models.stored_names import transformers_class

#: The last parts of layers' names, by the form of the mixture, that PEFT takes for parts of experts.
_PARTS_OF_EXPERTS = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}


def parts_of_experts(model_class: str | None) -> tuple[str, ...]:
    """The last parts of names that PEFT takes out of `target_modules` when it loads an adapter of this class.

    They were linear layers of experts in older versions of transformers. PEFT (`_convert_peft_config_moe`)
    adapts the parameters that hold the experts in their place, also where a dense block or a shared expert is
    meant. Named in `target_parameters` as `<layer>.weight`, these are found.
    """
    cls = transformers_class(model_class)
    config = getattr(cls, "config_class", None)
    if config is None:
        return ()
    forms = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}) | {"mixtral": "mixtral"}
    return _PARTS_OF_EXPERTS.get(forms.get(config.model_type), ())
