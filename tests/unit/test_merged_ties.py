"""A merged model cannot have a weight of its own in one of several blocks that its class makes one."""

import pytest
import torch
from transformers import Zamba2Config, Zamba2ForCausalLM

import distlora
from tests.tiny_models import VOCAB_SIZE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two of its blocks are one, but for adapters that the class has there itself."""
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=VOCAB_SIZE, hidden_size=60, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=128,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=4, mamba_d_conv=2,
        n_mamba_heads=6, mamba_ngroups=1, chunk_size=8, use_shared_mlp_adapter=True, adapter_rank=4,
        num_mem_blocks=1, use_mem_rope=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("zamba2")
    Zamba2ForCausalLM(config).save_pretrained(directory)
    return directory


def _adapted(base, targets):
    adapted = distlora.attach(Zamba2ForCausalLM.from_pretrained(base), "lora", targets=targets, rank=2)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, steps=1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.05
    return adapted


@pytest.mark.parametrize("target", ["gate_up_proj", "lm_head"])
def test_a_layer_that_cannot_be_separated_is_refused(base, target, tmp_path):
    with pytest.raises(distlora.UserError, match="shares its weight with .*; export with --format peft"):
        distlora.export(_adapted(base, [target]), tmp_path / "m", format="merged", base_model=base)
    assert list(tmp_path.iterdir()) == []


def test_its_other_layers_are_merged(base, tmp_path):
    adapted, ids = _adapted(base, ["in_proj"]), torch.arange(5, 14)[None]
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base)
    with torch.no_grad():
        wanted = adapted.model.eval()(input_ids=ids).logits
        found = Zamba2ForCausalLM.from_pretrained(out).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
