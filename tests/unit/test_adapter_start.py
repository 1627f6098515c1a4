"""A run that starts from a LoRA in PEFT's files computes what PEFT does, and refuses all else."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import distlora
from distlora.errors import UserError
from distlora.exports.peft_files import read_peft
from distlora.exports.starting import Start
from tests.tiny_zoo import zoo_model

IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(3))
FORMS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=IDS).logits


def _saved(kind, out, **options):
    """An adapter of PEFT's with random factors, as its save_pretrained writes it; returns its logits."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(zoo_model(kind), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1.1)
    model.save_pretrained(out)
    return _logits(model)


def _started(kind, out, method, **options):
    adapted = distlora.attach(zoo_model(kind), method, start=out, **options)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, steps=2)
    return adapted


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("gemma3", r".*language_model.*\.(q|v)_proj"),
    ],
    ids=["llama", "gpt2", "gemma3"],
)
def test_the_start_is_what_peft_computes(kind, targets, method, tmp_path):
    wanted = _saved(kind, tmp_path, target_modules=targets, **FORMS[method])
    adapted = _started(kind, tmp_path, method)
    assert (adapted.method.rank, adapted.method.alpha) == (3, 12.0)
    torch.testing.assert_close(_logits(adapted.model), wanted, rtol=1e-5, atol=1e-5)


def test_experts_start_from_target_parameters(tmp_path):
    wanted = _saved(
        "qwen3_moe", tmp_path, target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    adapted = _started("qwen3_moe", tmp_path, "lora")
    assert any(layer.stack for layer in adapted.layers.values())
    torch.testing.assert_close(_logits(adapted.model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["experts", "v_proj"], {"include": ["q_proj"], "layers": 0}]
)
def test_a_run_of_ours_goes_on_from_its_export(targets, tmp_path):
    first = distlora.attach(zoo_model("qwen3_moe"), "lora", targets=targets, rank=2, alpha=2)
    distlora.initialise(first, optimizer=torch.optim.AdamW(first.parameters()), steps=2)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    distlora.export(first, tmp_path / "out", base_model="x")
    second = _started("qwen3_moe", tmp_path / "out", "lora")
    assert list(second.layers) == list(first.layers)
    torch.testing.assert_close(_logits(second.model), _logits(first.model), rtol=1e-5, atol=1e-5)


def test_what_is_given_must_be_the_same(tmp_path):
    _saved("llama", tmp_path, target_modules=["q_proj", "v_proj"])
    for same in ({"rank": 3}, {"alpha": 12}, {"targets": ["q_proj", "v_proj"]}, {"dropout": 0.1}):
        assert _started("llama", tmp_path, "lora", **same).method.rank == 3
    for other, said in [
        ({"rank": 8}, "method.rank is 8, and the adapter .* has 3"),
        ({"alpha": 3}, "method.alpha is 3, and the adapter .* has 12"),
        ({"targets": ["q_proj"]}, r"targets leaves out .*v_proj"),
        ({"targets": ["q_proj", "v_proj", "o_proj"]}, r"targets also means .*o_proj"),
    ]:
        with pytest.raises(UserError, match=said):
            _started("llama", tmp_path, "lora", **other)


@pytest.mark.parametrize(
    ("form", "method", "said"),
    [
        ({}, "rslora", "is not method rslora; set method.name to lora"),
        ({}, "dora", "is not method dora; set method.name to lora"),
        ({"use_rslora": True}, "lora", "is not method lora; set method.name to rslora"),
        ({"use_dora": True}, "lora", "is not method lora; set method.name to dora"),
        ({"use_dora": True, "use_rslora": True}, "dora", "no method here is both"),
        ({}, "lora_pro", "from is no setting of it"),
        ({}, "lora_ga", "from is no setting of it"),
        ({}, "pissa", "from is no setting of it"),
        ({}, "lora_sb", "from is no setting of it"),
        ({}, "full", "from is no setting of it"),
    ],
)
def test_other_methods_are_refused(form, method, said, tmp_path):
    _saved("llama", tmp_path, target_modules=["q_proj"], **form)
    with pytest.raises(UserError, match=said):
        distlora.attach(zoo_model("llama"), method, start=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "it says rank 2 of layer .*q_proj, whose tensors have rank 3"),
        ({"alpha_pattern": {"q_proj": 2}}, "rank_pattern or alpha_pattern gives"),
        ({"lora_alpha": 0}, "the alpha of layer .* is 0; wanted a number above 0"),
        ({"lora_alpha": "much"}, "and no number"),
        ({"bias": "lora_only"}, "bias=lora_only is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 keeps other weights"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
    ids=str,
)
def test_settings_that_are_not_taken_over_are_named(change, said, tmp_path):
    _saved("llama", tmp_path, target_modules=["q_proj", "v_proj"])
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        Start(str(tmp_path))


def _other_tensors(tmp_path, change):
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, tmp_path / WEIGHTS)


def _as(name, value):
    return lambda tensors: tensors | {f"base_model.model.{name}": value}


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_as(f"{Q}.lora_A.weight", torch.zeros(3, 59)), "another model .*q_proj has the shape"),
        (_as(f"{Q}.lora_A.weight", torch.zeros(4, 60)), "do not fit together"),
        (_as(f"{Q}.lora_A.weight", torch.zeros(3, 60).int()), r"is of torch\.int32"),
        (_as(f"{Q}.lora_A.weight", torch.full((3, 60), torch.nan)), "infinite or not a number"),
        (_as("model.layers.9.self_attn.q_proj.lora_A.weight", torch.zeros(3, 60)), "only one of A and B"),
        (_as("model.embed_tokens.lora_embedding_A", torch.zeros(3, 60)), "belongs to no linear layer"),
        (_as("lm_head.weight", torch.zeros(300, 60)), "lm_head"),
    ],
)
def test_tensors_of_strangers_are_checked(change, said, tmp_path):
    _saved("llama", tmp_path, target_modules=["q_proj", "v_proj"])
    _other_tensors(tmp_path, change)
    with pytest.raises(UserError, match=said):
        _started("llama", tmp_path, "lora")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _saved("gpt2", tmp_path, target_modules=["c_attn"])
    with pytest.raises(UserError, match="adapter of another model"):
        _started("llama", tmp_path, "lora")


def test_only_safetensors_are_read(tmp_path):
    _saved("llama", tmp_path, target_modules=["q_proj"])
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=re.escape("adapter_model.bin may hold programs, and is not loaded")):
        Start(str(tmp_path))


def test_what_is_no_adapter_is_called_what_it_is(tmp_path, monkeypatch):
    run, bare, model = tmp_path / "run", tmp_path / "bare", tmp_path / "model"
    for file in (
        run / "recipe.yaml", run / "adapter" / CONFIG, bare / "recipe.yaml", model / "config.json",
        bare / "checkpoint-3" / "manifest.json", tmp_path / "several" / "mine" / CONFIG,
        tmp_path / "empty" / "x", tmp_path / "file",
    ):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    for name, said in {
        "nothing": ": there is no such directory; give that of an adapter",
        "file": " is a file; give the directory that it is in",
        f"run/adapter/{CONFIG}": " is a file; give the directory that it is in",
        "run": f" is the directory of a run; its adapter is {run / 'adapter'}",
        "bare": f" is the directory of a run without an adapter; write one by distlora export {bare}",
        "bare/checkpoint-3": f" is a checkpoint; export it by distlora export {bare} --step N --format peft",
        "model": " is a model and no adapter",
        "several": f" holds adapters in folders of its own; name one, such as {tmp_path}/several/mine",
        "empty": " is no adapter, or half written: it has no adapter_config.json",
    }.items():
        place = tmp_path / name
        for begin, read in ((f"method.from={place}", Start), (str(place), read_peft)):
            with pytest.raises(UserError) as caught:
                read(str(place) if read is Start else place)
            assert str(caught.value).startswith(begin + said)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="download an adapter of the hub first: hf download me/one"):
        Start("me/one")


def _state_dict(tensors):
    return {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("llama", _state_dict, "lora_A.default.weight is called as in a model's state_dict"),
        (
            "llama",
            _as("lm_head.modules_to_save.default.weight", torch.zeros(300, 60)),
            "is called as in a model's state_dict",
        ),
        ("llama", _as("lm_head.base_layer.weight", torch.zeros(300, 60)), "the model's own weight under"),
        ("tied", _as("lm_head.weight", torch.zeros(300, 60)), "holds lm_head.weight, which .* shares with"),
    ],
)
def test_tensors_that_cannot_be_taken_over_are_told(kind, change, said, tmp_path):
    _saved("llama", tmp_path, target_modules=["q_proj", "v_proj"])
    _other_tensors(tmp_path, change)
    model = zoo_model("llama")
    if kind == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UserError, match=said):
        distlora.attach(model, "lora", start=tmp_path)
