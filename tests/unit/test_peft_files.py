"""An adapter's files that are wrongly formed end in one sentence, before any base model is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distlora.errors import UserError
from distlora.exports.peft_files import read_peft

LAYER = "model.layers.0.q_proj"


def adapter(folder: Path, rank: int = 2, distlora: str | None = None, **config) -> Path:
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.ones(rank, 3),
        f"base_model.model.{LAYER}.lora_B.weight": torch.ones(4, rank),
    }
    save_file(
        tensors, folder / "adapter_model.safetensors", None if distlora is None else {"distlora": distlora}
    )
    content = {"peft_type": "LORA", "lora_alpha": 4, "r": rank} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_an_adapter_is_read_with_its_step_and_its_scaling(tmp_path):
    found = read_peft(adapter(tmp_path, distlora='{"step": 7}', alpha_pattern={"q_proj": 6}))
    pair = found.pair(LAYER)
    assert found.step == 7 and torch.equal(pair.left @ pair.right, torch.full((4, 3), 6.0))
    assert read_peft(adapter(tmp_path)).step == 0


@pytest.mark.parametrize("about", ["[]", "3", "null", '{"step": "x"}', '{"step": null}', '{"step": -1}', "{"])
def test_a_wrong_note_of_the_step_is_one_sentence(about, tmp_path):
    with pytest.raises(UserError, match=r"adapter_model.safetensors is broken \(.*export it again"):
        read_peft(adapter(tmp_path, distlora=about))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora_alpha": None}, f"the alpha of layer {LAYER} is null and no number"),
        ({"lora_alpha": "four"}, f'the alpha of layer {LAYER} is "four" and no number'),
        ({"lora_alpha": True}, "is true and no number"),
        ({"lora_alpha": float("nan")}, "is NaN and no number"),
        ({"lora_alpha": 10**400}, "and no number"),
        ({"alpha_pattern": {"q_proj": None}}, f"the alpha of layer {LAYER} is null and no number"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern has '(', which is no pattern"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern has '(', which is no pattern"),
        ({"alpha_pattern": [3]}, "alpha_pattern has no number for each pattern"),
        ({"rank_pattern": "q_proj"}, "rank_pattern has no number for each pattern"),
        ({"rank": 0}, f"layer {LAYER} has the rank 0"),
    ],
)
def test_a_wrong_config_is_one_sentence(wrong, said, tmp_path):
    with pytest.raises(UserError) as caught:
        read_peft(adapter(tmp_path, **wrong))
    assert said in str(caught.value) and "\n" not in str(caught.value)
