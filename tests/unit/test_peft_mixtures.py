"""PEFT computes with every adapted layer of a mixture of experts: also with those of dense blocks."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

import distlora
from distlora.exports.exported import AdapterSource
from distlora.exports.peft import write_peft_adapter
from distlora.exports.peft_files import read_peft
from distlora.exports.sources import Compressed
from tests.tiny_zoo import zoo_model_dir

KIND = "qwen3_moe_dense"
IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(3))


def _load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=IDS).logits


def _trained(base, targets, **options):
    """An adapter whose factors are all random."""
    adapted = distlora.attach(_load(base), options.pop("method", "lora"), targets=targets, rank=3, **options)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, steps=2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return adapted


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear", "experts"], ["gate_proj"]])
def test_dense_blocks_of_a_mixture_keep_their_adapters(targets, tmp_path):
    from peft import PeftModel

    base = zoo_model_dir(KIND, tmp_path)
    adapted = _trained(base, targets)
    wanted, out = _logits(adapted.model), tmp_path / "peft"
    distlora.export(adapted, out, base_model=base)
    found = PeftModel.from_pretrained(_load(base), out)
    torch.testing.assert_close(_logits(found), wanted, rtol=1e-3, atol=1e-4)
    assert read_peft(out).layers.keys() == adapted.layers.keys()


def test_a_rank_of_its_own_is_found(tmp_path):
    """One of the layers needs fewer columns than the others."""
    from peft import PeftModel

    base, name = zoo_model_dir(KIND, tmp_path), "model.layers.0.mlp.up_proj"
    adapted = _trained(base, ["q_proj", "v_proj", "up_proj"])
    with torch.no_grad():
        adapted.layers[name].A[0] = 0
    wanted, out, cut = _logits(adapted.model), tmp_path / "peft", tmp_path / "cut"
    distlora.export(adapted, out, base_model=base)
    cut.mkdir()
    write_peft_adapter(
        cut, Compressed(AdapterSource(out), torch.float32, max_error=1e-4), str(base), 0.0, torch.float32
    )
    config, found = json.loads((cut / "adapter_config.json").read_text()), read_peft(cut)
    assert f"{name}.weight" in config["target_parameters"] and found.pair(name).right.shape[0] == 2
    update = adapted.layers[name].method.export_low_rank(adapted.layers[name].factors())
    pair = found.pair(name)
    torch.testing.assert_close(pair.left @ pair.right, (update.left @ update.right).detach())
    torch.testing.assert_close(
        _logits(PeftModel.from_pretrained(_load(base), cut)), wanted, rtol=1e-3, atol=1e-4
    )


def test_what_peft_cannot_keep_of_dense_blocks_is_said(tmp_path, caplog):
    base, out = zoo_model_dir(KIND, tmp_path), tmp_path / "peft"
    with caplog.at_level(logging.INFO):
        distlora.export(_trained(base, ["q_proj", "gate_proj"], dropout=0.1), out, base_model=base)
        assert "PEFT has no dropout for model.layers.0.mlp.gate_proj of Qwen3MoeForCausalLM" in caplog.text
        assert json.loads((out / "adapter_config.json").read_text())["lora_dropout"] == 0
        distlora.export(_trained(base, ["q_proj"], dropout=0.1), out, base_model=base)
        assert json.loads((out / "adapter_config.json").read_text())["lora_dropout"] == 0.1
        distlora.export(_trained(base, ["gate_proj"], method="dora"), tmp_path / "dora", base_model=base)
    assert "PEFT loads no DoRA of layers such as model.layers.0.mlp.gate_proj" in caplog.text
