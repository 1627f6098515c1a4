"""What runs and strangers leave on disks: checkpoints, adapters, the files of a run directory, models.

What is damaged in a checkpoint gets a manifest that fits it: checksums are no protection from a writer.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from distlora.checkpoints.directory import newest, of_step
from distlora.checkpoints.restore import restore
from distlora.checkpoints.save import save as save_checkpoint
from distlora.checkpoints.stored import MANIFEST, STATE
from distlora.cluster.lease import LEASE, living_owner
from distlora.cluster.status import STATUS, read_status
from distlora.engine.random_state import own_random_state
from distlora.exports.exported import AdapterSource
from distlora.exports.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from distlora.exports.peft_files import read_peft
from distlora.exports.sources import CheckpointSource
from distlora.files.atomic import sha256_of
from distlora.files.problems import file_errors_explained
from distlora.files.tensors import TensorFiles
from distlora.models.generation import end_tokens
from distlora.models.loading import bare_model, load_model, load_tokenizer
from distlora.recipe.sections import ModelSection
from distlora.report.records import metrics_problem, read_lines
from distlora.training.monitor import records
from distlora.training.rate_search import _read as read_rate_search
from distlora.training.seen_data import _read as read_seen_data
from tests.fuzz.damage import damaged, values, written
from tests.fuzz.rule import Loader
from tests.tiny_models import tiny_model_dir
from tests.tiny_runs import SRLORA, Run

CPU = torch.device("cpu")
LORA_SB = {
    "name": "lora_sb",
    "rank": 3,
    "init": {"samples": 6},
    "recompose": {"interval": 2, "start": "step"},
}

# ---------------------------------------------------------------------- edited JSON


@st.composite
def edited(draw, right: Any, most: int = 3) -> Any:
    """A JSON value of which some parts are others, missing, or there twice."""
    value = json.loads(json.dumps(right))
    for _ in range(draw(st.integers(1, most))):
        value = _edited(draw, value)
    return value


def _edited(draw, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        changed = _edited(draw, value[key])
        what = draw(st.integers(0, 9))
        rest = {name: inner for name, inner in value.items() if what > 1 or name != key}
        return rest if what == 0 else rest | {(draw(st.text(max_size=4)) if what == 1 else key): changed}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        place = draw(st.integers(0, len(value) - 1))
        middle = draw(st.sampled_from(([], [_edited(draw, value[place])], [value[place]] * 2)))
        return [*value[:place], *middle, *value[place + 1 :]]
    near = [value + step for step in (-1, 1)] if type(value) is int else [value]
    return draw(st.one_of(st.sampled_from(near), values()))


def as_json(value: Any) -> bytes:
    """The content of a file."""
    return json.dumps(value).encode()


# ---------------------------------------------------------------------- files of tensors

TENSORS = {
    "a": torch.ones(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.ones((), dtype=torch.int8),
}
HEADER_WORDS = (
    b'"dtype":"F32"', b'"dtype":"F8_E8M0"', b'"shape":[-1]', b'"shape":[1099511627776]',
    b'"data_offsets":[0,8]', b'"U16"', b"[0,18446744073709551615]",
    b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}',
)  # fmt: skip


def _read_tensors(content: bytes, folder: Path) -> None:
    written(folder, content, "model.safetensors")
    with file_errors_explained(folder):
        files = TensorFiles(folder, "model")
        for name in files.names:
            files.read(name)
        files.metadata("model.safetensors")


def _read_index(content: bytes, folder: Path) -> None:
    written(folder, save(TENSORS), "model-00001-of-00002.safetensors")
    written(folder, content, "model.safetensors.index.json")
    with file_errors_explained(folder):
        files = TensorFiles(folder, "model")
        for name in files.names:
            files.read(name)


INDEX = as_json({"weight_map": dict.fromkeys(TENSORS, "model-00001-of-00002.safetensors")})
INDEX_WORDS = (b"/etc/passwd", b"../model.safetensors", b"model.safetensors", b"weight_map", b'"a"')

# ---------------------------------------------------------------------- checkpoints


@functools.cache
def _checkpoint(name: str) -> Path:
    """A checkpoint of a run that has recomposed, in a folder that stays."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-kept-"))
    with own_random_state(1, CPU):
        run = Run(_settings(name))
        run.train(6)
        save_checkpoint(run.engine, run.attached, place, 6, {}, recomposer=run.recomposer)
    return place / "checkpoint-6"


def _settings(name: str) -> dict:
    return SRLORA if name == "srlora" else LORA_SB


@st.composite
def edited_checkpoints(draw) -> tuple[str, str, bytes]:
    """A method, and another content of one of the files of its checkpoint."""
    name = draw(st.sampled_from(("srlora", "lora_sb")))
    files = sorted(path.name for path in _checkpoint(name).iterdir())
    file = draw(st.sampled_from((STATE, STATE, MANIFEST, *files)))
    right = (_checkpoint(name) / file).read_bytes()
    if file.endswith(".json") and draw(st.integers(0, 4)):
        return name, file, as_json(draw(edited(json.loads(right))))
    return name, file, draw(damaged([right], HEADER_WORDS, 2))


def _resume(example: tuple[str, str, bytes], folder: Path) -> None:
    name, file, content = example
    copy = Path(shutil.copytree(_checkpoint(name), folder / "checkpoint-6"))
    (copy / file).write_bytes(content)
    if file != MANIFEST:
        manifest = json.loads((copy / MANIFEST).read_bytes())
        manifest["files"][file] = {"bytes": len(content), "sha256": sha256_of(copy / file)}
        (copy / MANIFEST).write_bytes(as_json(manifest))
    newest(folder)
    found = of_step(folder, 6)
    with own_random_state(2, CPU):
        run = Run(_settings(name), fresh=True)
        with file_errors_explained(folder):
            source = CheckpointSource(found, run.method)
            for layer in source.layers:
                source.low_rank(layer)
        restore(run.engine, run.attached, found, run.recomposer)
        run.done = found.step
        run.train(9)


# ---------------------------------------------------------------------- adapters

LAYER = "model.layers.0.self_attn.q_proj"
ABOUT = {"step": 3, "model": {"class": "LlamaForCausalLM", "num_labels": 2}, "stacked": [], "experts": {}}
CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {LAYER: 2}, "alpha_pattern": {"q_proj": 3},
    "use_rslora": False, "use_dora": False, "bias": "none", "base_model_name_or_path": "some/model",
    "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "modules_to_save": None,
}  # fmt: skip
ADAPTER = save(
    {f"base_model.model.{LAYER}.lora_{side}.weight": torch.ones(shape)
     for side, shape in (("A", (2, 60)), ("B", (60, 2)))},
    {"distlora": json.dumps(ABOUT)},
)  # fmt: skip


@st.composite
def edited_adapters(draw) -> tuple[bytes, bytes]:
    """A config and weights, of which one is not right."""
    if draw(st.booleans()):
        config = draw(st.one_of(edited(CONFIG).map(as_json), damaged([as_json(CONFIG)], (), 3)))
        return config, ADAPTER
    return as_json(CONFIG), draw(damaged([ADAPTER], HEADER_WORDS, 3))


def _read_adapter(example: tuple[bytes, bytes], folder: Path) -> None:
    written(folder, example[0], ADAPTER_CONFIG)
    written(folder, example[1], ADAPTER_WEIGHTS)
    found = read_peft(folder)
    found.refuse_other_model(_tiny(), "some/model")
    with file_errors_explained(folder):
        for layer in found.layers:
            found.pair(layer)


@functools.cache
def _tiny() -> torch.nn.Module:
    return bare_model(ModelSection(path=str(_tiny_dir())))


def _read_export(content: bytes, folder: Path) -> None:
    written(folder, content, ADAPTER_WEIGHTS)
    with file_errors_explained(folder):
        source = AdapterSource(folder)
        for layer in source.layers:
            source.low_rank(layer)


# ---------------------------------------------------------------------- a run directory

RATES = {"rate": 0.1, "loss_before": 3.0, "tried": [[0.1, 2.0], [1.0, None]], "seconds": 1.0, "run": {"a": 1}}
OWNER = {
    "token": "t",
    "host": "h",
    "place": "p",
    "pid": 1,
    "started": 5,
    "job": "",
    "restart": "",
    "since": "",
}
HELD = {
    "state": "failed", "step": 3, "steps": 6, "requeue": True, "message": "m", "start": "s",
    "time": "2026-01-01T00:00:00.000+00:00", "saved": 3,
}  # fmt: skip
SEEN = {"training": {"split": "train", "count": 3, "ordered": "a", "unordered": "b"}}
METRICS = b'{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": "nan"}\n'


def a_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], None]:
    """For a Loader: writes the example under this name, and reads the file."""

    def look(content: bytes, folder: Path) -> None:
        read(written(folder, content, name))

    return look


def _status(path: Path) -> None:
    found = read_status(path.parent)
    assert found.line() and found.code in (0, 1, 75) and found.seconds >= 0


def _seen_data(path: Path) -> None:
    read_seen_data(path.parent)


def _rates(path: Path) -> None:
    read_rate_search(path, RATES["run"])


def _metrics(path: Path) -> None:
    for _, record in records(path.read_text(encoding="utf-8", errors="replace")):
        json.dumps(record)
    read_lines(path, metrics_problem)


# ---------------------------------------------------------------------- models


OTHERS = ("tokenizer_config.json", "tokenizer.json", "generation_config.json")


@functools.cache
def _tiny_dir() -> Path:
    place = tiny_model_dir("llama", Path(tempfile.mkdtemp(prefix="fuzz-kept-")))
    if not (place / "generation_config.json").exists():
        written(
            place, json.dumps({"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}), OTHERS[-1]
        )
    return place


@st.composite
def edited_models(draw) -> tuple[str, bytes]:
    """Another content of one of a model's JSON files."""
    name = draw(st.sampled_from(("config.json", "config.json", *OTHERS)))
    right = (_tiny_dir() / name).read_bytes()
    if name != "tokenizer.json" and draw(st.integers(0, 3)):
        return name, as_json(draw(edited(json.loads(right), 2)))
    return name, draw(damaged([right], (), 3))


def _read_model(example: tuple[str, bytes], folder: Path) -> None:
    copy = folder / "model"
    copy.mkdir()
    for path in _tiny_dir().iterdir():
        (copy / path.name).symlink_to(path)
    (copy / example[0]).unlink()
    written(copy, example[1], example[0])
    section = ModelSection(path=str(copy))
    bare_model(section)
    tokenizer = load_tokenizer(section)
    if example[0] == "generation_config.json":
        model, _ = load_model(section)
        assert all(type(token) is int for token in end_tokens(model, tokenizer))


def json_or_damaged(right: Any) -> st.SearchStrategy[bytes]:
    """A JSON file whose value was edited, or whose text was damaged."""
    return st.one_of(edited(right).map(as_json), damaged([as_json(right)]))


def _owner(path: Path) -> None:
    living_owner(path.parent)


LOADERS = (
    Loader("tensors", damaged([save(TENSORS, {"k": "v"})], HEADER_WORDS), _read_tensors),
    Loader("index of tensors", damaged([INDEX], INDEX_WORDS), _read_index),
    Loader("checkpoint", edited_checkpoints(), _resume),
    Loader("adapter", edited_adapters(), _read_adapter),
    Loader("export", damaged([ADAPTER], HEADER_WORDS), _read_export, 0.5),
    Loader("status", json_or_damaged(HELD), a_file(STATUS, _status), 0.5),
    Loader("lease", json_or_damaged(OWNER), a_file(LEASE, _owner), 0.5, False),
    Loader("seen data", json_or_damaged(SEEN), a_file("data.json", _seen_data), 0.5),
    Loader("rate search", json_or_damaged(RATES), a_file("lr_search.json", _rates), 0.5, False),
    Loader("metrics", damaged([METRICS]), a_file("metrics.jsonl", _metrics), 0.5),
    Loader("model", edited_models(), _read_model, 0.5),
)  # fmt: skip
