"""The grammar of `targets`: names, exclusions and blocks, and the sentences for what is wrong with them."""

import pytest
import torch
import transformers
from torch import nn

from distlora import UserError
from distlora.adapter.attach import attach
from distlora.adapter.coverage import coverage
from distlora.adapter.targets import Targets, choose, in_ranges, in_short
from distlora.methods import registry
from distlora.methods.lora import LoRA
from distlora.methods.srlora import SRLoRA
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def llama():
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))


def names(model, targets, method=None):
    return list(choose(model, method or LoRA(rank=4), targets).layers)


def sentence(model, targets, method=None) -> str:
    with pytest.raises(UserError) as error:
        choose(model, method or LoRA(rank=4), targets)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("targets", "count", "without"),
    [
        ({"include": "all-linear"}, 21, "lm_head"),
        ({"exclude": ["o_proj"]}, 18, "o_proj"),
        ({"exclude": ["mlp"]}, 12, "mlp"),  # everything in what is called so
        ({"exclude": ["*.layers.0.*", "k_proj"]}, 12, "layers.0."),
        ({"exclude": "o_proj"}, 18, "o_proj"),
        ({"exclude": ["lm_head"]}, 21, "lm_head"),
        ({"layers": "1-2"}, 14, "layers.0."),
        ({"layers": 1}, 7, "layers.0."),
        ({"layers": [0, "2"]}, 14, "layers.1."),
        ({"include": ["q_proj", "mlp"], "layers": "0-1", "exclude": ["gate_proj"]}, 6, "gate_proj"),
        ("self_attn", 12, "mlp"),
        (["self_attn.q_proj", "model.layers.1.mlp"], 6, "layers.1.self_attn.o_proj"),
    ],
    ids=str,
)
def test_exclusions_and_blocks(llama, targets, count, without):
    chosen = names(llama, targets)
    assert len(chosen) == count and not any(without in name for name in chosen)
    order = [name for name, _ in llama.named_modules()]
    assert chosen == sorted(chosen, key=order.index)


def test_a_mapping_and_its_short_form_are_the_same(llama):
    assert names(llama, ["q_proj"]) == names(llama, Targets(include=["q_proj"])) == names(llama, "q_proj")
    assert Targets.of({"layers": "0-1"}) == Targets(layers="0-1")


def test_attach_takes_the_same_forms():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    assert attach(model, LoRA(rank=2), {"exclude": ["b"]}).targets == ["a"]


# ---------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"exlude": ["q_proj"]}, "targets: unknown key exlude, did you mean exclude?"),
        ({"exclude": ["q_porj"]}, "targets.exclude: q_porj matches no linear layer of LlamaForCausalLM, did"),
        ({"exclude": ["zzz"]}, "targets.exclude: zzz matches no linear layer of LlamaForCausalLM; it has"),
        ({"layers": "2-5"}, "targets.layers: LlamaForCausalLM has no layer 3-5; it has 0-2"),
        ({"layers": 7}, "targets.layers: LlamaForCausalLM has no layer 7; it has 0-2"),
        ({"layers": "two"}, "targets.layers: found two, wanted numbers from 0 on"),
        ({"layers": "2-1"}, "targets.layers: 2-1 is an empty range; the smaller number comes first"),
        ({"layers": -1}, "targets.layers: found -1, wanted numbers"),
        ({"layers": []}, "targets.layers: the list is empty"),
        ({"exclude": ["q_proj"], "include": ["q_proj"]}, "leaves no layer of LlamaForCausalLM to adapt"),
        (["q_proj", ""], "targets: ['q_proj', ''] has what is no name"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_one_sentence(llama, targets, said):
    assert said in sentence(llama, targets)


def test_blocks_of_a_model_without_numbers():
    model = nn.ModuleDict({"only": nn.Linear(4, 4)})
    assert sentence(model, {"layers": 0}, LoRA(rank=1)).endswith("has no layer 0; its layers have no numbers")


# ---------------------------------------------------------------------- wide enough


class Gated(nn.Module):
    """A block with a gate of one output, beside what is wide."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 32), "gate": nn.Linear(32, 1), "flag": nn.Linear(1, 32)})
            for _ in range(2)
        )


@pytest.mark.parametrize("method", sorted(set(registry()) - {"full"}))
def test_narrow_layers_are_left_out_of_all_linear_with_a_line(method):
    choice = choose(Gated(), registry()[method](rank=4))
    assert list(choice.layers) == ["layers.0.up", "layers.1.up"]
    assert choice.lines() == [
        "left without an adapter: layers.*.gate (2 layers), layers.*.flag (2 layers) are too narrow for the "
        "method's rank"
    ]


def test_full_fine_tuning_has_no_rank():
    assert len(choose(Gated(), registry()["full"]()).layers) == 6


@pytest.mark.parametrize(
    "targets", [["gate"], ["up", "gate"], ["layers.1.gate"], ["layers.0.gate", "up"]], ids=str
)
def test_a_narrow_layer_that_is_named_is_refused(targets):
    said = sentence(Gated(), targets)
    assert "gate: rank 4 is above min(out, in) = 1; lower method.rank or name other targets" in said


def test_a_name_that_also_means_wide_layers_is_not_refused():
    model = nn.ModuleDict(
        {"text": nn.ModuleDict({"q": nn.Linear(9, 9)}), "image": nn.ModuleDict({"q": nn.Linear(2, 2)})}
    )
    assert names(model, ["q"]) == ["text.q"]
    assert "layer image.q: rank 4" in sentence(model, ["text.q", "image.q"])


def test_an_open_size_is_that_of_the_narrowest_layer_that_is_adapted(llama):
    """Of the key projections, 20 wide; the gates of one row count nothing."""
    choice = choose(llama, SRLoRA(rank=8))
    assert choice.method.target_rank == 20 and len(choice.layers) == 21
    assert choose(Gated(), SRLoRA(rank=4)).method.target_rank == 16


# ---------------------------------------------------------------------- the line


def test_the_shares_add_up_and_a_shared_weight_counts_once(llama):
    line = coverage(llama, list(choose(llama, LoRA(rank=4)).layers))
    assert line.startswith("adapted 21 layers (") and "embed_tokens" in line and "lm_head" not in line
    first = float(line.split("(")[1].split(" %")[0])
    rest = [float(part.rsplit(" ", 2)[-2]) for part in line.split("adapter: ")[1].split(", ")]
    assert abs(first + sum(rest) - 100) < 0.3


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        ),
        transformers.Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, head_dim=8,
        ),
        transformers.GptOssConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, head_dim=8,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_experts_in_one_parameter_are_named_with_their_share(config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    line = coverage(model, list(choose(model, LoRA(rank=4)).layers))
    held = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    share = 100 * held / sum(p.numel() for p in model.parameters())
    assert f"experts {share:.1f} %" in line


def test_parts_of_the_model_that_are_trained_whole_are_told():
    model = nn.ModuleDict({"body": nn.Linear(10, 10, bias=False), "score": nn.Linear(10, 10, bias=False)})
    line = coverage(model, ["body"], {"score.weight"})
    assert line == "adapted 1 layers (50.0 % of the weights), trained whole: 50.0 %"


def test_words():
    assert in_ranges({5, 0, 1, 2}) == "0-2, 5" and in_ranges([3]) == "3"
    assert in_short(["a.0.q", "a.1.q", "b"]) == "a.*.q (2 layers), b"
