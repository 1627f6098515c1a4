"""Modules that are trained whole beside the adapter, from the recipe to what PEFT loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distlora import api
from distlora.adapter.trained_whole import trained_whole
from distlora.engine.comm import Topology
from distlora.errors import UserError
from distlora.training import train
from distlora.training.export_run import export_run
from tests.tiny_models import tiny_model_dir
from tests.unit.test_train import short_recipe

peft = pytest.importorskip("peft")
ALONE = Topology()


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request, tmp_path_factory) -> Path:
    """With tied and with untied embeddings."""
    return tiny_model_dir(request.param, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("method", ["lora", "lora_xs"])
def test_what_was_trained_is_what_peft_loads_and_what_is_merged(model, method, tmp_path):
    tied = "llama" in str(model)
    saved = "[embed_tokens, model.norm]" if tied else "[lm_head, post_attention_layernorm]"
    made = short_recipe(model, tmp_path)(
        f"method={{name: {method}, rank: 2, modules_to_save: {saved}}}", "train.steps=2"
    )
    train.check(made, ALONE, None)
    train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    names = {name.rpartition(".")[2] for name in config["modules_to_save"]}
    assert names == ({"embed_tokens", "lm_head", "norm"} if tied else {"lm_head", "post_attention_layernorm"})

    merged = export_run(run_dir, "merged", tmp_path / "merged")  # and compares the logits with the run's
    assert merged.difference < 1e-4
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, run_dir / "adapter")(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    assert (before - wanted).abs().max() > 1e-3

    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    trained = AutoModelForCausalLM.from_pretrained(merged.path).state_dict()[name]
    assert not torch.equal(trained, AutoModelForCausalLM.from_pretrained(model).state_dict()[name])
    again = train.train(made.model_copy(update={"train": made.train.model_copy(update={"steps": 2})}), ALONE)
    assert again.steps == 2


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 16)
        self.inner, self.act, self.head = torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 7)
        self.head.weight = self.embed.weight


def test_names_mean_modules_and_shared_weights_are_one():
    net = Net()
    assert trained_whole(net, ["head"]) == {"embed.weight", "head.bias"}
    assert trained_whole(net, ["embed"]) == {"embed.weight"}
    assert trained_whole(net, []) == set()
    adapted = api.attach(net, "lora", rank=2, modules_to_save=["head"], targets=["inner"])
    assert adapted.attached.trained == ["embed.weight", "inner.A", "inner.B", "head.bias"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["heed"], "Net has no module heed, did you mean head?"),
        (["act"], "act has no parameters to train; leave it out"),
        (["nothing_like_it"], "Net has no module nothing_like_it"),
    ],
)
def test_mistakes_end_in_a_sentence(names, says):
    with pytest.raises(UserError, match="^method.modules_to_save: ") as refused:
        api.attach(Net(), "lora", rank=2, modules_to_save=names, targets=["inner"])
    assert says in str(refused.value)
