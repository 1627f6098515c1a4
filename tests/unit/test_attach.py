"""Putting a method on a model: what is matched, what trains, what is refused."""

import pytest
import torch
import transformers

from distlora.adapter.attach import attach, lora_parameters
from distlora.adapter.layer import AdapterLinear
from distlora.errors import UserError
from distlora.methods import registry, writes_weight
from distlora.methods.full import Full
from distlora.methods.lora import LoRA
from distlora.methods.lora_sb import LoRASB

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = tuple(f"self_attn.{name}" for name in PROJECTIONS[:4])


def _llama(tied=True):
    """Three layers, grouped key/value heads, biases, odd sizes."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=60,
        intermediate_size=131,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def _bert():
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=60,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=131,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


NEW_HEAD = {"classifier.weight", "classifier.bias"}


def _trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _adapters(model):
    return {name for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


# ---------------------------------------------------------------------- matching


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_projection_without_embeddings_and_output_head(tied):
    model = _llama(tied)
    attached = attach(model, LoRA(rank=4), "all-linear")
    expected = {f"model.layers.{i}.{block}" for i in range(3) for block in ATTENTION}
    expected |= {f"model.layers.{i}.mlp.{name}" for i in range(3) for name in PROJECTIONS[4:]}
    assert set(attached.layers) == set(attached.targets) == _adapters(model) == expected
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        (["self_attn.q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["*.layers.2.self_attn.*"], [f"model.layers.2.{block}" for block in ATTENTION]),
        (["*.layers.[02].mlp.up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]),
        # in the model's order whatever the recipe's, each once
        (["down_proj", "*.0.mlp.down_proj", "*.0.*.v_proj"], ["model.layers.0.self_attn.v_proj"]
            + [f"model.layers.{i}.mlp.down_proj" for i in range(3)]),
        (["lm_head"], ["lm_head"]),  # only by its name
    ],
    ids=str,
)  # fmt: skip
def test_names_last_parts_and_patterns(targets, expected):
    model = _llama(tied=False)
    attached = attach(model, LoRA(rank=4), targets)
    assert attached.targets == list(attached.layers) == expected
    assert _adapters(model) == set(expected)


def test_a_last_part_is_whole():
    """`proj` is not `q_proj`, and `*` is needed for a part of a name."""
    with pytest.raises(UserError):
        attach(_llama(), LoRA(rank=4), ["proj"])
    assert len(attach(_llama(), LoRA(rank=4), ["*_proj"]).layers) == 21


# ---------------------------------------------------------------------- what trains, and names


@pytest.mark.parametrize(
    ("method", "factors"), [(LoRA(rank=4), ["A", "B"]), (LoRASB(rank=4), ["R"])], ids=["lora", "lora_sb"]
)
def test_exactly_the_factors_train(method, factors):
    model = _llama()
    attached = attach(model, method, ["q_proj", "up_proj"])
    expected = {f"{name}.{factor}" for name in attached.layers for factor in factors}
    assert len(attached.layers) == 6
    assert set(_trained(model)) == expected
    assert attached.trained == _trained(model)  # in the model's order


def test_base_keys_keep_their_names_and_values():
    model = _llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attach(model, LoRASB(rank=4), "all-linear")
    after = model.state_dict()
    assert "model.layers.0.self_attn.q_proj.weight" in before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.rsplit(".", 1)[1] for name in after.keys() - before.keys()} == {"A", "R", "B"}


def test_a_fresh_adapter_leaves_the_model_as_it_is():
    model = _llama().eval()
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    attach(model, LoRASB(rank=4), "all-linear")
    assert torch.equal(model(ids).logits, expected)
    model.train()


def test_the_attached_model_trains_under_gradient_checkpointing():
    model = _llama()
    attached = attach(model, LoRASB(rank=4), "all-linear")
    with torch.no_grad():
        for layer in attached.layers.values():
            for factor in layer.factors().values():
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    ids = torch.arange(12).reshape(2, 6)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert list(plain) == attached.trained and all(value.any() for value in plain.values())
    model.activation_checkpointing_enable({"use_reentrant": False})
    for name, value in gradients().items():
        torch.testing.assert_close(value, plain[name])


def test_full_trains_the_targets_themselves_and_replaces_nothing():
    model = _llama()
    attached = attach(model, Full(), ["q_proj"])
    assert attached.layers == {} and _adapters(model) == set()
    expected = {f"model.layers.{i}.self_attn.q_proj.{part}" for i in range(3) for part in ("weight", "bias")}
    assert set(attached.trained) == set(_trained(model)) == expected


# ---------------------------------------------------------------------- new heads


def test_a_new_head_trains_fully_and_is_not_adapted():
    model = _bert()
    attached = attach(model, LoRASB(rank=4), "all-linear", NEW_HEAD)
    assert type(model.classifier) is torch.nn.Linear
    assert (
        set(attached.trained) == set(_trained(model)) == NEW_HEAD | {f"{name}.R" for name in attached.layers}
    )
    assert (
        "bert.encoder.layer.0.attention.self.query" in attached.layers
        and "bert.pooler.dense" in attached.layers
    )
    assert len(attached.layers) == 3 * 6 + 1

    for layer in attached.layers.values():  # a gradient arrives at every one
        for factor in layer.factors().values():
            factor.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    model(torch.arange(12).reshape(2, 6), labels=torch.tensor([0, 2])).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == set(
        attached.trained
    )


def test_without_being_new_the_head_is_an_ordinary_linear_layer():
    attached = attach(_bert(), LoRASB(rank=3), "all-linear")
    assert "classifier" in attached.layers
    assert not NEW_HEAD & set(attached.trained)


def test_the_head_trains_where_other_layers_are_named():
    model = _bert()
    attached = attach(model, LoRA(rank=4), ["query", "value"], NEW_HEAD)
    assert len(attached.layers) == 6
    assert NEW_HEAD < set(attached.trained) and set(attached.trained) == set(_trained(model))


def test_a_new_head_is_no_target_even_if_a_pattern_matches_it():
    attached = attach(_bert(), LoRA(rank=3), ["*"], NEW_HEAD)
    assert "classifier" not in attached.layers and NEW_HEAD < set(attached.trained)
    with pytest.raises(UserError, match="classifier matches no linear layer"):
        attach(_bert(), LoRA(rank=3), ["classifier"], NEW_HEAD)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("q_porj", "q_proj"),
        ("gate_prj", "gate_proj"),
        ("model.layers.0.self_attn.q_prj", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_target_that_matches_nothing_names_the_nearest(target, near):
    with pytest.raises(UserError) as error:
        attach(_llama(), LoRA(rank=4), ["k_proj", target])
    sentence = str(error.value)
    assert target in sentence and f"did you mean {near}?" in sentence and "LlamaForCausalLM" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("target", ["*.layers.7.*", "zzz", "embed_tokens", "model.norm"])
def test_a_target_without_near_name_lists_what_there_is(target):
    with pytest.raises(UserError, match="matches no linear layer") as error:
        attach(_llama(), LoRA(rank=4), [target])
    assert target in str(error.value)
    if "did you mean" not in str(error.value):
        assert all(name in str(error.value) for name in PROJECTIONS)


def test_a_rank_above_a_layers_smaller_side_names_the_layer():
    """The key projection is 20 × 60: two heads of ten. all-linear leaves it out."""
    with pytest.raises(UserError) as error:
        attach(_llama(), LoRASB(rank=21), ["q_proj", "k_proj"])
    sentence = str(error.value)
    assert all(part in sentence for part in ("model.layers.0.self_attn.k_proj", "21", "20", "method.rank"))
    assert len(attach(_llama(), LoRASB(rank=20), "all-linear").layers) == 21
    wide = attach(_llama(), LoRASB(rank=21), "all-linear")
    assert len(wide.layers) == 15 and not any("k_proj" in name or "v_proj" in name for name in wide.layers)
    assert "model.layers.*.self_attn.k_proj (3 layers)" in wide.remarks[0]


@pytest.mark.parametrize(("rank", "targets"), [(4, ["q_proj", "q_porj"]), (99, "all-linear")])
def test_a_refused_attach_leaves_the_model_untouched(rank, targets):
    model = _llama()
    with pytest.raises(UserError):
        attach(model, LoRA(rank=rank), targets)
    assert _adapters(model) == set()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="Embedding has no linear layer"):
        attach(torch.nn.Embedding(3, 4), LoRA(rank=1), "all-linear")


@pytest.mark.parametrize("targets", [[], "all-linear"], ids=str)
def test_an_attach_that_would_adapt_nothing_is_refused(targets):
    """A model whose only linear layer is its output head, and an empty list: nothing would train."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.head

    with pytest.raises(UserError):
        attach(Head(), LoRA(rank=1), targets)


def test_parameters_of_an_ordinary_lora():
    model = _llama()
    attached = attach(model, LoRA(rank=4), "all-linear")
    shapes = {name: layer.shape for name, layer in attached.layers.items()}
    assert lora_parameters(shapes, 4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["pissa", "srlora", "lora_ga", "lora"])
def test_a_weight_that_is_used_twice_is_not_changed(name):
    """A tied embedding would change with the output head."""
    model = torch.nn.Module()
    model.embedding, model.head = torch.nn.Embedding(40, 30), torch.nn.Linear(30, 40, bias=False)
    model.head.weight = model.embedding.weight
    method = registry()[name](rank=4, **({"target_rank": 8} if name == "srlora" else {}))
    if writes_weight(method):
        with pytest.raises(UserError, match="head shares its weight"):
            attach(model, method, ["head"])
    else:
        assert list(attach(model, method, ["head"]).layers) == ["head"]
