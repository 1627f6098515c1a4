"""Kinds of models that are told by config and class, before any weights are there: every refusal is one
sentence.
"""

import pytest
import torch
import transformers

from distlora.errors import UserError
from distlora.models import loading
from distlora.models.generation import generate
from distlora.models.kinds import reads_the_last_token
from distlora.models.loading import bare_model, load_config, load_tokenizer
from distlora.recipe.sections import ModelSection
from tests.tiny_models import VOCAB_SIZE, _draw_parameters
from tests.tiny_zoo import _TEXT, _VISION, zoo_model

_IDS = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_TOWER = dict(_VISION, qkv_bias=True)
_OPT = dict(
    model_type="opt", **_IDS, hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=2,
    word_embed_proj_dim=24,
)  # fmt: skip
_QFORMER = dict(
    vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    encoder_hidden_size=24,
)  # fmt: skip
LABELS = ("no", "yes")


def saved(config, folder, checkpointing=False) -> ModelSection:
    config.save_pretrained(folder)
    return ModelSection(path=str(folder), dtype="float32", gradient_checkpointing=checkpointing)


@pytest.mark.parametrize(
    "config",
    [
        transformers.Blip2Config(text_config=_OPT, vision_config=_TOWER, qformer_config=_QFORMER),
        transformers.InstructBlipConfig(text_config=_OPT, vision_config=_TOWER, qformer_config=_QFORMER),
        transformers.Kosmos2Config(),
    ],
)
def test_models_that_always_want_an_image_are_refused(tmp_path, config):
    with pytest.raises(UserError, match="always wants pixel_values, and is given texts alone here"):
        load_config(saved(config, tmp_path))


def test_a_class_without_a_pass_for_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match="OmniForConditionalGeneration always wants more than tokens"):
        load_config(saved(transformers.Qwen2_5OmniConfig(), tmp_path))


def test_checkpointing_that_a_class_does_not_have_is_refused(tmp_path):
    config = transformers.CTRLConfig(**_IDS, n_positions=64, n_embd=32, dff=48, n_layer=1, n_head=4)
    assert load_config(saved(config, tmp_path)).model_type == "ctrl"
    with pytest.raises(UserError, match="gradient_checkpointing=true: CTRLLMHeadModel of .* has none"):
        load_config(saved(config, tmp_path, checkpointing=True))


def test_a_model_without_a_vocabulary_is_refused(tmp_path):
    section = saved(transformers.CanineConfig(), tmp_path)
    for action in (lambda: load_config(section, LABELS), lambda: load_tokenizer(section)):
        with pytest.raises(UserError, match="the type canine has no vocabulary in its config"):
            action()


def test_a_package_that_is_missing_is_named():
    with pytest.raises(UserError, match="^model.path=here: a package is missing: Tower requires the timm"):
        with loading.explained("here"):
            raise ImportError("\nTower requires the timm library but it was not found.\n`pip install timm`")


@pytest.mark.parametrize("embeddings", [None, torch.nn.Parameter(torch.ones(3)), torch.nn.Identity()])
def test_other_embeddings_than_a_table_are_refused(tmp_path, monkeypatch, embeddings):
    section = saved(transformers.LlamaConfig(**_TEXT), tmp_path)
    assert bare_model(section).get_input_embeddings().weight.is_meta
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "get_input_embeddings", lambda model: embeddings, raising=False
    )
    with pytest.raises(UserError, match="LlamaForCausalLM has no table of token embeddings"):
        bare_model(section)


@pytest.mark.parametrize(
    ("config", "reads"),
    [
        (transformers.GPT2Config(), True),
        (transformers.LlamaConfig(), True),
        (transformers.Mistral4Config(), True),  # its causal model is a part of a wrapper
        (transformers.RobertaConfig(), False),
        (transformers.BertConfig(), False),
    ],
)
def test_classifiers_that_read_the_last_token_are_told_how_texts_are_padded(config, reads):
    assert reads_the_last_token(config, LABELS) is reads


# ---------------------------------------------------------------------- answers


def rwkv():
    sizes = dict(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**_IDS, **sizes, context_length=64))


def xlstm():
    return transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(**_IDS, hidden_size=32, num_blocks=1, num_heads=4)
    )


@pytest.mark.parametrize("make", [rwkv, xlstm, lambda: zoo_model("mamba")])
def test_no_padding_enters_the_state_of_a_recurrent_model(make):
    model, prompts = make(), [[11, 12, 13, 14, 15], [21, 22, 23], [7, 8], [9, 10]]
    _draw_parameters(model, torch.Generator().manual_seed(3))
    model.eval()
    wanted = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(4):
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
            wanted.append(tokens[len(prompt) :])
    calls = []
    assert generate(model, prompts, 4, set(), 0, agree=lambda more: calls.append(more) or more) == wanted
    assert calls[-1] is False and all(calls[:-1])
