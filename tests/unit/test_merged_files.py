"""Merged exports: shared and converted weights, what a run decided, the files around, and the comparison with
the run.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import distlora
from distlora.cli import main as cli
from distlora.errors import UserError
from distlora.exports import check
from distlora.exports.companions import Decided, RunTokens, copy_companions
from distlora.exports.exported import AdapterSource
from distlora.exports.merged import Merged
from distlora.exports.peft_files import read_peft
from distlora.files.tensors import TensorFiles
from distlora.models.reload import fixed_inputs, logits_of
from tests.tiny_models import VOCAB_SIZE, _draw_parameters, tiny_model_dir
from tests.tiny_zoo import ZOO, zoo_model_dir

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bases")


def trained(model: nn.Module, method="lora", targets="all-linear", **more) -> distlora.Adapted:
    """An adapted model whose factors are far from their start."""
    settings = {} if method == "full" else {"rank": 3}
    adapted = distlora.attach(model, method, targets=targets, **settings, **more)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, steps=1, check_gradients=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def logits_of_fixed_inputs(model: nn.Module) -> torch.Tensor:
    return logits_of(model, fixed_inputs(model))


def names_in(directory: Path) -> set[str]:
    return set(TensorFiles(directory, "model").names)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def assert_logits(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# ---------------------------------------------------------------------- shared weights


def tied_base(bases: Path, held: str) -> Path:
    """A model whose config ties the embeddings. held: which of the two tensors its files hold."""
    directory = bases / held
    if not directory.exists():
        tiny_model_dir("qwen2", bases / f"{held}-").rename(directory)
        tensors = load_file(directory / "model.safetensors")
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if held == "different":
            tensors[HEAD] += 0.5
        if held == "head":
            del tensors[EMBEDDING]
        if held == "embedding":
            del tensors[HEAD]
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("held", ["embedding", "head", "both", "different"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_an_output_layer_that_shares_its_weight_is_merged_as_the_run_has_it(tmp_path, bases, method, held):
    base = tied_base(bases, held)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits_of_fixed_inputs(model.eval())
    adapted = trained(model, method, ["q_proj", "lm_head"])
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base)
    expected = logits_of_fixed_inputs(adapted.model.eval())
    assert (before - expected).abs().max() > 0.01
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_logits(logits_of_fixed_inputs(merged.eval()), expected)
    as_one = method == "full" and held != "different"
    assert config_of(out)["tie_word_embeddings"] is as_one
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is as_one


def test_an_embedding_that_is_trained_whole_stays_shared(tmp_path, bases):
    for held in ("embedding", "both", "head"):
        base = tied_base(bases, held)
        adapted = trained(AutoModelForCausalLM.from_pretrained(base), also_train=[EMBEDDING])
        out = distlora.export(adapted, tmp_path / held, format="merged", base_model=base)
        assert names_in(out) == names_in(base) and config_of(out)["tie_word_embeddings"] is True
        merged = AutoModelForCausalLM.from_pretrained(out).eval()
        assert_logits(logits_of_fixed_inputs(merged), logits_of_fixed_inputs(adapted.model.eval()))


@pytest.mark.parametrize("held", ["embedding", "head", "both", "different"])
def test_peft_has_an_embedding_that_is_trained_whole_in_every_place(tmp_path, bases, held):
    base = tied_base(bases, held)
    adapted = trained(AutoModelForCausalLM.from_pretrained(base), also_train=[EMBEDDING])
    out = distlora.export(adapted, tmp_path / "peft", base_model=base)
    live, plain = logits_of_fixed_inputs(adapted.model.eval()), AutoModelForCausalLM.from_pretrained(base)
    assert_logits(logits_of_fixed_inputs(PeftModel.from_pretrained(plain, out).eval()), live)
    assert set(read_peft(out).heads) == set(AdapterSource(out).heads) == {EMBEDDING}


def test_peft_refuses_a_layer_that_is_trained_whole_and_adapted(tmp_path, bases):
    base = tied_base(bases, "both")
    adapted = trained(AutoModelForCausalLM.from_pretrained(base), "lora", ["lm_head"], also_train=[EMBEDDING])
    with pytest.raises(UserError, match="lm_head.weight is the same as a parameter .* export it merged"):
        distlora.export(adapted, tmp_path / "peft", base_model=base)
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    assert_logits(logits_of_fixed_inputs(merged), logits_of_fixed_inputs(adapted.model.eval()))


def test_what_peft_does_not_load_is_told(tmp_path, bases, caplog):
    base = zoo_model_dir("mamba", bases)
    for targets, told in ((["in_proj"], False), (["in_proj", "out_proj"], True)):
        adapted = trained(AutoModelForCausalLM.from_pretrained(base), targets=targets)
        with caplog.at_level(logging.INFO, "distlora"):
            distlora.export(adapted, tmp_path / "-".join(targets), base_model=base)
        assert ("PEFT loads no adapter of layers out_proj of MambaForCausalLM" in caplog.text) is told


# ---------------------------------------------------------------------- names of their own


def wrapped(name: str):
    return getattr(transformers, {"qwen3_5": "Qwen3_5ForCausalLM"}.get(name, ZOO[name].model_class))


@pytest.mark.parametrize(
    "name", ["gemma3", "qwen3_5", "qwen2_5_vl", "llava", "mistral3", "mixtral", "qwen3_moe"]
)
def test_files_keep_their_own_names(tmp_path, bases, name):
    """Of a model for images and texts, and of one whose experts lie in many tensors."""
    base = zoo_model_dir(name, bases)
    model = wrapped(name).from_pretrained(base)
    layers = [layer for layer, module in model.named_modules() if type(module) is nn.Linear]
    adapted = trained(model, targets=[layer for layer in layers if layer.endswith(("q_proj", "o_proj"))])
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base)
    assert names_in(out) == names_in(base)
    merged = wrapped(name).from_pretrained(out).eval()
    assert_logits(logits_of_fixed_inputs(merged), logits_of_fixed_inputs(adapted.model.eval()))
    assert config_of(out)["architectures"] == config_of(base)["architectures"]


#: Classes whose layers are parts of one tensor in the files.
_SIZES = dict(vocab_size=VOCAB_SIZE, hidden_size=60, intermediate_size=128, num_hidden_layers=2,
              num_attention_heads=6, max_position_embeddings=64, pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize("name", ["NomicBert", "Gte", "JinaEmbeddingsV3"])
@pytest.mark.parametrize("sharded", [False, True])
def test_layers_that_are_parts_of_one_tensor_are_merged(tmp_path, name, sharded):
    cls = getattr(transformers, f"{name}ForSequenceClassification")
    base = cls(getattr(transformers, f"{name}Config")(**_SIZES))
    _draw_parameters(base, torch.Generator().manual_seed(1))
    base.save_pretrained(tmp_path / "base", **({"max_shard_size": "60kB"} if sharded else {}))
    model = cls.from_pretrained(tmp_path / "base")
    adapted = trained(model, targets=["q_proj", "v_proj"])
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=tmp_path / "base")
    assert names_in(out) == names_in(tmp_path / "base")
    assert any("qkv" in stored.lower() for stored in names_in(out))
    merged = cls.from_pretrained(out).eval()
    assert_logits(logits_of_fixed_inputs(merged), logits_of_fixed_inputs(adapted.model.eval()))


ROUTED = dict(_SIZES, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Phimoe", {}),
        ("Llama4", {"head_dim": 10, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}),
        ("GraniteMoe", {}),
    ],
)
def test_a_router_is_not_taken_for_a_linear_layer(tmp_path, name, more):
    """Some are of a class of `nn.Linear` that gives more than one tensor."""
    cls = getattr(transformers, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")(
        **ROUTED | more
    )
    model = cls(config)
    _draw_parameters(model, torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "base")
    adapted = trained(cls.from_pretrained(tmp_path / "base"))
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=tmp_path / "base")
    merged = cls.from_pretrained(out).eval()
    assert_logits(logits_of_fixed_inputs(merged), logits_of_fixed_inputs(adapted.model.eval()))


def test_what_the_files_lack_is_one_sentence(tmp_path, bases):
    base = tiny_model_dir("mistral", tmp_path)
    adapted = trained(AutoModelForCausalLM.from_pretrained(base), targets=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match="hold no model.layers.1.self_attn.q_proj.weight, or hold it in a form"
    ):
        distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base)


# ---------------------------------------------------------------------- what a run decided


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neo"])  # none of them says how it pads
@pytest.mark.parametrize("labels", [["bad", "good"], None])
def test_a_merged_classifier_takes_batches_and_knows_its_labels(tmp_path, bases, name, labels):
    """labels: None for a regression."""
    base = zoo_model_dir(name, bases)
    columns = {"text": "text", "label": "label"} | ({} if labels else {"pair": "text"})
    rows = [{"text": "good " * i, "label": (labels or [0.5, 2.0])[i % 2]} for i in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "classification", "labels": labels} if labels else {"task": "stsb"}
    recipe = {
        "model": {"path": str(base), "dtype": "float32", "gradient_checkpointing": False},
        "method": {"name": "lora", "rank": 1}, "targets": ["q_proj", "v_proj"],
        "data": {**task, "path": str(tmp_path / "rows.jsonl"), "split": "train", "max_length": 30,
                 "eval_split": None, "fields": columns},
        "train": {"steps": 1, "micro_batch_size": 2, "global_batch_size": 2, "lr": 0.01},
        "deepspeed": None, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 0
    out = tmp_path / "merged"
    assert cli.main(["export", str(tmp_path / "run"), "--format", "merged", "--out", str(out)]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["good good good", "good"], padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = [
            merged(**tokenizer([text], return_tensors="pt")).logits[0] for text in ("good good good", "good")
        ]
        assert_logits(merged(**batch).logits, torch.stack(alone), 1e-4)
    assert merged.config.get_text_config().pad_token_id == tokenizer.pad_token_id is not None
    assert list(merged.config.id2label.values()) == (labels or ["score"])
    assert merged.config.problem_type == (None if labels else "regression")


def written(tmp_path: Path, decided: Decided, **files: dict) -> Path:
    """What `copy_companions` makes of a folder with these JSON files."""
    base, draft = tmp_path / "base", tmp_path / "draft"
    base.mkdir()
    draft.mkdir()
    for name, content in {"config": {}, **files}.items():
        (base / f"{name}.json").write_text(json.dumps(content))
    copy_companions(draft, base, decided)
    return draft


@pytest.mark.parametrize(
    ("own", "ends"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, None),
        ({"do_sample": False, "temperature": 0.0, "min_p": 0.1}, None),
        ({"do_sample": True, "temperature": 0.6}, None),
        ({"eos_token_id": [5, 6]}, [5, 6, 2]),
        ({"eos_token_id": 2}, 2),
        ({"eos_token_id": None}, [2]),
    ],
)
def test_a_generation_config_can_be_saved_and_ends_as_the_run_does(tmp_path, own, ends):
    tokens = RunTokens("<pad>", 0, frozenset({2}))
    draft = written(tmp_path, Decided(tokens=tokens), generation_config=own)
    config = GenerationConfig.from_pretrained(draft)
    config.validate(strict=True)
    config.save_pretrained(tmp_path / "again")
    assert config.temperature == (0.6 if own.get("do_sample") else None) and config.pad_token_id == 0
    assert config.eos_token_id == (ends or [2])


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"eos_token_id": 2}, None),
        ({"eos_token_id": 5}, [5, 2]),
        ({"text_config": {"eos_token_id": [2, 7]}}, None),
    ],
)
def test_a_generation_config_is_made_where_the_config_ends_otherwise(tmp_path, config, ends):
    draft = written(tmp_path, Decided(tokens=RunTokens("<pad>", 0, frozenset({2}))), config=config)
    made = draft / "generation_config.json"
    assert made.exists() is (ends is not None)
    assert ends is None or json.loads(made.read_text())["eos_token_id"] == ends


@pytest.mark.parametrize("own", [None, "<unk>", {"content": "<unk>", "special": True}, "<pad>"])
def test_the_padding_token_of_the_run_is_written(tmp_path, own):
    tokens = RunTokens("<pad>", 3)
    draft = written(tmp_path, Decided(tokens=tokens), tokenizer_config={"pad_token": own, "x": 1})
    assert json.loads((draft / "tokenizer_config.json").read_text()) == {"pad_token": "<pad>", "x": 1}
    assert config_of(draft)["pad_token_id"] == 3


def test_a_config_says_the_same_to_the_language_model_within(tmp_path):
    decided = Decided({"id2label": {"0": "a"}, "architectures": ["X"]}, tied=False, dtype="float32")
    own = {
        "torch_dtype": "bfloat16", "tie_word_embeddings": True, "architectures": ["Y"],
        "text_config": {"dtype": "bfloat16", "tie_word_embeddings": True},
        "vision_config": {"dtype": "bfloat16"},
    }  # fmt: skip
    changed = config_of(written(tmp_path, decided, config=own))
    assert changed["text_config"] == {
        "dtype": "float32",
        "tie_word_embeddings": False,
        "id2label": {"0": "a"},
    }
    assert changed["vision_config"] == {"dtype": "float32"} and changed["dtype"] == "float32"
    assert changed["architectures"] == ["X"] and "torch_dtype" not in changed


COPIED = (
    "spm.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "qwen.tiktoken", "vocab.txt",
    "merges.txt", "vocab.bpe", "chat_template.jinja", "tokenizer.json", "preprocessor_config.json", "LICENSE",
    "tekken.json", "additional_chat_templates/rag.jinja",
)  # fmt: skip
LEFT = (
    "pytorch_model.bin", "model.gguf", "model.onnx", "flax_model.msgpack", "tf_model.h5", "optimizer.pt",
    "rng_state.pth", "training_args.bin", "modeling_own.py", ".gitattributes", "README.md",
    "adapter_config.json", "pytorch_model.bin.index.json", "other.safetensors", "onnx/model.onnx",
    ".git/HEAD",
)  # fmt: skip


def test_all_files_of_the_model_are_copied_and_nothing_else(tmp_path):
    base, draft = tmp_path / "base", tmp_path / "draft"
    for name in (*COPIED, *LEFT, "config.json"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    draft.mkdir()
    copy_companions(draft, base, Decided())
    found = {str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()}
    assert found == {*COPIED, "config.json"}


# ---------------------------------------------------------------------- the comparison with the run


def exported_with(tmp_path: Path, bases: Path, damage, name="qwen2", targets="all-linear", **options) -> Path:
    """Exports a trained model; `damage` changes what was written before it is compared."""
    base, out = tiny_model_dir(name, bases), tmp_path / "merged"
    adapted = trained(AutoModelForCausalLM.from_pretrained(base), targets=targets)

    def examine(draft: Path, merged: Merged) -> None:
        damage(draft)
        check.check_merged(draft, merged)

    from distlora.exports.merged import export_merged_from_engine

    return export_merged_from_engine(
        adapted.engine, adapted.attached, out, base, 1, examine=examine, **options
    )


def change_weights(draft: Path, change) -> None:
    tensors = load_file(draft / "model.safetensors")
    change(tensors)
    save_file(tensors, draft / "model.safetensors", {"format": "pt"})


def halve_one(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] *= 0.5


def drop_one(tensors):
    del tensors["model.layers.2.mlp.up_proj.weight"]


def tie_again(draft: Path):
    change_weights(draft, lambda tensors: tensors.pop(HEAD))
    config = config_of(draft)
    (draft / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def other_sizes(draft: Path):
    (draft / "config.json").write_text(json.dumps(config_of(draft) | {"num_attention_heads": 5}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda draft: change_weights(draft, halve_one), "does not compute what the run does"),
        (lambda draft: change_weights(draft, drop_one), "files lack model.layers.2.mlp.up_proj.weight"),
        (tie_again, "does not compute what the run does"),
        (other_sizes, "cannot be used"),
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_merged_model_that_computes_something_else_is_not_kept(tmp_path, bases, damage, sentence, dtype):
    targets = ["up_proj", "lm_head"]
    with pytest.raises(UserError, match=sentence) as raised:
        exported_with(tmp_path, bases, damage, targets=targets, dtype=dtype)
    assert "--no-check" in str(raised.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(tmp_path, bases, stored, dtype):
    base = tiny_model_dir("gemma2", bases / str(stored), stored)
    adapted = trained(AutoModelForCausalLM.from_pretrained(base, dtype=stored))
    out = distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base, dtype=dtype)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype or stored}


@pytest.mark.parametrize(
    ("free", "compared"), [(None, True), (1 << 40, True), (300 << 20, True), (1 << 20, False)]
)
def test_too_little_memory_is_told(tmp_path, bases, monkeypatch, caplog, free, compared):
    monkeypatch.setattr(check, "free_host_memory", lambda: free)
    with caplog.at_level(logging.INFO, "distlora"):
        exported_with(tmp_path, bases, lambda draft: None)
    assert ("was not checked: this machine has too little memory" in caplog.text) is not compared
    assert ("computing the logits of the run's weights" in caplog.text) is compared


def test_the_command_says_what_was_compared_and_leaves_it_out_on_request(tmp_path, bases, capsys):
    base = tiny_model_dir("llama", bases)
    recipe = {
        "model": {"path": str(base)}, "method": {"name": "lora", "rank": 3, "alpha": 3},
        "data": {"task": "arithmetic"}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    distlora.export(trained(AutoModelForCausalLM.from_pretrained(base)), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["export", str(tmp_path / "run"), "--format", "merged", "--out"]
    assert cli.main([*words, str(tmp_path / "first")]) == 0
    path, size, line = capsys.readouterr().out.splitlines()
    assert (
        path == str(tmp_path / "first")
        and size.endswith("KiB")
        and line.startswith("compared with the run: logits differ by ")
    )
    assert cli.main([*words, str(tmp_path / "second"), "--no-check"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "second"), size]
