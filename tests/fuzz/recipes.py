"""What users write to say what a run is: recipes, overrides, sweeps, DeepSpeed configs."""

import json
from pathlib import Path

from hypothesis import strategies as st

from distlora.data.sources import parse_split
from distlora.recipe.deepspeed_config import resolve_deepspeed
from distlora.recipe.deepspeed_file import read_deepspeed
from distlora.recipe.load import dump_recipe, load_recipe
from distlora.recipe.yaml_text import dump_yaml
from distlora.sweeps.file import read_sweep_file
from distlora.sweeps.lines import check_directories, read_sweep
from tests.fuzz.damage import HOSTILE, damaged_text, values, written
from tests.fuzz.rule import Loader

RECIPE = """\
model: {path: some/model, dtype: float32}
method: {name: lora_sb, rank: 8, init: {eta: search, samples: 32}}
targets: {include: all-linear, layers: "1-3"}
data:
  task: classification
  path: rows.jsonl
  split: train[:50%]
  labels: [a, b]
train: {lr: 1e-3, steps: 10, optimizer: {betas: [0.9, 0.999]}}
deepspeed: {zero_optimization: {stage: 2}}
output_dir: runs/x
"""
KEYS = (
    "model.path", "model.dtype", "model.quantization", "method.name", "method.rank", "method", "targets",
    "targets.layers", "data.split", "data.labels", "data.fields", "data.template", "data.chat_date", "data",
    "train.lr", "train.steps", "train.seed", "train.clip", "train.optimizer.betas", "deepspeed",
    "deepspeed.zero_optimization.stage", "output_dir",
)  # fmt: skip
SETTINGS = (
    "1e-3", "[a, b]", "{a: 1}", "lora", "search", "2026-01-31", "train[0:10%]", "7", "0", "-1", "yes", "010",
    "'x'", "null", "{kind: nf4}", "[q_proj, '*.mlp.*']",
)  # fmt: skip
SWEEP = """\
recipe: recipe.yaml
common: {train.steps: 60}
grid: {train.seed: [1, 2], method.rank: [16, 32]}
list:
- {method.name: lora, train.lr: 1e-3}
- {method.name: lora_sb, train.lr: 4e-3}
evaluate: {tasks: [gsm8k], limit: 5}
"""
LINES = "train.lr=1e-3 output_dir=runs/a\n# no line\nmethod.name=lora 'data.template=a b' output_dir=runs/b\n"
SPLITS = ("train", "train[:50%]", "train[10:-5]+test[90%:]", "validation[:1_000]")
DEEPSPEED = {
    "train_batch_size": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}}, "tensorboard": {"enabled": False},
}  # fmt: skip


def _read(text: str, folder: Path):
    return dump_recipe(load_recipe(written(folder, text, "recipe.yaml")))


def _override(given: tuple[str, str], folder: Path):
    return dump_recipe(load_recipe(written(folder, RECIPE, "recipe.yaml"), ["=".join(given)]))


def _sweep(text: str, folder: Path):
    written(folder, RECIPE, "recipe.yaml")
    return [point.overrides for point in read_sweep_file(written(folder, text, "sweep.yaml")).points]


def _lines(text: str, folder: Path):
    recipe, path = written(folder, RECIPE, "recipe.yaml"), written(folder, text, "lines")
    check_directories(path, read_sweep(path), str(recipe))


def _zero(text: str, folder: Path):
    read_deepspeed(str(written(folder, text, "zero.json")))
    return _resolved(folder)


def _section(given: tuple[str, str, object], folder: Path):
    """A value where another kind is meant."""
    section, key, value = given
    content = json.loads(json.dumps(DEEPSPEED))
    if key == "" or not isinstance(content.get(section), dict):
        content[section] = value
    else:
        content[section][key] = value
    written(folder, json.dumps(content), "zero.json")
    return _resolved(folder)


def _resolved(folder: Path):
    recipe = written(folder, RECIPE, "recipe.yaml")
    return resolve_deepspeed(load_recipe(recipe, ["deepspeed=zero.json"]), 2, 64)


def _yaml_value(example: tuple, folder: Path):
    key, value = example
    return load_recipe(written(folder, RECIPE + dump_yaml({key: value}), "recipe.yaml"))


_TEXTS = st.one_of(damaged_text(SETTINGS, most=2), st.sampled_from(HOSTILE), st.text(max_size=20))
_SECTIONS = [
    *DEEPSPEED, "fp16", "gradient_allreduce_op", "csv_monitor", "data_types", "timers", "checkpoint", "aio",
    "flops_profiler", "hybrid_engine", "wall_clock_breakdown", "activation_checkpointing", "comms_logger",
]  # fmt: skip
_PARAMETERS = ["", "stage", "params", "enabled", "type", "offload_param", "mics_shard_size", "lr", "job_name"]
LOADERS = (
    Loader("recipe", damaged_text([RECIPE], (*KEYS, *SETTINGS)), _read, share=2),
    Loader(
        "override",
        st.tuples(st.one_of(st.sampled_from(KEYS), damaged_text(KEYS, most=2)), _TEXTS),
        _override,
        share=2,
    ),
    Loader("recipe value", st.tuples(st.sampled_from(["x", "format"]), values()), _yaml_value, share=0.5),
    Loader("sweep", damaged_text([SWEEP], (*KEYS, *SETTINGS)), _sweep),
    Loader("sweep of lines", damaged_text([LINES], (*KEYS, *SETTINGS)), _lines),
    Loader("split", damaged_text(SPLITS, ["[", "]", ":", "%", "+"]), lambda text, _: _rows_of(text)),
    Loader("DeepSpeed config", damaged_text([json.dumps(DEEPSPEED, indent=1)], SETTINGS), _zero),
    Loader(
        "DeepSpeed value",
        st.tuples(st.sampled_from(_SECTIONS), st.sampled_from(_PARAMETERS), values()),
        _section,
        share=1,
    ),
)


def _rows_of(split: str):
    return [part.rows(1000) for part in parse_split(split)]
