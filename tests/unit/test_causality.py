"""Whether tokens see those that follow them, by the model's own states."""

import pytest
import torch
import transformers

from distlora.engine.comm import Topology
from distlora.errors import UserError
from distlora.models.causality import sees_later_tokens
from distlora.training.train import train
from tests.tiny_models import VOCAB_SIZE, _draw_parameters, tiny_tokenizer
from tests.tiny_zoo import _GEMMA3, _TEXT, _VISION
from tests.unit.test_output import OTHERS, model_of
from tests.unit.test_train import short_recipe

_IDS = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _paligemma():
    vision = _VISION | dict(model_type="siglip_vision_model")
    config = transformers.PaliGemmaConfig(
        text_config=_TEXT | dict(model_type="gemma"), vision_config=vision, image_token_index=320,
        projection_dim=60,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


def _xlnet():
    config = transformers.XLNetConfig(**_IDS, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return transformers.XLNetLMHeadModel(config)


def _bert_generation():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return transformers.BertGenerationDecoder(transformers.BertGenerationConfig(**_IDS, **sizes))


BIDIRECTIONAL = {
    "paligemma": _paligemma,
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_GEMMA3, use_bidirectional_attention=True)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, is_causal=False)),
    "xlnet": _xlnet,
    "bert_generation": _bert_generation,
}


@pytest.mark.parametrize("name", BIDIRECTIONAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_see_later_ones_are_found(name, dtype):
    model = BIDIRECTIONAL[name]()
    _draw_parameters(model, torch.Generator().manual_seed(5))
    assert sees_later_tokens(model.to(dtype).eval())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5", "mixtral", "mamba", "gpt2", *OTHERS])
def test_tokens_of_causal_models_see_none(name):
    model = model_of(name)
    assert not sees_later_tokens(model)
    assert not sees_later_tokens(model.to(torch.bfloat16))


def test_a_run_of_a_model_whose_tokens_see_later_ones_is_refused(tmp_path):
    model = BIDIRECTIONAL["llama"]()
    _draw_parameters(model, torch.Generator().manual_seed(5))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="LlamaForCausalLM as configured tokens see"):
        train(short_recipe(tmp_path / "model", tmp_path)(), Topology())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
