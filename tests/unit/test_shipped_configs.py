"""Every file under configs/: parsed, resolved, accepted by DeepSpeed, and saying what the experiment says."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from distlora.data import ChatExamples
from distlora.engine.comm import Topology
from distlora.errors import UserError
from distlora.methods import registry
from distlora.recipe.combination import check_length
from distlora.recipe.deepspeed_config import plan_batches, resolve_deepspeed
from distlora.recipe.load import dump_recipe, load_recipe
from distlora.sweeps.check import check_sweep
from distlora.sweeps.file import read_sweep_file
from distlora.training.build import check_targets
from distlora.training.objective import objective_of
from distlora.training.train import check
from tests.tiny_models import tiny_encoder_dir

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
ZEROS = sorted((ROOT / "configs" / "zero").glob("*.json"))
QUICKSTART = ROOT / "configs" / "recipes" / "quickstart.yaml"


def by_name(path):
    return path.stem


def test_the_shipped_files():
    assert {path.stem for path in RECIPES} >= {
        "quickstart", "smollm2-gsm8k", "mistral-7b-metamath", "gemma2-9b-metamath",
        "llama3.2-3b-commonsense170k", "minilm-rte", "roberta-large-glue", "deberta-v3-base-glue",
        "vit-base-cifar100", "vit-base-stl10", "vit-base-mnist", "smollm2-chat",
    }  # fmt: skip
    assert {path.stem for path in ZEROS} >= {
        "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_hpz",
    }  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipe_resolves(path, world):
    recipe = load_recipe(path)
    if recipe.train.global_batch_size % (recipe.train.micro_batch_size * world):
        with pytest.raises(UserError, match="is not divisible by"):
            resolve_deepspeed(recipe, world, 2048)
        return
    config, lines = resolve_deepspeed(recipe, world, 2048)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == recipe.train.global_batch_size
    assert config["gradient_accumulation_steps"] == plan_batches(recipe, world)
    assert any(line.endswith("(auto)") for line in lines)


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipe_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    dumped = tmp_path / "recipe.yaml"
    dumped.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(dumped) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipe_says_what_it_reproduces(path):
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert 2 <= len(comments) <= 6


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
@pytest.mark.parametrize("method", ["lora", "lora_xs", "full"])
def test_recipe_with_another_method(path, method):
    recipe = load_recipe(path, [f"method.name={method}"])
    assert recipe.method.name == method and recipe.method.rank == load_recipe(path).method.rank
    said = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    dropped = [key for key in said if key not in type(recipe.method).model_fields]
    assert all(f"method.{key}" in recipe.notes[0] for key in dropped) and len(recipe.notes) == bool(dropped)


@pytest.fixture(scope="module")
def smollm2_shapes(tmp_path_factory):
    """A model directory without weights, whose layers are as wide as SmolLM2-135M's."""
    directory = tmp_path_factory.mktemp("smollm2")
    widths = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    LlamaConfig(num_hidden_layers=2, vocab_size=64, **widths).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("method", registry())
def test_quickstart_runs_every_method(method, smollm2_shapes, tmp_path):
    """Not only the one that its rank was chosen for."""
    recipe = load_recipe(
        QUICKSTART, [f"method.name={method}", f"model.path={smollm2_shapes}", f"output_dir={tmp_path}/run"]
    )
    check(recipe, Topology(rank=0, world_size=2), resume=None)
    fitted = check_targets(recipe, objective_of(recipe))
    assert fitted.method.rank == recipe.method.rank
    check_length(fitted, recipe.train.steps)


def test_the_example_of_chats_reads_every_form_of_a_row(monkeypatch):
    """A system's text, several turns, one that is not learned, and the name of a special token."""
    monkeypatch.chdir(ROOT)
    data = load_recipe(ROOT / "configs" / "recipes" / "smollm2-chat.yaml").data
    talks = [
        example.conversation
        for split in (data.split, data.eval_split)
        for example in ChatExamples(data, split)
    ]
    roles = {message["role"] for talk in talks for message in talk.messages}
    assert len(talks) == 10 and roles == {"system", "user", "assistant"}
    assert any(len(talk.learned()) > 1 for talk in talks)
    assert any(not talk.trained[-3] for talk in talks if len(talk.messages) > 2)
    assert "</s>" in str(talks)


def paper(name):
    recipe = load_recipe(ROOT / "configs" / "recipes" / f"{name}.yaml")
    train = recipe.train
    settings = (
        recipe.method.name, recipe.method.rank, recipe.method.dropout, recipe.method.init.samples,
        recipe.targets, recipe.model.dtype, recipe.data.split, recipe.data.max_length,
        train.epochs, train.steps, train.micro_batch_size, plan_batches(recipe, 1),
        train.lr, train.schedule.name, train.warmup_ratio,
    )  # fmt: skip
    return recipe, settings


@pytest.mark.parametrize(
    "name, model",
    [("mistral-7b-metamath", "mistralai/Mistral-7B-v0.1"), ("gemma2-9b-metamath", "google/gemma-2-9b")],
)
def test_settings_of_the_arithmetic_experiment(name, model):
    recipe, settings = paper(name)
    assert settings == (
        "lora_sb", 96, 0.0, 0.001, "all-linear", "bfloat16", "train[:50000]", 512, 1, None, 1, 32,
        1e-4, "cosine", 0.02,
    )  # fmt: skip
    assert (recipe.model.path, recipe.data.task, recipe.data.path) == (
        model,
        "metamath",
        "meta-math/MetaMathQA",
    )
    assert recipe.method.init.eta == "schedule", "this rate belongs to it"


def test_settings_of_the_commonsense_experiment():
    recipe, settings = paper("llama3.2-3b-commonsense170k")
    assert settings == (
        "lora_sb", 96, 0.05, 0.001, "all-linear", "bfloat16", "train", 256, 2, None, 6, 24,
        2e-3, "linear", 0.02,
    )  # fmt: skip
    assert (recipe.model.path, recipe.data.task) == ("meta-llama/Llama-3.2-3B", "commonsense")


def test_settings_of_the_language_understanding_experiment():
    recipe, settings = paper("roberta-large-glue")
    assert settings[:4] + settings[5:] == (
        "lora_sb", 24, 0.0, 0.001, "float32", "train", 128, 30, None, 16, 8, 1e-3, "linear", 0.06,
    )  # fmt: skip
    assert all("attention" in target for target in recipe.targets) and recipe.train.clip is None


# ---------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("path", SWEEPS, ids=by_name)
def test_every_point_of_a_sweep_is_a_recipe(path, tmp_path):
    sweep = read_sweep_file(path)
    assert sweep.output == Path("runs", path.stem)
    # MiniLM is in a package that the tests do not install.
    is_minilm = "minilm" in load_recipe(sweep.recipe).model.path
    model = f"model.path={tiny_encoder_dir('bert', tmp_path)}"
    tiny = [model, "data.max_length=64"] if is_minilm else []
    assert check_sweep(read_sweep_file(path, tiny))
    assert sum(line.startswith("# ") for line in path.read_text(encoding="utf-8").splitlines()) >= 2


def test_the_tables_of_the_papers_have_every_method_at_every_rank():
    for model in ("mistral", "gemma2", "llama", "roberta"):
        sweep = read_sweep_file(ROOT / "configs" / "sweeps" / f"lora-sb-table-{model}.yaml")
        own = [dict(text.split("=", 1) for text in point.overrides) for point in sweep.points]
        rates = [(keys["method.name"], float(keys["train.lr"])) for keys in own]
        found = {(keys["method.name"], keys.get("method.rank")) for keys in own}
        ranks = ("8", "16", "24") if model == "roberta" else ("32", "64", "96")
        assert found >= {(name, rank) for name in ("lora_sb", "lora_xs") for rank in ranks}
        assert found >= {
            (name, ranks[0]) for name in ("lora", "rslora", "pissa", "dora", "lora_ga", "lora_pro")
        }
        assert ("full", None) in found
        if model == "roberta":
            scanned = [[rate for name, rate in rates if name == core] for core in ("lora_sb", "lora_xs")]
            assert scanned[0] == scanned[1], "neither has more tries than the other"
        for core in ("lora_sb", "lora_xs"):
            assert max(lr for name, lr in rates if name == core) > max(
                lr for name, lr in rates if name == "lora"
            )


# ---------------------------------------------------------------------- DeepSpeed configs


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("path", ZEROS, ids=by_name)
def test_zero_config_resolves(path, dtype, world, tmp_path):
    recipe = load_recipe(
        QUICKSTART,
        [
            f"deepspeed={path}",
            f"model.dtype={dtype}",
            "train.global_batch_size=64",
            "train.micro_batch_size=8",
            f"output_dir={tmp_path}/run",
        ],
    )
    config, _ = resolve_deepspeed(recipe, world, 576)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 64 and config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": dtype == "bfloat16"}
    assert config["tensorboard"] == {
        "enabled": True,
        "output_path": f"{tmp_path}/run/tensorboard",
        "job_name": ".",
    }


@pytest.mark.parametrize("path", ZEROS, ids=by_name)
def test_zero_config_is_accepted_by_deepspeed(path, tmp_path):
    """And understood as it is meant."""
    runtime = pytest.importorskip("deepspeed.runtime.config")
    recipe = load_recipe(QUICKSTART, [f"deepspeed={path}", f"output_dir={tmp_path}/run"])
    given, _ = resolve_deepspeed(recipe, 1, 576)
    parsed = runtime.DeepSpeedConfig(dict(given))
    section = given["zero_optimization"]
    # In bfloat16 DeepSpeed's stage 2 with offload would not sum in float32: see `deepspeed_config`.
    stage = 1 if path.stem == "zero2_offload" else int(path.stem[4])
    assert parsed.zero_optimization_stage == section["stage"] == stage
    assert parsed.zero_config.reduce_bucket_size == section.get("reduce_bucket_size", 500_000_000)
    assert bool(parsed.zero_config.offload_optimizer) == ("offload" in path.stem)
    assert bool(parsed.zero_config.offload_param) == (path.stem == "zero3_offload")
    assert parsed.zero_config.zero_hpz_partition_size == (8 if path.stem == "zero3_hpz" else 1)
    assert parsed.zero_config.memory_efficient_linear == (section["stage"] != 3)
    assert parsed.bfloat16_config.enabled and parsed.gradient_clipping == 1.0
    assert parsed.monitor_config.tensorboard.enabled
    assert (
        parsed.train_batch_size,
        parsed.train_micro_batch_size_per_gpu,
        parsed.gradient_accumulation_steps,
    ) == (32, 16, 2)
