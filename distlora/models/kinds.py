"""Kinds of models by their configs: which class is loaded, and which of them cannot be trained here.

In what follows, `labels` are the names that a classifier of texts or images tells apart; a single one is that
of the output of a regression. Without any, the model is a causal language model.
"""

import inspect
from collections.abc import Sequence

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from distlora.errors import UserError


def refuse_other_models(path: str, config: PreTrainedConfig) -> None:
    """Raises UserError for what is no causal language model."""
    name = f"model.path={path}: the type {config.model_type}"
    if config.is_encoder_decoder:
        raise UserError(
            f"{name} reads the prompt in an encoder of its own, and responses are trained in causal language "
            f"models only{hint(config)}"
        )
    if is_encoder(config) or type(config) not in classes(config):
        raise UserError(f"{name} is no causal language model{hint(config)}")


def vocabulary_size(path: str, config: PreTrainedConfig) -> int:
    """How many tokens a model of texts knows. Raises UserError for one without a vocabulary."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is None:
        raise UserError(
            f"model.path={path}: the type {config.model_type} has no vocabulary in its config, and texts are "
            "given as tokens here; give a model with one"
        )
    return size


def refuse_beyond_texts(path: str, config: PreTrainedConfig, labels: Sequence[str]) -> None:
    """Raises UserError for a class that cannot be called with texts alone, as tokens."""
    model_class = model_class_of(config, labels)
    parameters = inspect.signature(model_class.forward).parameters
    wanted = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("self", "input_ids", "attention_mask")
    ]
    if model_class.main_input_name != "input_ids":
        wanted.insert(0, model_class.main_input_name)
    elif "input_ids" not in parameters:  # such as a class that joins several models
        wanted.insert(0, "more than tokens")
    if wanted:
        raise UserError(
            f"model.path={path}: {model_class.__name__} always wants {wanted[0]}, and is given texts "
            "alone here; give a model of texts"
        )
    vocabulary_size(path, config)


def refuse_checkpointing(path: str, model_class: type) -> None:
    """Raises UserError for a class whose blocks cannot compute their activations again."""
    if not model_class.supports_gradient_checkpointing:
        raise UserError(
            f"model.gradient_checkpointing=true: {model_class.__name__} of {path} has none; set it to false"
        )


def reads_the_last_token(config: PreTrainedConfig, labels: Sequence[str]) -> bool:
    """Whether a classifier of texts reads them off at the last token that is not padding, by its config."""
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_encoder(config)
    return is_decoder or issubclass(model_class_of(config, labels), GenericForSequenceClassification)


def model_class_of(config: PreTrainedConfig, labels: Sequence[str] = (), images: bool = False) -> type:
    model_class = classes(config, labels, images)[type(config)]
    # DeiT's, with and without a teacher, differ in their heads alone.
    return model_class[0] if isinstance(model_class, tuple) else model_class


def auto_class(config: PreTrainedConfig, labels: Sequence[str] = (), images: bool = False) -> type:
    if images:
        return AutoModelForImageClassification
    if labels:
        return AutoModelForSequenceClassification
    # Models of images and texts are language models, too, if they are given texts alone.
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM


def classes(config: PreTrainedConfig, labels: Sequence[str] = (), images: bool = False):
    """transformers' mapping from a config's class to that of the model."""
    return auto_class(config, labels, images)._model_mapping


def hint(config: PreTrainedConfig) -> str:
    """Which tasks a model could be trained on that is of the wrong kind for this one."""
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "; a data.task of images, such as cifar10, trains it"
    classifies = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if classifies and (is_encoder(config) or config.is_encoder_decoder):
        return "; a data.task with labels, such as rte, trains it as a classifier"
    return ""


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether each token sees those that follow it.

    transformers has causal classes for such types too, for use as a decoder.
    """
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
