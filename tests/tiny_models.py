"""Tiny models of the real classes, as directories that `from_pretrained` reads without a network.

Each has three layers, grouped key/value heads and sizes that no number of ranks divides. All parameters are
drawn from a generator, biases and norms included: whatever starts at zero or one in a fresh model would hide
errors.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BeitConfig,
    BertConfig,
    DebertaV2Config,
    DeiTConfig,
    Dinov2Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

VOCAB_SIZE = 331

_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=60,
    intermediate_size=131,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    attention_dropout=0.0,
)

#: The special tokens of each tokenizer, by role; their ids are 0, 1, 2, … in this order.
_SPECIAL = {
    "llama": {"reserved": "<|reserved|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"},
    "mistral": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "gemma2": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
    "qwen2": {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
}

NAMES = tuple(_SPECIAL)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)

_TEXT = [
    "Tom has three apples and buys four more. How many apples does Tom have?",
    "There are 12 birds on a tree, and 5 of them fly away. How many birds are left?",
    "The answer is 7. The answer is 42. The answer is 100.",
]


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of one of NAMES."""
    if name == "llama":  # as Llama 3.2: tied embeddings, scaled rotary frequencies
        rope = dict(
            rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0
        )
        rope["original_max_position_embeddings"] = 64
        return LlamaConfig(**_SIZES, tie_word_embeddings=True, rope_parameters=rope)
    if name == "mistral":
        return MistralConfig(**_SIZES, tie_word_embeddings=False, sliding_window=None)
    if name == "gemma2":  # caps that bite: the tiny model's logits are of this size
        caps = dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.0)
        return Gemma2Config(
            **_SIZES, **caps, sliding_window=8, query_pre_attn_scalar=10, tie_word_embeddings=True
        )
    if name == "qwen2":  # biases on the query, key and value projections
        return Qwen2Config(**_SIZES, tie_word_embeddings=True)
    raise KeyError(name)


def tiny_model_dir(name: str, parent: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves one of NAMES with its tokenizer to `parent / name`, unless it is there, and returns the
    directory.
    """
    directory = Path(parent) / name
    if not directory.exists():
        model = AutoModelForCausalLM.from_config(tiny_config(name))
        _draw_parameters(model, torch.Generator().manual_seed(len(name)))
        model.to(dtype).save_pretrained(directory)
        tiny_tokenizer(name).save_pretrained(directory)
    return directory


def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with fewer words than VOCAB_SIZE. Only gemma2 and qwen2 have a pad token."""
    roles = _SPECIAL[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 20,
        special_tokens=list(roles.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    named = {role: token for role, token in roles.items() if role != "reserved"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **named)


# ---------------------------------------------------------------------- encoders

ENCODERS = ("bert", "roberta", "deberta")


def tiny_encoder_config(name: str, **more) -> PreTrainedConfig:
    """The config of one of ENCODERS, without dropout: two runs of a test are to have the same numbers."""
    sizes = dict(
        vocab_size=VOCAB_SIZE, hidden_size=60, intermediate_size=131, num_hidden_layers=3,
        num_attention_heads=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.05, pad_token_id=1,
    )  # fmt: skip
    if name == "bert":
        return BertConfig(**sizes, max_position_embeddings=64, **more)
    if name == "roberta":  # positions are counted from behind the padding token's
        return RobertaConfig(
            **sizes, max_position_embeddings=66, type_vocab_size=1, bos_token_id=0, eos_token_id=2, **more
        )
    if name == "deberta":  # relative positions only, as in version 3
        relative = dict(
            relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True
        )
        norm = dict(
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            max_position_embeddings=64,
        )
        return DebertaV2Config(**sizes, **relative, **norm, pooler_hidden_size=60, **more)
    raise KeyError(name)


def tiny_encoder_dir(name: str, parent: Path) -> Path:
    """Saves one of ENCODERS with its tokenizer to `parent / name`, unless it is there, and returns the
    directory.

    As they are published: BERT with its pooler and DeBERTa without, under the base model's own names; RoBERTa
    under the names of the masked language model, with a head that a classifier does not have.
    """
    directory = Path(parent) / name
    if not directory.exists():
        model = (AutoModelForMaskedLM if name == "roberta" else AutoModel).from_config(
            tiny_encoder_config(name)
        )
        _draw_parameters(model, torch.Generator().manual_seed(len(name)))
        model.save_pretrained(directory)
        tiny_encoder_tokenizer(name).save_pretrained(directory)
    return directory


def tiny_encoder_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes between the special tokens of the real ones;
    BERT's tells the second text of a pair by segments.
    """
    start, end = ("<s>", "</s>") if name == "roberta" else ("[CLS]", "[SEP]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [start, "<pad>", end]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 20,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    roberta = name == "roberta"
    tokenizer.post_processor = (processors.RobertaProcessing if roberta else processors.BertProcessing)(
        (end, 2), (start, 0)
    )
    inputs = ["input_ids", "attention_mask"] if roberta else ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token=start,
        sep_token=end,
        model_input_names=inputs,
    )


# ---------------------------------------------------------------------- vision

VISION = ("vit", "deit", "beit", "dinov2", "swin")


def tiny_vision_config(name: str, **more) -> PreTrainedConfig:
    """The config of one of VISION, for images of 16 x 16 in patches of 4 x 4; without anything random in
    training.
    """
    sizes = (
        dict(image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | more
    )
    flat = dict(hidden_size=60, num_hidden_layers=3, num_attention_heads=6, initializer_range=0.05)
    if name == "vit":
        return ViTConfig(**flat, **sizes, intermediate_size=131)
    if name == "deit":
        return DeiTConfig(**flat, **sizes, intermediate_size=131)
    if name == "beit":
        return BeitConfig(
            **flat, **sizes, intermediate_size=131, drop_path_rate=0.0, use_relative_position_bias=True
        )
    if name == "dinov2":  # positions are interpolated: it was trained on larger images
        return Dinov2Config(**flat, **(sizes | {"image_size": 28}), mlp_ratio=2)
    if name == "swin":  # widths that grow, and windows
        return SwinConfig(
            **sizes, embed_dim=12, depths=[1, 2], num_heads=[2, 4], window_size=2, drop_path_rate=0.0,
            initializer_range=0.05,
        )  # fmt: skip
    raise KeyError(name)


def tiny_vision_dir(name: str, parent: Path, head: int | None = None) -> Path:
    """Saves one of VISION with its image processor to `parent / name`, unless it is there, and returns the
    directory.

    head: of how many labels; None for the base model alone, as ViT-B/16 is published after ImageNet-21k.
    """
    directory = Path(parent) / name
    if not directory.exists():
        config = tiny_vision_config(name, **({} if head is None else {"num_labels": head}))
        config.architectures = []  # DeiT has several
        cls = AutoModel if head is None else AutoModelForImageClassification
        model = cls.from_config(config)
        _draw_parameters(model, torch.Generator().manual_seed(len(name)))
        model.save_pretrained(directory)
        tiny_image_processor().save_pretrained(directory)
    return directory


def tiny_image_processor(**more) -> ViTImageProcessorPil:
    """Images of 16 x 16, normalised by channel."""
    return ViTImageProcessorPil(
        **{"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}
        | more
    )


@torch.no_grad()
def _draw_parameters(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Matrices of unit gain, so that hidden states keep their size; norms and biases with a spread of 0.1."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
