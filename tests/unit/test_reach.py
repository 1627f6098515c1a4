"""Layers that no adapter would train, found by a pass of the model without weights."""

import pytest
import torch
import transformers
from torch import nn

from distlora import UserError
from distlora.adapter.attach import linears_to_pack
from distlora.adapter.linears import linears_of
from distlora.adapter.reach import pattern_of, reach_of
from distlora.adapter.targets import choose
from distlora.methods import registry
from distlora.methods.lora import LoRA
from tests.tiny_models import tiny_config, tiny_encoder_config

IDS = {"input_ids": torch.ones(1, 2, dtype=torch.int64, device="meta")}


def bare(config, auto=transformers.AutoModelForCausalLM):
    with torch.device("meta"):
        return auto.from_config(config).eval()


def reach_in(model, **more):
    return reach_of(model, lambda: model(**IDS, **more).logits.sum())


def unreached(model, reach) -> set[str]:
    return {pattern_of(name) for name in linears_of(model) if reach.obstacle(name)}


small = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
CONFIGS = {
    "mamba": (transformers.MambaConfig(**small, state_size=4), {"backbone.layers.*.mixer.dt_proj"}),
    "falcon_mamba": (
        transformers.FalconMambaConfig(**small, state_size=4), {"backbone.layers.*.mixer.dt_proj"},
    ),
    "jamba": (
        transformers.JambaConfig(
            **small, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_d_state=4,
        ),
        {"model.layers.*.mamba.dt_proj"},
    ),
    "mamba2": (
        transformers.Mamba2Config(**small, state_size=4, num_heads=8, head_dim=8, n_groups=1), set(),
    ),
    "llama": (tiny_config("llama"), set()),
    "gpt2": (transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), set()),
    "mixtral": (
        transformers.MixtralConfig(
            **small, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
        ),
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_whose_weight_is_used_without_a_call_are_found(name):
    config, wanted = CONFIGS[name]
    model = bare(config)
    reach = reach_in(model)
    assert reach.used is not None and unreached(model, reach) == wanted
    choice = choose(model, LoRA(rank=2), reach=reach)
    assert all(("dt_proj" in line and "is never called" in line) for line in choice.lines())
    for pattern in wanted:
        part = pattern.rsplit(".", 1)[-1]
        with pytest.raises(UserError, match=rf"{part} \(Linear\) is never called: the model multiplies"):
            choose(model, LoRA(rank=2), ["in_proj", part], reach=reach)
        # The weight itself can be trained.
        assert any(part in layer for layer in choose(model, registry()["full"](), [part], reach=reach).layers)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_every_layer_of_a_classifier_is_reached(name):
    model = bare(tiny_encoder_config(name), transformers.AutoModelForSequenceClassification)
    assert unreached(model, reach_in(model)) == set()


def test_a_pooler_that_is_called_for_nothing_is_left_out():
    config = transformers.BigBirdConfig(
        **small, num_attention_heads=4, intermediate_size=32, attention_type="original_full"
    )
    model = bare(config, transformers.AutoModelForSequenceClassification)
    reach = reach_in(model)
    assert unreached(model, reach) == {"bert.pooler"}
    with pytest.raises(
        UserError, match="bert.pooler .* is called, but no output depends on it; leave it out"
    ):
        choose(model, LoRA(rank=2), ["bert.pooler"], reach=reach)


class Seeing(nn.Module):
    """A text model with a tower for images, which a text does not reach, and attention of torch's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.tower = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(2))
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(2))
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 9)

    def forward(self, ids, pixels=None):
        x = self.embed(ids)
        for block in self.tower if pixels is not None else ():
            x = x + block["q"](pixels)
        for block in self.layers:
            x = x + block["q"](x)
        return self.head(x + self.attention(x, x, x)[0])


def test_a_tower_that_no_text_reaches_and_attention_of_torch():
    with torch.device("meta"):
        model = Seeing().eval()
    reach = reach_of(model, lambda: model(IDS["input_ids"]).sum())
    assert unreached(model, reach) == {"tower.*.q", "attention.out_proj"}
    choice = choose(model, LoRA(rank=2), reach=reach)
    assert list(choice.layers) == ["layers.0.q", "layers.1.q", "head"]
    assert any("tower.*.q (2 layers) is never reached" in line for line in choice.lines())
    assert any("attention.out_proj does not compute" in line for line in choice.lines())
    # A last part that also means layers of the text model brings these alone.
    assert list(choose(model, LoRA(rank=2), ["q"], reach=reach).layers) == ["layers.0.q", "layers.1.q"]
    for targets in (["tower"], ["q", "tower.1.q"], ["tower.*"]):
        with pytest.raises(UserError, match=r"tower\.[01]\.q .* is never reached by an input of this task"):
            choose(model, LoRA(rank=2), targets, reach=reach)


class Routed(nn.Module):
    """Experts in a list, of which values choose; the code asks in three ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.experts, self.idle = (
            way,
            nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        chosen, out = x.argmax(-1) % 3, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if self.way == "any" and mask.any():
                out = out + expert(x) * mask[:, None]
            if self.way == "where":
                rows = torch.where(mask)[0]
                out = out.index_add(0, rows, expert(x[rows]))
            if self.way == "count" and mask.sum().item() > 0:
                out = out + torch.where(mask[:, None], expert(x), 0.0)
        return out if self.way != "mask" else out + self.experts[0](x[chosen == 0]).sum()


@pytest.mark.parametrize("way", ["any", "where", "count", "mask"])
def test_experts_that_values_choose_count_as_called(way):
    with torch.device("meta"):
        model = Routed(way)
        given = torch.ones(5, 8)
    reach = reach_of(model, lambda: model(given).sum())
    assert unreached(model, reach) == {"idle"}


def test_courses_that_follow_from_numbers_alone_are_not_in_question():
    """A layer for texts that are longer than ever is not called, and no other member of a group counts."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            positions = torch.arange(x.shape[0], device=x.device)
            return self.layers[int((positions > 4).any())](x)

    with torch.device("meta"):
        model, given = Counting(), torch.ones(5, 8)
    assert unreached(model, reach_of(model, lambda: model(given).sum())) == {"layers.*"}
    assert reach_of(model, lambda: model(given).sum()).called == {"layers.0"}


def test_a_pass_that_cannot_be_made_leaves_everything_open():
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x) * len(x.untyped_storage().tolist())

    with torch.device("meta"):
        model = Numbers()
    assert reach_of(model, lambda: model(torch.ones(2, 4, device="meta")).sum()) is None
    assert list(choose(model, LoRA(rank=2), reach=None).layers) == ["first"]


def test_nothing_stays_behind():
    model = bare(tiny_config("llama"))
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    reach_in(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_weight_that_the_model_reads_by_itself_is_not_packed():
    model = bare(CONFIGS["mamba"][0])
    reach = reach_in(model)
    read = {name for name in linears_of(model) if reach.read_by_others(name)}
    assert read == {f"backbone.layers.{block}.mixer.dt_proj" for block in range(2)}
    packed = linears_to_pack(model, whole=read)
    assert len(packed) == 6 and not read & set(packed)
    with torch.device("meta"):
        seeing = Seeing()
    assert "attention.out_proj" not in linears_to_pack(seeing) and "tower.0.q" in linears_to_pack(seeing)
