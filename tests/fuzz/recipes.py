"""What users write to say what a run is: recipes, overrides."""

from pathlib import Path

from hypothesis import strategies as st

from distlora.recipe.load import dump_recipe, load_recipe
from tests.fuzz.damage import HOSTILE, damaged_text, written
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


def _read(text: str, folder: Path):
    return dump_recipe(load_recipe(written(folder, text, "recipe.yaml")))


def _override(given: tuple[str, str], folder: Path):
    return dump_recipe(load_recipe(written(folder, RECIPE, "recipe.yaml"), ["=".join(given)]))


LOADERS = (
    Loader("recipe", damaged_text([RECIPE], (*KEYS, *SETTINGS)), _read, share=2),
    Loader(
        "override",
        st.tuples(
            st.one_of(st.sampled_from(KEYS), damaged_text(KEYS, most=2)),
            st.one_of(damaged_text(SETTINGS, most=2), st.sampled_from(HOSTILE), st.text(max_size=20)),
        ),
        _override,
        share=2,
    ),
)
