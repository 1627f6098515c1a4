"""Exports: what PEFT and transformers load computes what the trained model computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from distlora.attach import attach
from distlora.checkpoint import save
from distlora.comm import Comm, Topology
from distlora.engine import LocalEngine
from distlora.errors import UserError
from distlora.export import export, export_peft_from_engine
from distlora.methods import registry
from distlora.optimizer import OptimizerSpec
from tests.tiny_models import VOCAB_SIZE, tiny_config, tiny_model_dir

CPU = torch.device("cpu")
METHODS = sorted(registry())
ADAPTERS = [name for name, cls in registry().items() if not cls.trains_weight]


class Run:
    """A run directory as training leaves it, after a few steps from random factors."""

    def __init__(
        self, folder: Path, base: Path, method: str, targets="all-linear", dtype=torch.float32, cls=AutoModelForCausalLM
    ):
        self.dir, self.base = folder / "run", base
        self.dir.mkdir()
        section = {"name": method, "rank": 6, "alpha": 9.0}
        recipe = {"model": {"path": str(base)}, "method": section, "targets": targets, "data": {"task": "arithmetic"},
                  "output_dir": str(self.dir)}  # fmt: skip
        (self.dir / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        model, info = cls.from_pretrained(base, dtype=dtype, output_loading_info=True)
        new = set(info["missing_keys"])
        self.attached = attach(model, registry()[method](**section), targets, new)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in self.attached.layers.values():
                for factor in layer.factors().values():
                    factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
            for name in new:
                model.get_parameter(name).copy_(torch.randn(model.get_parameter(name).shape, generator=generator))
        self.engine = LocalEngine(Comm(Topology(), CPU, distributed=False), dtype)
        self.engine.start(model, OptimizerSpec(lr=0.01))
        self.train(2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.backward(self.engine.module(input_ids=tokens()).logits.float().square().mean())
            self.engine.step()

    def save(self, step: int = 2) -> Path:
        return save(self.engine, self.attached, self.dir, step, {})

    def logits(self) -> torch.Tensor:
        return logits(self.engine.module)


def tokens():
    return torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


def assert_close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def with_peft(base, adapter, cls=AutoModelForCausalLM, **settings):
    return PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32, **settings), adapter)


# ---------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # tied embeddings; biases
def test_peft_computes_the_same(tmp_path, bases, name, method):
    base = tiny_model_dir(name, bases)
    run = Run(tmp_path, base, method)
    run.save()
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (run.logits() - plain).abs().max() > 0.1, "the adapter does something"
    out = export(run.dir, "peft", tmp_path / "adapter")
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_close(logits(with_peft(base, out)), run.logits())
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))


@pytest.mark.parametrize("method", ADAPTERS)
def test_engine_exports_what_its_checkpoint_does(tmp_path, bases, method):
    run = Run(tmp_path, tiny_model_dir("llama", bases), method)
    run.save()
    for _ in range(2):  # the second replaces the first
        live = export_peft_from_engine(run.engine, run.attached, run.dir / "adapter", str(run.base), step=2)
    stored = export(run.dir, "peft", tmp_path / "stored")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (live / name).read_bytes() == (stored / name).read_bytes()


def test_only_the_targets_are_adapted(tmp_path, bases):
    targets = ["model.layers.1.mlp.up_proj", "*.layers.2.self_attn.?_proj"]
    run = Run(tmp_path, tiny_model_dir("qwen2", bases), "lora", targets)
    run.save()
    model = with_peft(run.base, export(run.dir, "peft", tmp_path / "adapter"))
    adapted = {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(run.attached.layers) and len(adapted) == 5
    assert_close(logits(model), run.logits())


def test_layers_of_different_ranks(tmp_path, bases):
    """No method has them yet, but the format says how, and PEFT must understand it."""
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora")
    layer = run.attached.layers["model.layers.1.self_attn.q_proj"]
    layer.method = registry()["lora"](rank=3, alpha=5.0)
    layer.A, layer.B = torch.nn.Parameter(layer.A[:3].clone()), torch.nn.Parameter(layer.B[:, :3].clone())
    run.engine.start(run.engine.module, OptimizerSpec())
    out = export_peft_from_engine(run.engine, run.attached, tmp_path / "adapter", str(run.base), step=0)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 6 and list(config["rank_pattern"].values()) == list(config["alpha_pattern"].values()) == [3]
    assert_close(logits(with_peft(run.base, out)), run.logits())


def test_trained_head_travels_with_the_adapter(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora_sb", cls=classifier())
    run.save()
    assert [name for name in run.attached.trained if "score" in name] == ["score.weight"]
    out = export(run.dir, "peft", tmp_path / "adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "SEQ_CLS")
    assert_close(logits(with_peft(run.base, out, classifier())), run.logits())
    merged = export(run.dir, "merged", tmp_path / "merged")
    model = LlamaForSequenceClassification.from_pretrained(merged)
    model.config.pad_token_id = 0
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert_close(logits(model), run.logits())


def classifier():
    """A class whose `from_pretrained` gives three labels, and the padding token that such a model wants."""

    class Classifier(LlamaForSequenceClassification):
        @classmethod
        def from_pretrained(cls, directory, **settings):
            config = tiny_config("llama")
            config.num_labels, config.pad_token_id = 3, 0
            return LlamaForSequenceClassification.from_pretrained(directory, config=config, **settings)

    return Classifier


# ---------------------------------------------------------------------- merged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_merged_computes_the_same(tmp_path, bases, name, method):
    run = Run(tmp_path, tiny_model_dir(name, bases), method)
    run.save()
    out = export(run.dir, "merged", tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits(model), run.logits())
    assert (
        AutoTokenizer.from_pretrained(out)("Tom")["input_ids"] == AutoTokenizer.from_pretrained(run.base)("Tom")["input_ids"]
    )


def test_sharded_base_stays_sharded(tmp_path, bases):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir("mistral", bases)).save_pretrained(base, max_shard_size="200kB")
    run = Run(tmp_path, base, "lora_sb")
    run.save()
    out = export(run.dir, "merged", tmp_path / "merged")
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    assert len(list(out.glob("model-*.safetensors"))) > 2
    left, right = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (out, base))
    assert left["weight_map"] == right["weight_map"]
    assert left["metadata"]["total_size"] == right["metadata"]["total_size"]
    assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), run.logits())


def test_bfloat16_weights_are_rounded_once(tmp_path, bases):
    base = tiny_model_dir("llama", tmp_path / "bf16", torch.bfloat16)
    run = Run(tmp_path, base, "lora_sb", dtype=torch.bfloat16)
    run.save()
    merged = load_file(export(run.dir, "merged", tmp_path / "merged") / "model.safetensors")
    exact = load_file(export(run.dir, "merged", tmp_path / "exact", dtype=torch.float32) / "model.safetensors")
    pretrained = load_file(base / "model.safetensors")
    for name, layer in run.attached.layers.items():
        a, r, b = (getattr(layer, factor).detach().float() for factor in "ARB")
        expected = pretrained[f"{name}.weight"].float() + 1.5 * b @ r @ a
        assert torch.allclose(exact[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(merged[f"{name}.weight"], exact[f"{name}.weight"].bfloat16())
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"
    untouched = set(pretrained) - {f"{name}.weight" for name in run.attached.layers}
    assert all(torch.equal(merged[name], pretrained[name]) for name in untouched) and untouched


def test_finished_adapter_is_taken_where_it_is_later_than_the_checkpoint(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora")
    run.save(step=2)
    early = run.logits()
    run.train(2)
    export_peft_from_engine(run.engine, run.attached, run.dir / "adapter", str(run.base), step=4)
    for format in ("peft", "merged"):
        export(run.dir, format, tmp_path / format)
        export(run.dir, format, tmp_path / f"{format}-2", checkpoint=2)
    for suffix, expected in (("", run.logits()), ("-2", early)):
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{suffix}")), expected)
        assert_close(logits(with_peft(run.base, tmp_path / f"peft{suffix}")), expected)
    assert (run.logits() - early).abs().max() > 0.01
    run.train(1)
    run.save(step=5)
    export(run.dir, "merged", tmp_path / "merged-5")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged-5")), run.logits())


# ---------------------------------------------------------------------- mistakes


def test_full_fine_tuning_is_no_adapter(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "full")
    run.save()
    with pytest.raises(UserError, match="--format merged"):
        export(run.dir, "peft", tmp_path / "out")
    with pytest.raises(UserError, match="--format merged"):
        export_peft_from_engine(run.engine, run.attached, tmp_path / "out", str(run.base), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_each_mistake_is_one_sentence_and_leaves_nothing(tmp_path, bases):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama", bases), base)
    run, out = Run(tmp_path, base, "lora_sb"), tmp_path / "out"
    with pytest.raises(UserError, match="no run directory"):
        export(tmp_path / "nowhere", "peft", out)
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(run.dir, "peft", out)
    checkpoint = run.save()
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 2"):
        export(run.dir, "peft", out, checkpoint=7)
    with pytest.raises(UserError, match="format is pefft"):
        export(run.dir, "pefft", out)
    recipe = (run.dir / "recipe.yaml").read_text()
    (run.dir / "recipe.yaml").write_text(recipe.replace("lora_sb", "lora_xs"))
    with pytest.raises(UserError, match="is of lora_sb with rank 6, but the run's recipe.yaml of lora_xs"):
        export(run.dir, "peft", out)
    (run.dir / "recipe.yaml").write_text(recipe)
    weights = load_file(base / "model.safetensors")
    kept = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UserError, match=r"hold no model\.layers\.1\.mlp\.up_proj\.weight"):
        export(run.dir, "merged", out)
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": kept[:5].clone()}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(5, 60\)"):
        export(run.dir, "merged", out)
    (base / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        export(run.dir, "merged", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"] and checkpoint.exists()


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_other_files_are_never_overwritten(tmp_path, bases, format):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora")
    run.save()
    out = tmp_path / "out"
    out.mkdir()
    export(run.dir, format, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="not an empty directory"):
        export(run.dir, format, out)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        export(run.dir, format, tmp_path / "notes")
    (out / "mine.txt").touch()
    with pytest.raises(UserError, match="not an empty directory"):
        export_peft_from_engine(run.engine, run.attached, out, str(run.base), 2)
