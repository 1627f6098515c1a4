"""Exports: what PEFT and transformers load computes what the trained model computes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from distlora.adapter.attach import attach
from distlora.checkpoints.save import save
from distlora.cli import main as cli
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.owners import open_ledger
from distlora.errors import UserError
from distlora.exports.peft import export_peft_from_engine
from distlora.initialisation.factors import initialise
from distlora.maths.low_rank import LowRank
from distlora.methods import TrainsWeight, registry
from distlora.recompose.recomposer import Recomposer
from distlora.training.export_run import export_run
from tests.stepping import take_step
from tests.tiny_models import VOCAB_SIZE, tiny_config, tiny_model_dir

CPU = torch.device("cpu")
METHODS = sorted(registry())
ADAPTERS = [name for name, cls in registry().items() if not issubclass(cls, TrainsWeight)]
#: What a method needs beside rank and alpha on the tiny models.
SETTINGS = {"srlora": {"target_rank": 12}, "lora_pro": {"scaled_by": "rank"}}


class Run:
    """A run directory as training leaves it, after a few steps from random factors."""

    def __init__(
        self,
        folder: Path,
        base: Path,
        method: str,
        targets="all-linear",
        dtype=torch.float32,
        cls=AutoModelForCausalLM,
    ):
        self.dir, self.base = folder / "run", base
        self.dir.mkdir()
        section = {"name": method, "rank": 6, "alpha": 9.0} | SETTINGS.get(method, {})
        kind = str(dtype).removeprefix("torch.")
        recipe = {"model": {"path": str(base), "dtype": kind}, "method": section, "targets": targets,
                  "data": {"task": "arithmetic"}, "output_dir": str(self.dir)}  # fmt: skip
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
                model.get_parameter(name).copy_(
                    torch.randn(model.get_parameter(name).shape, generator=generator)
                )
        self.engine = LocalEngine(Comm(Topology(), CPU, distributed=False), dtype)
        self.engine.start(model, OptimizerSpec(lr=0.01))
        self.train(2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.backward(self.engine.module(input_ids=tokens()).logits.float().square().mean())
            take_step(self.engine)

    def update_weights(self) -> None:
        """Three updates of one, two and three columns in most layers, one in the others, and training in
        between.
        """
        open_ledger(self.engine, self.attached, seed=5)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            for position, layer in enumerate(self.attached.layers.values()):
                if number == 0 or position % 3:
                    columns = number + 1
                    left = torch.randn(layer.out_features, columns, generator=generator) * 0.5**number
                    right = (
                        torch.randn(columns, layer.in_features, generator=generator) / layer.in_features**0.5
                    )
                    self.engine.ledger.apply(self.engine, layer, number, "nearest", LowRank(left, right))
            self.train(1)

    def recompose(self, steps: int = 6) -> None:
        """Trains from the method's own start with its own swaps."""
        report = initialise(self.engine, self.attached, 7, 0.01)
        recomposer = Recomposer(self.engine, self.attached, 7, steps, report.reserves)
        for step in range(1, steps + 1):
            self.engine.backward(self.engine.module(input_ids=tokens()).logits.float().square().mean())
            recomposer.on_gradient()
            take_step(self.engine)
            recomposer.after_step(step, 1.0 / step)

    def update(self, layer: str) -> torch.Tensor:
        """What was added to the pretrained weight in all, (out, in) float64."""
        adapted, pretrained = (
            self.attached.layers[layer],
            load_file(self.base / "model.safetensors")[f"{layer}.weight"],
        )
        factors = {name: factor.detach().double() for name, factor in adapted.factors().items()}
        pair = adapted.method.export_low_rank(factors)
        frozen = sum(entry.left.double() @ entry.right.double() for entry in self.engine.ledger.pairs(layer))
        assert torch.allclose(adapted.weight.double(), pretrained.double() + frozen, atol=1e-2)
        return pair.left.double() @ pair.right.double() + frozen

    def save(self, step: int = 2) -> Path:
        return save(self.engine, self.attached, self.dir, step, {})

    def logits(self) -> torch.Tensor:
        return logits(self.engine.module)


def tokens():
    return torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


def exported(*arguments, **options) -> Path:
    return export_run(*arguments, **options).path


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
    out = exported(run.dir, "peft", tmp_path / "adapter")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
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
    stored = exported(run.dir, "peft", tmp_path / "stored")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (live / name).read_bytes() == (stored / name).read_bytes()


def test_only_the_targets_are_adapted(tmp_path, bases):
    targets = ["model.layers.1.mlp.up_proj", "*.layers.2.self_attn.?_proj"]
    run = Run(tmp_path, tiny_model_dir("qwen2", bases), "lora", targets)
    run.save()
    model = with_peft(run.base, exported(run.dir, "peft", tmp_path / "adapter"))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
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
    assert config["r"] == 6 and list(config["rank_pattern"].values()) == list(
        config["alpha_pattern"].values()
    ) == [3]
    assert_close(logits(with_peft(run.base, out)), run.logits())


def test_trained_head_travels_with_the_adapter(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora_sb", cls=classifier())
    run.save()
    assert [name for name in run.attached.trained if "score" in name] == ["score.weight"]
    out = exported(run.dir, "peft", tmp_path / "adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "SEQ_CLS")
    assert_close(logits(with_peft(run.base, out, classifier())), run.logits())
    merged = exported(run.dir, "merged", tmp_path / "merged")
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
    out = exported(run.dir, "merged", tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits(model), run.logits())
    assert (
        AutoTokenizer.from_pretrained(out)("Tom")["input_ids"]
        == AutoTokenizer.from_pretrained(run.base)("Tom")["input_ids"]
    )


def test_sharded_base_stays_sharded(tmp_path, bases):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir("mistral", bases)).save_pretrained(
        base, max_shard_size="200kB"
    )
    run = Run(tmp_path, base, "lora_sb")
    run.save()
    out = exported(run.dir, "merged", tmp_path / "merged")
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()} | {"README.md"}
    assert len(list(out.glob("model-*.safetensors"))) > 2
    left, right = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (out, base))
    assert left["weight_map"] == right["weight_map"]
    assert left["metadata"]["total_size"] == right["metadata"]["total_size"]
    assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), run.logits())


def test_bfloat16_weights_are_rounded_once(tmp_path, bases):
    base = tiny_model_dir("llama", tmp_path / "bf16", torch.bfloat16)
    run = Run(tmp_path, base, "lora_sb", dtype=torch.bfloat16)
    run.save()
    merged = load_file(exported(run.dir, "merged", tmp_path / "merged") / "model.safetensors")
    exact = load_file(
        exported(run.dir, "merged", tmp_path / "exact", dtype=torch.float32) / "model.safetensors"
    )
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
        exported(run.dir, format, tmp_path / format)
        exported(run.dir, format, tmp_path / f"{format}-2", checkpoint=2)
    for suffix, expected in (("", run.logits()), ("-2", early)):
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{suffix}")), expected)
        assert_close(logits(with_peft(run.base, tmp_path / f"peft{suffix}")), expected)
    assert (run.logits() - early).abs().max() > 0.01
    run.train(1)
    run.save(step=5)
    exported(run.dir, "merged", tmp_path / "merged-5")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged-5")), run.logits())


# ---------------------------------------------------------------------- updates of the frozen weights


def pairs_in(adapter: Path) -> dict[str, LowRank]:
    """By layer, as other software reads them."""
    tensors, pairs = load_file(adapter / "adapter_model.safetensors"), {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pairs[layer] = LowRank(tensors[name.replace("lora_A", "lora_B")], tensors[name])
    return pairs


def ranks_in(adapter: Path) -> dict[str, int]:
    """By layer; the config must say the same."""
    ranks = {layer: pair.right.shape[0] for layer, pair in pairs_in(adapter).items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"] and config["lora_alpha"] == config["r"]
    assert ranks == {
        layer: config["rank_pattern"].get(layer.replace(".", r"\."), config["r"]) for layer in ranks
    }
    return ranks


def true_errors(run: Run, adapter: Path) -> dict[str, float]:
    """Relative Frobenius error of every layer's update, by whole matrices."""
    errors = {}
    for layer, pair in pairs_in(adapter).items():
        exact = run.update(layer)
        errors[layer] = float((pair.left.double() @ pair.right.double() - exact).norm() / exact.norm())
    return errors


@pytest.mark.parametrize(("name", "method"), [("llama", "pissa"), ("llama", "lora_sb"), ("qwen2", "lora")])
def test_updated_weights_export_exactly(tmp_path, bases, name, method):
    run = Run(tmp_path, tiny_model_dir(name, bases), method)
    without = run.logits()
    run.update_weights()
    run.save()
    assert (run.logits() - without).abs().max() > 0.1, "the updates do something"
    done = export_run(run.dir, "peft", tmp_path / "adapter")
    assert done.errors == {} and done.compression is None, "nothing had to be compressed"
    assert set(ranks_in(done.path).values()) == {6 + 1, 6 + 1 + 2 + 3}
    assert max(true_errors(run, done.path).values()) < 1e-6
    assert_close(logits(with_peft(run.base, done.path)), run.logits())
    merged = exported(run.dir, "merged", tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), run.logits())
    live = export_peft_from_engine(run.engine, run.attached, run.dir / "adapter", str(run.base), step=2)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (live / file).read_bytes() == (done.path / file).read_bytes()


def test_recomposed_run_exports_in_every_form(tmp_path, bases, caplog):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "srlora")
    run.recompose()
    run.save(step=6)
    entries = run.engine.ledger.entries
    assert all([entry.columns for entry in of_layer] == [6, 6, 6] for of_layer in entries.values())
    done = export_run(run.dir, "peft", tmp_path / "adapter")
    # Four stacks of six are wider than the projections of keys and values are high.
    narrow = {layer for layer in entries if layer.endswith(("k_proj", "v_proj"))}
    assert ranks_in(done.path) == {layer: 20 if layer in narrow else 24 for layer in entries}
    assert set(done.errors) == narrow and max(done.errors.values()) < 1e-6
    assert_close(logits(with_peft(run.base, done.path)), run.logits())
    assert_close(
        logits(AutoModelForCausalLM.from_pretrained(exported(run.dir, "merged", tmp_path / "merged"))),
        run.logits(),
    )
    few = export_run(run.dir, "peft", tmp_path / "few", max_error=1e-3)
    assert_close(logits(with_peft(run.base, few.path)), run.logits(), 1e-2)
    # Training writes such an adapter at its end, and exports of the run are made from it.
    with caplog.at_level("INFO", "distlora"):
        export_peft_from_engine(run.engine, run.attached, run.dir / "adapter", str(run.base), step=7)
    assert "adapter: compressed 6 of 21 layers to rank 20: relative error" in caplog.text
    for format in ("peft", "merged"):
        export_run(run.dir, format, tmp_path / f"{format}-7")
    assert_close(logits(with_peft(run.base, tmp_path / "peft-7")), run.logits())
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged-7")), run.logits())
    half = export_run(run.dir, "peft", tmp_path / "half", dtype=torch.bfloat16)
    assert half.errors.keys() >= entries.keys() - narrow, (
        "the finished adapter says which of its pairs are stacks"
    )
    assert max(true_errors(run, half.path).values()) < 1e-2


@pytest.fixture
def updated(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "pissa")
    run.update_weights()
    run.save()
    return run


def test_compress_rank(updated, tmp_path):
    exact = exported(updated.dir, "peft", tmp_path / "exact")
    done = export_run(updated.dir, "peft", tmp_path / "adapter", compress_rank=9)
    assert ranks_in(done.path) == {layer: min(rank, 9) for layer, rank in ranks_in(exact).items()}
    errors, untouched = true_errors(updated, done.path), pairs_in(exact)
    assert 0.001 < min(done.errors.values()) and max(done.errors.values()) < 0.9
    for layer, pair in pairs_in(done.path).items():
        if layer in done.errors:
            assert done.errors[layer] == pytest.approx(errors[layer], rel=1e-4)
            sigma = torch.linalg.svdvals(updated.update(layer))
            assert errors[layer] == pytest.approx(float(sigma[9:].norm() / sigma.norm()), rel=1e-4), (
                "no rank 9 is nearer"
            )
        else:
            assert torch.equal(pair.left, untouched[layer].left) and torch.equal(
                pair.right, untouched[layer].right
            )
    worst = max(done.errors, key=done.errors.get)
    mean = sum(done.errors.values()) / len(done.errors)
    assert done.compression == (
        f"compressed {len(done.errors)} of 21 layers to rank 9: relative error of a layer's update "
        f"at most {done.errors[worst]:.2e} ({worst}), {mean:.2e} on average"
    )
    assert_close(logits(with_peft(updated.base, done.path)), logits(with_pairs(updated.base, done.path)))


def with_pairs(base: Path, adapter: Path):
    """The pretrained model with each pair added to its weight, without PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for layer, pair in pairs_in(adapter).items():
            model.get_parameter(f"{layer}.weight").add_(pair.left @ pair.right)
    return model


@pytest.mark.parametrize("max_error", [0.5, 0.1])
def test_max_error_takes_the_smallest_rank_of_each_layer(updated, tmp_path, max_error):
    done = export_run(updated.dir, "peft", tmp_path / "adapter", max_error=max_error)
    ranks, errors = ranks_in(done.path), true_errors(updated, done.path)
    compressed = [ranks[layer] for layer in done.errors]
    assert (
        f"{len(compressed)} of 21 layers to ranks {min(compressed)} to {max(compressed)}: "
        in done.compression
    )
    for layer, rank in ranks.items():
        assert errors[layer] <= max_error and done.errors.get(layer, 0) == pytest.approx(
            errors[layer], rel=1e-4, abs=2e-7
        )
        sigma = torch.linalg.svdvals(updated.update(layer))
        assert rank == 1 or sigma[rank - 1 :].norm() / sigma.norm() > max_error
    assert_close(logits(with_peft(updated.base, done.path)), logits(with_pairs(updated.base, done.path)))


def test_a_rank_above_the_exact_one_changes_nothing(updated, tmp_path, caplog):
    exact = exported(updated.dir, "peft", tmp_path / "exact")
    with caplog.at_level("INFO", "distlora"):
        done = export_run(updated.dir, "peft", tmp_path / "adapter", compress_rank=64)
    assert "--compress-rank 64: the exact rank is 12, and nothing is left out" in caplog.text
    assert done.errors == {}
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (exact / file).read_bytes() == (done.path / file).read_bytes()


def test_low_precision_stacks_are_summed_first(tmp_path, bases):
    """Rounded side by side, pairs that nearly cancel leave noise of the size of what was learned."""
    run = Run(tmp_path, tiny_model_dir("llama", bases), "pissa")
    report = initialise(run.engine, run.attached, 7, 0.01)
    assert not report.reserves
    run.train(1)
    run.save()
    exact = exported(run.dir, "peft", tmp_path / "exact")
    done = export_run(run.dir, "peft", tmp_path / "adapter", dtype=torch.bfloat16)
    assert done.errors.keys() == run.attached.layers.keys()
    naive, written = pairs_in(exact), pairs_in(done.path)
    errors = true_errors(run, done.path)
    for layer, pair in written.items():
        assert pair.left.dtype == torch.bfloat16 and pair.right.shape[0] == 12
        assert done.errors[layer] == pytest.approx(errors[layer], rel=1e-3) and errors[layer] < 1e-2
        update = run.update(layer)
        side_by_side = naive[layer].left.bfloat16().double() @ naive[layer].right.bfloat16().double()
        assert (side_by_side - update).norm() / update.norm() > 5 * errors[layer]
    again = export_run(run.dir, "peft", tmp_path / "within", dtype=torch.bfloat16, max_error=0.02)
    assert max(true_errors(run, again.path).values()) <= 0.02
    with pytest.raises(
        UserError, match=r"--max-error 1e-05 cannot be met: writing .* in bfloat16 costs 0.00\d+ by itself"
    ):
        export_run(run.dir, "peft", tmp_path / "out", dtype=torch.bfloat16, max_error=1e-5)
    assert not (tmp_path / "out").exists()


def test_without_updates_low_precision_is_a_plain_cast(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora")
    run.save()
    done = export_run(run.dir, "peft", tmp_path / "adapter", dtype=torch.bfloat16)
    exact = pairs_in(exported(run.dir, "peft", tmp_path / "exact"))
    assert done.compression is None
    for layer, pair in pairs_in(done.path).items():
        assert torch.equal(pair.left, exact[layer].left.bfloat16()) and torch.equal(
            pair.right, exact[layer].right.bfloat16()
        )


@pytest.mark.parametrize("method", ["lora", "srlora"])
def test_bfloat16_run_exports_the_sum_and_not_the_live_weight(tmp_path, bases, method):
    base = tiny_model_dir("llama", tmp_path / "bf16", torch.bfloat16)
    run = Run(tmp_path, base, method, dtype=torch.bfloat16)
    run.update_weights() if method == "lora" else run.recompose()
    run.save(step=6)
    merged = load_file(exported(run.dir, "merged", tmp_path / "merged") / "model.safetensors")
    adapter = exported(run.dir, "peft", tmp_path / "adapter", dtype=torch.float32)
    assert max(true_errors(run, adapter).values()) < 1e-5
    pretrained, differing = load_file(base / "model.safetensors"), 0
    for name, layer in run.attached.layers.items():
        expected = pretrained[f"{name}.weight"].double() + run.update(name)
        # To one unit in the last place of float32 it is the nearest bfloat16.
        error = (merged[f"{name}.weight"].double() - expected).abs()
        assert (error <= expected.abs() * (2**-8 + 1e-4) + 1e-6).all()
        pair = layer.method.export_low_rank(layer.factors())
        once_more = (layer.weight.float() + pair.left.float() @ pair.right.float()).bfloat16()
        differing += int((once_more != merged[f"{name}.weight"]).sum())
    assert differing > 1000, "the live weight has been rounded at every update"


# ---------------------------------------------------------------------- trained norms of rows


def with_zero_rows(base: Path, copy: Path) -> Path:
    """The same model with a zero row in a weight with a bias, and two in one without."""
    shutil.copytree(base, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][3] = 0
    weights["model.layers.1.mlp.up_proj.weight"][[0, 130]] = 0
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_dora_with_zero_rows_exports_in_every_form(tmp_path, bases):
    """From its own start and from the finished adapter; a zero row stays zero, where PEFT alone would divide
    0 by 0.
    """
    run = Run(tmp_path, with_zero_rows(tiny_model_dir("qwen2", bases), tmp_path / "base"), "dora")
    run.engine.start(run.engine.module, OptimizerSpec(lr=0.01))  # without the moments of what went before
    initialise(run.engine, run.attached, 7, 0.01)
    run.train(3)
    silent = run.attached.layers["model.layers.1.mlp.up_proj"]
    assert not silent.m[[0, 130]].any() and not silent.B[[0, 130]].any() and silent.B.any()
    plain = logits(AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32))
    assert (run.logits() - plain).abs().max() > 0.01, "the adapter does something"
    run.save(step=3)
    out = exported(run.dir, "peft", tmp_path / "peft")
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is True
    assert run.logits().isfinite().all()
    assert_close(logits(with_peft(run.base, out)), run.logits())
    merged = exported(run.dir, "merged", tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), run.logits())
    assert not load_file(merged / "model.safetensors")["model.layers.1.mlp.up_proj.weight"][[0, 130]].any()
    run.train(1)
    export_peft_from_engine(run.engine, run.attached, run.dir / "adapter", str(run.base), step=4)
    assert_close(logits(with_peft(run.base, exported(run.dir, "peft", tmp_path / "peft-4"))), run.logits())
    merged = exported(run.dir, "merged", tmp_path / "merged-4")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), run.logits())


def test_magnitudes_are_the_optimizers_own_and_never_rounded(tmp_path, bases):
    """In bfloat16 the live model divides a rounded norm by a rounded norm; other software divides by exact
    ones.
    """
    base = tiny_model_dir("llama", tmp_path / "bf16", torch.bfloat16)
    run = Run(tmp_path, base, "dora", dtype=torch.bfloat16)
    initialise(run.engine, run.attached, 7, 0.01)
    run.save(step=2)
    pretrained = load_file(base / "model.safetensors")
    out = exported(run.dir, "peft", tmp_path / "peft", dtype=torch.bfloat16)
    tensors = load_file(out / "adapter_model.safetensors")
    for name in run.attached.layers:
        exact = pretrained[f"{name}.weight"].double().norm(dim=1)
        magnitude = tensors[f"base_model.model.{name}.lora_magnitude_vector.weight"]
        assert (
            magnitude.dtype == torch.float32
            and tensors[f"base_model.model.{name}.lora_A.weight"].dtype == torch.bfloat16
        )
        torch.testing.assert_close(magnitude.double(), exact, rtol=1e-6, atol=0)
    # Nothing is trained yet, and the exports say so to float32.
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert_close(logits(with_peft(base, out)), plain)
    merged = load_file(exported(run.dir, "merged", tmp_path / "merged") / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in pretrained.items())
    run.train(2)
    live = export_peft_from_engine(run.engine, run.attached, run.dir / "adapter", str(base), step=4)
    assert_close(logits(with_peft(base, live)), run.logits().float(), 0.05)


@pytest.mark.parametrize("option", ["compress_rank", "max_error"])
def test_dora_is_not_compressed(tmp_path, bases, option):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "dora")
    run.save()
    with pytest.raises(
        UserError, match=f"--{option.replace('_', '-')} cuts an update .* and method dora scales rows as well"
    ):
        export_run(
            run.dir, "peft", tmp_path / "out", **{option: {"compress_rank": 2, "max_error": 0.1}[option]}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# ---------------------------------------------------------------------- mistakes


def test_full_fine_tuning_is_no_adapter(tmp_path, bases):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "full")
    run.save()
    with pytest.raises(UserError, match="export it merged"):
        exported(run.dir, "peft", tmp_path / "out")
    with pytest.raises(UserError, match="export it merged"):
        export_peft_from_engine(run.engine, run.attached, tmp_path / "out", str(run.base), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_each_mistake_is_one_sentence_and_leaves_nothing(tmp_path, bases):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama", bases), base)
    run, out = Run(tmp_path, base, "lora_sb"), tmp_path / "out"
    with pytest.raises(UserError, match="no run directory"):
        export_run(tmp_path / "nowhere", "peft", out)
    with pytest.raises(UserError, match="no complete checkpoint"):
        exported(run.dir, "peft", out)
    checkpoint = run.save()
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 2"):
        exported(run.dir, "peft", out, checkpoint=7)
    with pytest.raises(UserError, match="format is pefft"):
        exported(run.dir, "pefft", out)
    recipe = (run.dir / "recipe.yaml").read_text()
    (run.dir / "recipe.yaml").write_text(recipe.replace("lora_sb", "lora_xs"))
    with pytest.raises(UserError, match="is of lora_sb with rank 6, but the run's recipe.yaml of lora_xs"):
        exported(run.dir, "peft", out)
    (run.dir / "recipe.yaml").write_text(recipe)
    weights = load_file(base / "model.safetensors")
    kept = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UserError, match=r"hold no model\.layers\.1\.mlp\.up_proj\.weight"):
        exported(run.dir, "merged", out)
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": kept[:5].clone()}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(5, 60\)"):
        exported(run.dir, "merged", out)
    (base / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        exported(run.dir, "merged", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"] and checkpoint.exists()


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_other_files_are_never_overwritten(tmp_path, bases, format):
    run = Run(tmp_path, tiny_model_dir("llama", bases), "lora")
    run.save()
    out = tmp_path / "out"
    out.mkdir()
    exported(run.dir, format, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="not an empty directory"):
        exported(run.dir, format, out)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        exported(run.dir, format, tmp_path / "notes")
    (out / "mine.txt").touch()
    with pytest.raises(UserError, match="not an empty directory"):
        export_peft_from_engine(run.engine, run.attached, out, str(run.base), 2)


MISTAKES = [
    (["--compress-rank", "0"], "--compress-rank is 0; wanted at least 1"),
    (["--compress-rank", "-3"], "--compress-rank is -3; wanted at least 1"),
    (["--max-error", "0"], "--max-error is 0; wanted a relative error between 0 and 1, such as 0.01"),
    (["--max-error", "1"], "--max-error is 1; wanted a relative error between 0 and 1, such as 0.01"),
    (
        ["--max-error", "0.1", "--compress-rank", "4"],
        "--compress-rank and --max-error were both given; give one of them",
    ),
    (
        ["--format", "merged", "--compress-rank", "4"],
        "--compress-rank is for --format peft: merged weights hold the whole update; leave it out",
    ),
    (
        ["--format", "merged", "--max-error", "0.1"],
        "--max-error is for --format peft: merged weights hold the whole update; leave it out",
    ),
]


@pytest.mark.parametrize(
    ("options", "sentence"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES]
)
def test_impossible_compression_is_one_sentence(tmp_path, capsys, options, sentence):
    """Said before anything is read: there is no run here."""
    words = ["export", str(tmp_path / "run"), "--format", "peft", "--out", str(tmp_path / "out"), *options]
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"distlora: {sentence}\n")


def test_command_line_states_the_error(updated, tmp_path, capsys):
    words = ["export", str(updated.dir), "--format", "peft", "--out"]
    assert cli.main([*words, str(tmp_path / "exact")]) == 0
    path, size = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "exact") and re.fullmatch(r"[0-9.]+ KiB, tensors in float32", size)
    for options in (["--compress-rank", "4"], ["--max-error", "0.2"], ["--dtype", "bfloat16"]):
        out = tmp_path / options[0]
        assert cli.main([*words, str(out), *options]) == 0
        path, _, sentence = capsys.readouterr().out.splitlines()
        assert path == str(out)
        stated = re.search(r"error of a layer's update at most (\S+) \((\S+)\), (\S+) on average$", sentence)
        errors = true_errors(updated, out)
        assert float(stated[1]) == pytest.approx(max(errors.values()), rel=1e-2) == errors[stated[2]]
