"""Tiny models of many classes, as directories that `from_pretrained` reads without a network: small random
weights, the class's own wiring, and as far as a class has them its caps, scales, biases and shared layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny_models import (
    VOCAB_SIZE,
    _draw_parameters,
    tiny_config,
    tiny_encoder_config,
    tiny_encoder_tokenizer,
    tiny_image_processor,
    tiny_tokenizer,
    tiny_vision_config,
)

LAYERS = 2

#: Of most decoders.
_TEXT = dict(
    vocab_size=VOCAB_SIZE, hidden_size=60, intermediate_size=131, num_hidden_layers=LAYERS,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, attention_dropout=0.0,
)  # fmt: skip
_WITHOUT_HEAD_DIM = {key: value for key, value in _TEXT.items() if key != "head_dim"}

#: Of a tower for images of 16 x 16 in patches of 4 x 4.
_VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=16,
    patch_size=4,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """config: makes the config. model_class: of transformers, as the checkpoint names it. tokenizer: one of
    tiny_models' tokenizers, "text:" or "encoder:" before its name; None for a model of images.
    """

    config: Callable[[], PreTrainedConfig]
    model_class: str
    tokenizer: str | None = "text:qwen2"

    @property
    def is_wrapper(self) -> bool:
        """Whether a model of text is one part of it, beside others."""
        return hasattr(self.config(), "vision_config")


def _of(name: str, **sizes) -> Callable[[], PreTrainedConfig]:
    """A config of transformers' class `name`."""
    return lambda: getattr(transformers, name)(**sizes)


def _qwen_vision(**more) -> dict:
    return dict(
        depth=2, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2,
    ) | more  # fmt: skip


#: PyTorch's grouped matrix product wants rows of a multiple of 16 bytes, in bfloat16, too.
_EXPERTS = _TEXT | dict(hidden_size=56, intermediate_size=40, num_experts_per_tok=2)
_QWEN_LINEAR = dict(
    linear_conv_kernel_dim=2, linear_key_head_dim=10, linear_value_head_dim=10, linear_num_key_heads=2,
    linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]}
_GEMMA3 = _TEXT | dict(
    query_pre_attn_scalar=10, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
_NO_DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
_ENCODER_DECODER = dict(vocab_size=VOCAB_SIZE, pad_token_id=1, eos_token_id=2)


def _gemma3() -> PreTrainedConfig:
    return transformers.Gemma3Config(
        text_config=_GEMMA3, vision_config=_VISION | dict(model_type="siglip_vision_model"),
        mm_tokens_per_image=4, image_token_index=320, boi_token_index=321, eoi_token_index=322,
        pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip


def _mistral3() -> PreTrainedConfig:
    return transformers.Mistral3Config(
        text_config=_TEXT | dict(model_type="mistral", sliding_window=None),
        vision_config=_VISION | dict(model_type="pixtral", head_dim=12),
        image_token_index=320, spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip


def _llava() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config=_TEXT | dict(model_type="llama"),
        vision_config=_VISION | dict(model_type="clip_vision_model", projection_dim=24),
        image_token_index=320, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen(name: str, vision: dict, **text) -> Callable[[], PreTrainedConfig]:
    ids = dict(image_token_id=320, video_token_id=321, vision_start_token_id=322, vision_end_token_id=323)
    return lambda: getattr(transformers, name)(
        text_config=_TEXT | dict(rope_parameters=_MROPE) | text, vision_config=vision, **ids
    )


ZOO: dict[str, Kind] = {
    "llama": Kind(lambda: tiny_config("llama"), "LlamaForCausalLM", "text:llama"),
    "mistral": Kind(lambda: tiny_config("mistral"), "MistralForCausalLM", "text:mistral"),
    "gemma2": Kind(lambda: tiny_config("gemma2"), "Gemma2ForCausalLM", "text:gemma2"),
    "gemma3_text": Kind(_of("Gemma3TextConfig", **_GEMMA3), "Gemma3ForCausalLM", "text:gemma2"),
    "gemma3": Kind(_gemma3, "Gemma3ForConditionalGeneration", "text:gemma2"),
    "mistral3": Kind(_mistral3, "Mistral3ForConditionalGeneration", "text:mistral"),
    "llava": Kind(_llava, "LlavaForConditionalGeneration", "text:llama"),
    "qwen2": Kind(lambda: tiny_config("qwen2"), "Qwen2ForCausalLM"),
    "qwen3": Kind(_of("Qwen3Config", **_TEXT), "Qwen3ForCausalLM"),
    "qwen3_moe": Kind(
        _of("Qwen3MoeConfig", **_EXPERTS, moe_intermediate_size=24, num_experts=4, mlp_only_layers=[]),
        "Qwen3MoeForCausalLM",
    ),
    "qwen3_moe_dense": Kind(
        _of("Qwen3MoeConfig", **_EXPERTS, moe_intermediate_size=24, num_experts=4, mlp_only_layers=[0]),
        "Qwen3MoeForCausalLM",
    ),
    "qwen3_5": Kind(
        _qwen("Qwen3_5Config", _qwen_vision(out_hidden_size=60, num_position_embeddings=16), **_QWEN_LINEAR),
        "Qwen3_5ForConditionalGeneration",
    ),
    "qwen3_vl": Kind(
        _qwen(
            "Qwen3VLConfig",
            _qwen_vision(out_hidden_size=60, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        ),
        "Qwen3VLForConditionalGeneration",
    ),
    "qwen2_5_vl": Kind(
        _qwen(
            "Qwen2_5_VLConfig", _qwen_vision(out_hidden_size=60, fullatt_block_indexes=[1], window_size=16)
        ),
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "mixtral": Kind(
        _of("MixtralConfig", **_EXPERTS, num_local_experts=4), "MixtralForCausalLM", "text:mistral"
    ),
    "gpt_oss": Kind(
        _of("GptOssConfig", **_EXPERTS, num_local_experts=4, sliding_window=8, rope_parameters=_YARN),
        "GptOssForCausalLM",
    ),
    "phi3": Kind(_of("Phi3Config", **_WITHOUT_HEAD_DIM), "Phi3ForCausalLM"),
    "gpt2": Kind(
        _of(
            "GPT2Config", vocab_size=VOCAB_SIZE, n_positions=128, n_embd=60, n_layer=LAYERS, n_head=6,
            bos_token_id=1, eos_token_id=2, **_NO_DROPOUT,
        ),
        "GPT2LMHeadModel",
    ),
    "gpt_neo": Kind(
        _of(
            "GPTNeoConfig", vocab_size=VOCAB_SIZE, hidden_size=60, intermediate_size=131, num_layers=LAYERS,
            attention_types=[[["global", "local"], 1]], num_heads=6, max_position_embeddings=128,
            window_size=8, bos_token_id=1, eos_token_id=2, attention_dropout=0.0, embed_dropout=0.0,
            resid_dropout=0.0,
        ),
        "GPTNeoForCausalLM",
    ),
    "gpt_bigcode": Kind(
        _of(
            "GPTBigCodeConfig", vocab_size=VOCAB_SIZE, n_embd=60, n_inner=131, n_layer=LAYERS, n_head=6,
            n_positions=128, bos_token_id=1, eos_token_id=2, **_NO_DROPOUT,
        ),
        "GPTBigCodeForCausalLM",
    ),
    "opt": Kind(
        _of(
            "OPTConfig", vocab_size=VOCAB_SIZE, hidden_size=60, ffn_dim=131, num_hidden_layers=LAYERS,
            num_attention_heads=6, max_position_embeddings=128, word_embed_proj_dim=60, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, dropout=0.0,
        ),
        "OPTForCausalLM",
    ),
    "falcon": Kind(
        _of(
            "FalconConfig", vocab_size=VOCAB_SIZE, hidden_size=60, num_hidden_layers=LAYERS,
            num_attention_heads=6, new_decoder_architecture=False, multi_query=True, parallel_attn=True,
            bos_token_id=1, eos_token_id=2, hidden_dropout=0.0, attention_dropout=0.0,
        ),
        "FalconForCausalLM",
    ),
    "stablelm": Kind(_of("StableLmConfig", **_WITHOUT_HEAD_DIM), "StableLmForCausalLM"),
    "olmo2": Kind(_of("Olmo2Config", **_WITHOUT_HEAD_DIM), "Olmo2ForCausalLM"),
    "cohere": Kind(_of("CohereConfig", **_WITHOUT_HEAD_DIM, logit_scale=0.25), "CohereForCausalLM"),
    "granite": Kind(
        _of(
            "GraniteConfig", **_WITHOUT_HEAD_DIM, logits_scaling=4.0, embedding_multiplier=3.0,
            residual_multiplier=0.5, attention_multiplier=0.2,
        ),
        "GraniteForCausalLM",
    ),
    "mamba": Kind(
        _of(
            "MambaConfig", vocab_size=VOCAB_SIZE, hidden_size=60, num_hidden_layers=LAYERS, state_size=4,
            conv_kernel=3, time_step_rank=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "MambaForCausalLM",
    ),
    "bert": Kind(lambda: tiny_encoder_config("bert"), "BertModel", "encoder:bert"),
    "roberta": Kind(lambda: tiny_encoder_config("roberta"), "RobertaForMaskedLM", "encoder:roberta"),
    "deberta": Kind(lambda: tiny_encoder_config("deberta"), "DebertaV2Model", "encoder:deberta"),
    "modernbert": Kind(
        _of(
            "ModernBertConfig", vocab_size=VOCAB_SIZE, hidden_size=60, intermediate_size=131,
            num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=128, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2, local_attention=8,
            global_attn_every_n_layers=3,
        ),
        "ModernBertModel", "encoder:deberta",
    ),
    "t5": Kind(
        _of(
            "T5Config", **_ENCODER_DECODER, d_model=60, d_kv=10, d_ff=131, num_layers=LAYERS,
            num_decoder_layers=LAYERS, num_heads=6, decoder_start_token_id=1, dropout_rate=0.0,
        ),
        "T5ForConditionalGeneration", "encoder:roberta",
    ),
    "bart": Kind(
        _of(
            "BartConfig", **_ENCODER_DECODER, d_model=60, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=131, decoder_ffn_dim=131,
            max_position_embeddings=128, bos_token_id=0, decoder_start_token_id=2, forced_eos_token_id=2,
            dropout=0.0,
        ),
        "BartForConditionalGeneration", "encoder:roberta",
    ),
    "vit": Kind(lambda: tiny_vision_config("vit"), "ViTModel", None),
}  # fmt: skip

#: The language models of the zoo, and the models that classify texts only.
DECODERS = tuple(name for name, kind in ZOO.items() if kind.tokenizer and kind.tokenizer.startswith("text:"))
CLASSIFIERS = ("bert", "roberta", "deberta", "modernbert", "t5", "bart")


def zoo_model(name: str) -> PreTrainedModel:
    """One of ZOO with random parameters, float32, in evaluation mode. All are drawn: whatever starts at zero
    or one in a fresh model would hide errors."""
    kind = ZOO[name]
    model = getattr(transformers, kind.model_class)(kind.config())
    _draw_parameters(model, torch.Generator().manual_seed(len(name)))
    return model.eval()


def zoo_model_dir(name: str, parent: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves one of ZOO, with its tokenizer or image processor, to `parent / name`, unless it is there, and
    returns the directory.
    """
    directory = Path(parent) / name
    if not directory.exists():
        zoo_model(name).to(dtype).save_pretrained(directory)
        _preprocessor(ZOO[name]).save_pretrained(directory)
    return directory


def _preprocessor(kind: Kind):
    if kind.tokenizer is None:
        return tiny_image_processor()
    family, _, name = kind.tokenizer.partition(":")
    if family == "text":
        return tiny_tokenizer(name)
    tokenizer = tiny_encoder_tokenizer(name)
    if hasattr(kind.config(), "decoder_start_token_id"):
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer
