"""`target_modules` of an export: as few entries as there can be, which mean exactly the adapted layers."""

import json

import pytest
import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import distlora
from distlora.exports.suffixes import names_in, shortest_endings
from tests.tiny_zoo import zoo_model

Q = ["q_proj", "v_proj"]


def _exported(kind, targets, out, **options):
    model = zoo_model(kind)
    bare = names_in(model)
    adapted = distlora.attach(model, options.pop("method", "lora"), targets=targets, rank=2, **options)
    assert names_in(adapted.model) == bare  # what is ours in the model is none of the model's names
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, steps=2)
    distlora.export(adapted, out, base_model="someone/model")
    return adapted, json.loads((out / "adapter_config.json").read_text())


def _chosen_by_peft(kind, out):
    """Names of the layers, and parameters, that PEFT itself adapts."""
    model = inject_adapter_in_model(PeftConfig.from_pretrained(out), zoo_model(kind))
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            found.add(plain if parameter in (None, "weight") else f"{plain}.{parameter}")
    return found


@pytest.mark.parametrize(
    ("kind", "targets", "entries"),
    [
        ("llama", "all-linear", 7),
        ("llama", Q, 2),
        ("llama", {"include": Q, "layers": 1}, 2),  # of one block: whole names
        ("llama", {"include": "all-linear", "exclude": ["layers.0.self_attn.q_proj"]}, 8),
        ("gpt2", "all-linear", None),  # Conv1D; two layers are called c_proj
        ("gpt2", ["attn.c_proj"], 1),
        ("qwen3_moe", ["all-linear", "experts"], None),
        ("qwen3_moe", ["experts"], None),
        ("qwen3_moe_dense", ["all-linear", "experts"], None),
        ("mixtral", ["all-linear", "experts"], None),
        ("gemma3", "all-linear", None),
        ("phi3", "all-linear", 4),
    ],
    ids=str,
)
def test_peft_chooses_exactly_the_adapted_layers(kind, targets, entries, tmp_path):
    adapted, config = _exported(kind, targets, tmp_path / "peft")
    assert _chosen_by_peft(kind, tmp_path / "peft") == set(adapted.layers)
    if entries is not None:
        assert len(config["target_modules"]) == entries


def test_ends_of_names_stand_for_all_blocks(tmp_path):
    _, config = _exported("llama", Q, tmp_path / "all")
    assert config["target_modules"] == Q
    _, config = _exported("llama", {"include": Q, "layers": 1}, tmp_path / "one")
    assert config["target_modules"] == [f"model.layers.1.self_attn.{name}" for name in Q]
    _, config = _exported("gpt2", ["attn.c_proj"], tmp_path / "two")
    assert config["target_modules"] == ["attn.c_proj"]
    _, config = _exported("qwen3_moe", ["experts"], tmp_path / "experts")
    assert sorted(config["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]


NAMES = ["a.0.q", "a.0.k", "a.1.q", "a.1.k", "b.q", "a.0", "a.1", "a", "b"]


@pytest.mark.parametrize(
    ("wanted", "entries"),
    [
        (["a.0.q", "a.1.q", "b.q"], ["q"]),
        (["a.0.q", "a.1.q"], ["a.0.q", "a.1.q"]),  # b.q is not meant
        (["a.0.k", "a.1.k", "b.q"], ["k", "b.q"]),
        (["a.1.k"], ["a.1.k"]),
        (["b"], ["b"]),
        ([], []),
    ],
)
def test_the_fewest_entries_mean_the_wanted_names_alone(wanted, entries):
    assert shortest_endings(wanted, NAMES) == entries
