"""Passes without weights: which tensors have values, how many positions a model has, what its texts need."""

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, GPTJConfig

from distlora.maths.known_values import known_values
from distlora.models.dry_run import end_of_text, needs_end, ordinary_text, position_limit
from tests.tiny_zoo import ZOO, zoo_model

#: The models with a table of positions, and how many these are: by the class, not by the table's rows alone.
LIMITS = {
    "gpt2": 128, "gpt_neo": 128, "gpt_bigcode": 128, "opt": 128, "bart": 128, "bert": 64, "roberta": 64,
}  # fmt: skip
#: Rotary, relative, linearly biased, bucketed, and no positions at all.
WITHOUT = ("llama", "gemma3", "qwen2_5_vl", "gpt_oss", "falcon", "deberta", "modernbert", "t5", "mamba")


def bare(name, labels=None):
    """A model of the zoo without weights; with labels, a classifier of the same type."""
    config = ZOO[name].config()
    with torch.device("meta"):
        if labels:
            config.num_labels = labels
            return AutoModelForSequenceClassification.from_config(config)
        return getattr(transformers, ZOO[name].model_class)(config)


# ---------------------------------------------------------------------- values


def test_what_is_made_of_numbers_has_values():
    with known_values() as mode:
        positions = torch.arange(6, device="meta").reshape(2, 3)
        mask = positions > 2
        assert bool(mask.any()) and not bool(mask.all()) and positions.sum().item() == 15
        assert mode.value(positions[mask]).tolist() == [3, 4, 5]
        positions[0] += 10
        assert mode.value(positions).tolist() == [[10, 11, 12], [3, 4, 5]]
        assert mode.value((positions.float() / 2).tanh()).shape == (2, 3)
        assert torch.tensor([4, 5]).to("meta").max().item() == 5


def test_what_depends_on_weights_or_chance_has_none():
    weight = torch.empty(9, 4, device="meta")
    state = torch.get_rng_state()
    with known_values() as mode:
        ids = torch.tensor([1, 7]).to("meta")
        rows = torch.nn.functional.embedding(ids, weight)
        assert rows.shape == (2, 4) and mode.value(rows) is None
        assert [(found.rows, found.last) for found in mode.looked_up] == [(9, 7)]
        assert rows[ids > 3].shape == (1, 4)  # how many there are is known
        numbers = torch.zeros(3, device="meta")
        numbers.normal_()
        assert mode.value(numbers) is None
        numbers = torch.zeros(3, device="meta")
        numbers.add_(weight[0, :3])
        assert mode.value(numbers) is None
        with pytest.raises(RuntimeError):
            weight.sum().item()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_changed_in_place_has_no_values_under_any_name():
    weight = torch.empty(9, 4, device="meta")
    with known_values() as mode:
        numbers, other = torch.zeros(3, device="meta"), torch.zeros(3, device="meta")
        view = other.view(3)
        numbers[0:1] = weight[0, :1]
        other.add_(weight[0, :3])
        assert mode.value(numbers) is None and mode.value(view) is None
        kept = torch.zeros(3, device="meta")
        torch.add(kept, weight[0, :3])
        assert mode.value(kept).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_of_a_table_of_positions(name):
    assert position_limit(bare(name)) == LIMITS[name]
    assert position_limit(bare(name, labels=2)) == LIMITS[name]


@pytest.mark.parametrize("name", WITHOUT)
def test_models_without_a_table_have_no_limit(name):
    assert position_limit(bare(name, labels=2) if name == "t5" else bare(name)) is None


@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "gptj"])
def test_one_token_more_than_the_limit_fails(name):
    if name == "gptj":  # its rotary positions come from a table
        sizes = dict(n_positions=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=331)
        model = transformers.GPTJForCausalLM(GPTJConfig(**sizes)).eval()
    else:
        model = zoo_model(name)
    limit = position_limit(model)
    ids = torch.full((1, limit + 1), 9)
    model(input_ids=ids[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_a_model_that_cannot_be_run_without_weights_is_asked_as_far_as_it_goes():
    """Switch Transformers' routers, for one, decide by values; here a layer does."""
    model = bare("gpt2")

    class Deciding(type(model)):
        def __init__(self, config):
            super().__init__(config)
            self.transformer.ln_f.register_forward_hook(lambda module, args, result: bool(result.sum() > 0))

    with torch.device("meta"):
        model = Deciding(model.config)
    assert position_limit(model) == 128


@pytest.mark.parametrize("tokens", (48, 61))
def test_biases_that_are_stored_for_some_positions_have_a_limit(tokens):
    """MPT makes as many as its config says, and takes those of the text's length."""
    sizes = dict(d_model=32, n_heads=4, n_layers=1, vocab_size=100, max_seq_len=tokens)
    model = transformers.MptForCausalLM(transformers.MptConfig(**sizes))
    assert position_limit(model) == tokens
    model(input_ids=torch.ones(1, tokens, dtype=torch.long))
    with pytest.raises(RuntimeError):
        model(input_ids=torch.ones(1, tokens + 1, dtype=torch.long))


def test_a_length_that_a_config_names_and_the_class_does_not_use_is_no_limit():
    """DBRX has MPT's name for it, and rotary positions."""
    sizes = dict(d_model=32, n_heads=4, n_layers=1, vocab_size=100, max_seq_len=48)
    attention = dict(kv_n_heads=2, rope_theta=10_000.0, clip_qkv=8.0)
    experts = dict(ffn_hidden_size=32, moe_num_experts=2, moe_top_k=1)
    config = transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts)
    with torch.device("meta"):
        assert position_limit(transformers.DbrxForCausalLM(config)) is None


def test_a_value_that_is_missing_beyond_some_length_is_no_limit():
    """Positions are stored, and a longer text gets new ones, if a bias of the weights asks for it."""

    class Deciding(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **more):
            tokens = input_ids.shape[1]
            stored = torch.arange(32, device=input_ids.device)[:tokens]
            if tokens > 32 and bool(self.lm_head.weight.sum() > 0):
                raise RuntimeError("too long")
            return super().forward(input_ids, position_ids=stored[None] if tokens <= 32 else None, **more)

    config = bare("llama").config
    with torch.device("meta"):
        assert position_limit(Deciding(config)) is None


def fnet():
    """Its positions are a stored row, of which a longer text gets all; its Fourier transform has no kernel
    for bfloat16.
    """
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    return transformers.FNetForSequenceClassification(
        transformers.FNetConfig(**sizes, max_position_embeddings=64)
    )


def test_a_table_whose_stored_positions_are_cut_has_a_limit():
    assert position_limit(fnet()) == 64
    with pytest.raises(RuntimeError):
        fnet()(input_ids=torch.ones(1, 65, dtype=torch.long))


def test_a_config_without_an_end_token_has_texts_without_one():
    sizes = dict(vocab_size=100, hidden_size=32, embedding_size=32, num_hidden_layers=1)
    more = dict(num_attention_heads=4, intermediate_size=48, true_hidden_size=32, max_position_embeddings=64)
    config = transformers.MobileBertConfig(**sizes, **more, intra_bottleneck_size=32)
    assert not hasattr(config, "eos_token_id") and end_of_text(config) is None
    model = transformers.MobileBertForSequenceClassification(config)
    assert (position_limit(model), needs_end(model)) == (64, False)


@pytest.mark.parametrize("place", ["made", "run"])
@pytest.mark.parametrize("error", [AttributeError, TypeError, ImportError])
def test_what_a_class_cannot_do_without_weights_is_no_error(place, error):
    def fail():
        if torch.get_default_device().type == "meta" or place == "run":
            raise error("not here")

    class Failing(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            if place == "made":
                fail()

        def forward(self, *inputs, **named):
            fail()

    model = Failing(ZOO["llama"].config())
    assert position_limit(model) is None and not needs_end(model)


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("name", "needed"), [("bart", True), ("t5", True), ("bert", False), ("llama", False)]
)
def test_classifiers_that_look_for_the_end_of_a_text(name, needed):
    assert needs_end(bare(name, labels=2)) is needed


def test_an_ordinary_text_has_no_special_token_but_its_end():
    config = ZOO["gemma3"].config()
    with known_values() as mode:
        text = {key: mode.value(value) for key, value in ordinary_text(config, 5).items()}
        without = mode.value(ordinary_text(config, 5, ends=False)["input_ids"])
    special = {config.text_config.pad_token_id, config.text_config.bos_token_id, config.image_token_id}
    *ordinary, end = text["input_ids"][0].tolist()
    assert end == end_of_text(config) == 2 and text["attention_mask"].all()
    assert len(set(ordinary)) == 1 and not set(ordinary) & (special | {end})
    assert end not in without
