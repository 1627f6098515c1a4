"""Files of checkpoints, adapters, run directories and models whose content somebody has chosen to do harm."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from distlora.checkpoints.directory import newest, of_step
from distlora.checkpoints.stored import MANIFEST, STATE, NewerFormat
from distlora.errors import UserError
from distlora.exports.peft_files import read_peft
from distlora.files.atomic import sha256_of
from distlora.files.tensor_headers import read_header
from distlora.files.tensors import TensorFiles
from distlora.models.foreign import check_configs
from distlora.models.loading import bare_model, load_config, load_model, load_tokenizer
from distlora.recipe.sections import ModelSection
from distlora.training.monitor import _keep_until
from tests.tiny_models import tiny_model_dir
from tests.unit.test_peft_files import LAYER, adapter

KEPT = Path(__file__).parents[1] / "data" / "runs_of_format_2" / "lora_sb"


def entry(dtype="F32", shape=(2,), place=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def tensor_file(path: Path, header: dict | bytes, numbers: int = 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    path.write_bytes(size + text + bytes(numbers))
    return path


# ---------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry(), "b": entry(place=(4, 12))}, "tensor b overlaps a"),
        ({"a": entry(), "b": entry()}, "tensor b overlaps a"),
        ({"a": entry(place=(4, 12))}, "tensor a leaves a gap behind the header"),
        ({"a": entry(place=(0, 80), shape=(20,))}, "its tensors have 80 bytes, and the file holds 8"),
        ({"a": entry(place=(8, 0))}, "has another size than its shape"),
        ({"a": entry(shape=(3,))}, "has another size than its shape"),
        ({"a": entry(shape=(-2,))}, "has the shape"),
        ({"a": entry(shape=(2.0,))}, "has the shape"),
        ({"a": entry(shape=(1 << 40,), place=(0, 1 << 42))}, "and the file holds 8"),
        ({"a": entry(dtype="F33")}, "the unknown dtype F33"),
        ({"a": entry() | {"more": 1}}, "is not described by"),
        ({"a": entry(), "__metadata__": {"k": 1}}, "its metadata are not texts"),
        (b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", "twice"),
        (b'{"\xff": 1}', "byte 2 is not UTF-8"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"[1]", "is no JSON object"),
    ],
)
def test_a_header_that_is_not_true_is_refused(tmp_path, header, said):
    path = tensor_file(tmp_path / "model.safetensors", header)
    with pytest.raises(SafetensorError, match=said):
        read_header(path)


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 200_000_000])
def test_a_header_of_a_terabyte_is_refused_before_anything_is_allocated(tmp_path, length):
    path = tensor_file(tmp_path / "model.safetensors", {"a": entry()}, length=length)
    with pytest.raises(SafetensorError, match=f"its header would have {length} bytes"):
        TensorFiles(tmp_path, "model")
    assert path.stat().st_size < 200


def test_an_index_leads_to_no_other_folder_and_to_no_file_that_lacks_the_tensor(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for file in ("../model-1.safetensors", "/etc/passwd", "model-1.bin", 3, None):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(SafetensorError, match="is none of the files that belong to it"):
            TensorFiles(tmp_path, "model")
    index.write_text(json.dumps({"weight_map": {"b": "model-1.safetensors"}}))
    with pytest.raises(SafetensorError, match="tensor b, which the index puts there, is missing"):
        TensorFiles(tmp_path, "model").check()
    with pytest.raises(SafetensorError, match="is none of the files"):
        TensorFiles(tmp_path, "model", {"model.safetensors.index.json"})


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "run"))


def change(path: Path, **changes) -> None:
    """Of a checkpoint's state; the manifest is made to fit."""
    state = json.loads((path / STATE).read_text()) | changes
    (path / STATE).write_text(json.dumps(state))
    sign(path, STATE)


def sign(path: Path, *names: str, **more) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | more
    for name in names:
        manifest["files"][name] = {
            "bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name),
        }  # fmt: skip
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"}, {"step": True}, {"step": 3.0}, {"rank": -1}, {"targets": "q_proj"}, {"model": None},
        {"optimizer_steps": 1 << 60}, {"seed": "x"}, {"extra": []}, {"rng": {}}, {"rng": {"cpu": ["§"]}},
        {"ledger": {"a": [{"number": 0}]}}, {"weights": {"a": [1]}}, {"recompose": {"swaps": 1}},
        {"recompose": {"swaps": 1, "done": 3, "born": {}, "origin": {}, "reserves": {}, "switching": {}}},
    ],
)  # fmt: skip
def test_a_state_with_a_wrong_field_is_a_broken_checkpoint(run_dir, caplog, changes):
    change(run_dir / "checkpoint-3", **changes)
    assert newest(run_dir) is None and "state.json is damaged (" in caplog.text
    with pytest.raises(UserError, match="checkpoint-3 is broken: state.json is damaged"):
        of_step(run_dir, 3)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "a\0b"])
def test_a_manifest_names_no_file_elsewhere(run_dir, name):
    path = run_dir / "checkpoint-3"
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"][STATE]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no name of a file in the checkpoint"):
        of_step(run_dir, 3)


def test_a_file_of_a_checkpoint_is_no_link_to_another_place(run_dir, tmp_path):
    path = run_dir / "checkpoint-3"
    shutil.move(path / "adapter.safetensors", tmp_path / "elsewhere")
    (path / "adapter.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="adapter.safetensors is a link that leads out of the run directory"):
        of_step(run_dir, 3)


def test_what_the_manifest_does_not_name_is_not_read(run_dir):
    path = run_dir / "checkpoint-3"
    right = load_file(path / "adapter.safetensors")
    (path / "other.safetensors").write_bytes(save({name: -tensor for name, tensor in right.items()}))
    (path / "adapter.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(right, "other.safetensors")})
    )
    found = newest(run_dir)
    files = TensorFiles(found.path, "adapter", found.files)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in right.items())


def test_a_newer_format_is_refused_by_name_and_not_passed_over(run_dir):
    path = run_dir / "checkpoint-3"
    change(path, format=2)
    sign(path, format=2)
    for look in (lambda: newest(run_dir), lambda: of_step(run_dir, 3)):
        with pytest.raises(NewerFormat, match="is of format 2, .* up to format 1; use a newer version"):
            look()


def test_a_checkpoint_is_not_newer_by_one_wrong_number(run_dir):
    sign(run_dir / "checkpoint-3", format=2)
    assert newest(run_dir) is None


# ---------------------------------------------------------------------- a run directory


def test_foreign_lines_of_metrics_are_left_out_and_that_is_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "train/loss": 2.0}', b"\xff\xfe", b'{"train/loss": 1.0}', b"[1, 2]", b"hello",
        b'{"step": "2"}', b'{"step": -1}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 5000,
        b'{"step": 2, "train/loss": 1.5}', b'{"step": 3, "tra',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert _keep_until(path, 2) == {(1, "step"), (1, "train/loss"), (2, "step"), (2, "train/loss")}
    assert path.read_bytes().splitlines() == [lines[0], lines[9]]
    assert "8 lines that no run has written left out" in caplog.text


# ---------------------------------------------------------------------- adapters


def test_a_strangers_index_beside_an_adapter_is_not_believed(tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors.index.json").write_text('{"weight_map": {"a": "/etc/passwd"}}')
    assert list(read_peft(tmp_path).layers) == [LAYER]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: input should be a valid string"),
        ({"use_rslora": "yes"}, "use_rslora: input should be a valid boolean"),
        ({"target_parameters": "experts"}, "target_parameters: input should be a valid array"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "is no pattern"),
        ({"alpha_pattern": {".*.*.*.*b": 3}}, "is no pattern"),
        ({"rank_pattern": {"a" * 600: 3}}, "is no pattern"),
    ],
)
def test_a_strangers_config_is_checked(tmp_path, config, said):
    with pytest.raises(UserError) as caught:
        read_peft(adapter(tmp_path, **config))
    assert said in str(caught.value)


def test_weights_of_a_stranger_are_numbers_that_fit_together(tmp_path):
    adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    right = load_file(file)
    save_file({name: tensor.to(torch.int64) for name, tensor in right.items()}, file)
    with pytest.raises(UserError, match=r"is of torch.int64\); export it again"):
        read_peft(tmp_path)
    save_file(right | {f"base_model.model.{LAYER}.lora_magnitude_vector": torch.ones(5)}, file)
    with pytest.raises(UserError, match=r"the magnitudes \(5,\) of layer .* do not fit its 4 rows"):
        read_peft(tmp_path)


# ---------------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_model_dir("llama", tmp_path)


def section(path: Path) -> ModelSection:
    return ModelSection(path=str(path), dtype="float32", gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; fetch it again"),
        ({"hidden_size": 0}, "hidden_size is 0; fetch it again"),
        ({"hidden_size": "60"}, "model.path="),
        ({"vocab_size": 10**9}, "the sizes of the weights are not those of config.json"),
        ({"hidden_act": "os.system"}, "model.path="),
        ({"rope_parameters": 3}, "model.path="),
        (
            {"attn_implementation": "someone/kernels"},
            "names code of its own (someone/kernels), which is never",
        ),
        ({"text_config": {"_attn_implementation": "a/b"}}, "names code of its own"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is not supported"),
    ],
)
def test_a_hostile_config_is_one_sentence_before_anything_is_allocated(model, changes, said):
    content = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        bare_model(section(model))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 9000, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_a_file_of_a_model_that_is_no_json_is_one_sentence(model, name, content):
    (model / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not a valid JSON (file|object)"):
        load_config(section(model))


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"model": {"type": "BPE", "vocab": 3}}', b"\0" * 99])
def test_a_tokenizer_that_is_none_is_one_sentence(model, content):
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="model.path="):
        load_tokenizer(section(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_weights_that_can_execute_code_are_named_and_not_loaded(model, name):
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=f"no \\*.safetensors in .*; {name} is in a format that can execute"):
        load_model(section(model))


def test_a_model_of_one_file_is_not_read_by_a_strangers_index(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "/etc/passwd"}}')
    assert "model.norm.weight" in TensorFiles(model, "model")
    load_model(section(model))


@pytest.mark.parametrize(
    ("file", "key", "value", "wanted"),
    [
        ("config.json", "dtype", {}, "the name of a dtype"),
        ("config.json", "torch_dtype", 16, "the name of a dtype"),
        ("config.json", "eos_token_id", [[]], "the number of a token"),
        ("generation_config.json", "eos_token_id", False, "the number of a token"),
        ("generation_config.json", "pad_token_id", 2.5, "the number of a token"),
    ],
)
def test_values_of_a_config_that_nobody_looks_at_are_looked_at(file, key, value, wanted, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=f"{file}: {key} is .*, wanted {wanted}"):
        check_configs("model", tmp_path)
    (tmp_path / file).write_text(json.dumps({key: [1, 2] if "token" in key else "float32"}))
    check_configs("model", tmp_path)
