"""How logits come about, asked of classes; and the loss of every one of them against the class's own."""

import logging

import pytest
import torch
import transformers
from torch.nn import functional as F

from distlora.models.dry_run import text_inputs
from distlora.models.likelihood import option_likelihoods
from distlora.models.losses import response_loss
from distlora.models.output import Output, output_of
from distlora.models.targets import IGNORE
from tests.tiny_models import VOCAB_SIZE, _draw_parameters
from tests.tiny_zoo import DECODERS, zoo_model

_SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_attention_heads=4, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_LOW_RANK = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)


def recurrent_gemma():
    """Its cap has another name than the others'."""
    config = transformers.RecurrentGemmaConfig(**_SIZES, num_hidden_layers=1, lru_width=64)
    return transformers.RecurrentGemmaForCausalLM(config)


def minicpm():
    """It divides hidden states, and not logits."""
    sizes = dict(num_hidden_layers=1, num_key_value_heads=4, max_position_embeddings=64, dim_model_base=16)
    return transformers.MiniCPM3ForCausalLM(transformers.MiniCPM3Config(**_SIZES, **sizes, **_LOW_RANK))


def falcon_h1():
    config = transformers.FalconH1Config(
        **_SIZES, num_hidden_layers=1, num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=8, lm_head_multiplier=0.3,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


def bert():
    """Layers of its own come before the output layer."""
    config = transformers.BertConfig(
        **_SIZES, num_hidden_layers=1, is_decoder=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertLMHeadModel(config)


OTHERS = {"recurrent_gemma": recurrent_gemma, "minicpm": minicpm, "falcon_h1": falcon_h1, "bert": bert}


def model_of(name):
    if name not in OTHERS:
        return zoo_model(name)
    model = OTHERS[name]()
    _draw_parameters(model, torch.Generator().manual_seed(5))
    return model.eval()


def batch(lengths=(9, 4, 7)):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    response = real & (torch.arange(max(lengths)) > 1)
    return {
        "input_ids": ids.where(real, 0),
        "attention_mask": real.long(),
        "labels": ids.where(response, IGNORE),
    }


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_the_loss_is_the_classes_own(name):
    model, rows = model_of(name).train(), batch()
    own = model(**text_inputs(model, rows), labels=rows["labels"], use_cache=False).loss
    loss, count = response_loss(model, rows)
    torch.testing.assert_close(loss / count, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["granite", "cohere", "minicpm", "recurrent_gemma", "gemma3", "qwen3_5"])
def test_its_gradients_are_the_classes_own(name):
    model, rows = model_of(name).train(), batch()
    tensors = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    own = model(**text_inputs(model, rows), labels=rows["labels"], use_cache=False).loss
    wanted = torch.autograd.grad(own, tensors, allow_unused=True)
    loss, count = response_loss(model, rows)
    for found, gradient in zip(torch.autograd.grad(loss / count, tensors, allow_unused=True), wanted):
        if gradient is None:  # of a tower that no text reaches
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["recurrent_gemma", "minicpm", "gemma3"])
def test_a_pass_without_response_is_connected_and_zero(name):
    model = model_of(name).train()
    ids = torch.full((1, 2), 9)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORE)}
    loss, count = response_loss(model, rows)
    loss.backward()
    assert (loss.item(), count) == (0, 0)
    assert not model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("name", ["granite", "recurrent_gemma", "gemma2", "qwen3_vl", "opt"])
def test_options_are_as_likely_as_the_class_says(name):
    model, prompt, option = model_of(name), [7, 8, 9], [10, 11]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + option]), use_cache=False).logits[0]
    wanted = -F.cross_entropy(logits[2:4].float(), torch.tensor(option), reduction="sum")
    assert option_likelihoods(model, [(prompt, option)], 0) == [pytest.approx(float(wanted), abs=1e-4)]


# ---------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("llama", Output("model")),
        ("gemma2", Output("model", softcap=2.0)),
        ("gemma3", Output("model")),
        ("opt", Output("model.decoder")),
        ("mamba", Output("backbone")),
        ("cohere", Output("model", scale=0.25)),
        ("granite", Output("model", scale=0.25)),
        ("minicpm", Output("model", scale=0.25)),
        ("falcon_h1", Output("model", scale=0.3)),
        ("recurrent_gemma", None),
        ("bert", None),
    ],
)
def test_how_logits_follow_from_hidden_states(name, output):
    found = output_of(model_of(name))
    if output is None:
        assert found is None
    else:
        assert (found.base, found.softcap) == (output.base, output.softcap)
        assert found.scale == pytest.approx(output.scale, rel=1e-6)


def test_logits_in_another_way_are_told_once(caplog):
    model = model_of("recurrent_gemma")
    with caplog.at_level(logging.INFO, logger="distlora"):
        output_of(model)
        output_of(model)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith(f"{type(model).__name__} makes its logits in a way of its own")


def test_logits_that_cannot_be_seen_without_weights_are_told_as_such(caplog):
    class Deciding(transformers.LlamaForCausalLM):
        def forward(self, *inputs, **named):
            outputs = super().forward(*inputs, **named)
            return outputs if outputs.logits.sum() + self.model.norm.weight.sum() else None

    with caplog.at_level(logging.INFO, logger="distlora"):
        assert output_of(Deciding(zoo_model("llama").config)) is None
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("how Deciding makes its logits could not be seen without weights")


@pytest.mark.parametrize("cap", [30.0, 250.0, 2000.0])
def test_a_high_cap_is_seen(cap):
    config = zoo_model("gemma2").config
    config.final_logit_softcapping = cap
    assert output_of(transformers.Gemma2ForCausalLM(config)).softcap == cap


def test_a_class_that_changes_some_logits_in_place_is_called_itself():
    model = zoo_model("llama")

    class Biased(type(model)):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Parameter(torch.full((5,), 3.0))

        def forward(self, *inputs, labels=None, **named):
            outputs = super().forward(*inputs, **named)
            outputs.logits[..., 10:15] += self.extra
            return outputs

    biased = Biased(model.config).eval()
    assert output_of(biased) is None


def test_a_class_that_gives_its_base_model_more_than_ids_and_mask_is_called_itself():
    model = zoo_model("llama")

    class Shifted(type(model)):
        def forward(self, input_ids=None, **named):
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + 3
            return super().forward(input_ids=input_ids, position_ids=positions, **named)

    shifted = Shifted(model.config)
    shifted.load_state_dict(model.state_dict())
    assert output_of(shifted) is None
    own = shifted(**text_inputs(shifted, batch()), labels=batch()["labels"], use_cache=False).loss
    loss, count = response_loss(shifted, batch())
    torch.testing.assert_close(loss / count, own, rtol=0, atol=1e-5)
