"""`distlora verify`: what is whole, what can be done with it, and what is not whole."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distlora.checkpoints.soundness import mark
from distlora.files.atomic import sha256_of
from tests.e2e.program import call, files_of, succeed
from tests.tiny_models import tiny_model_dir

DATA = Path(__file__).parents[1] / "data"
RUNS = [path.relative_to(DATA) for path in sorted(DATA.glob("runs_of_format_*/*"))]
KEPT = DATA / "runs_of_format_4" / "lora_sb"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "run"))


def refusal(path: Path) -> str:
    outcome = call("verify", path)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    (sentence,) = outcome.sentences
    return sentence


@pytest.mark.parametrize("kept", RUNS, ids=str)
def test_runs_of_every_format_are_whole(kept):
    """And stay as they are."""
    before = files_of(DATA / kept)
    first, *_ = succeed("verify", DATA / kept).out.splitlines()
    assert first.startswith("checkpoint-3: whole, ") and "can be resumed, exported, evaluated" in first
    assert files_of(DATA / kept) == before


def test_checkpoints_exports_and_models_alone(run_dir, tmp_path):
    assert "can be resumed" in succeed("verify", run_dir / "checkpoint-3").out
    assert succeed("verify", run_dir / "adapter").out == "adapter: whole; can be evaluated\n"
    assert "llama: whole" in succeed("verify", tiny_model_dir("llama", tmp_path)).out


def test_json_says_the_same(run_dir):
    checkpoint, adapter = json.loads(succeed("verify", run_dir, "--json").out)
    assert (checkpoint["name"], checkpoint["problem"], checkpoint["soundness"]) == (
        "checkpoint-3",
        None,
        "good",
    )
    assert adapter["can"] == ["exported", "evaluated"]


@pytest.mark.parametrize("name", ["adapter", "ledger", "optimizer", "recompose", "state"])
def test_one_changed_byte_is_found(run_dir, name):
    (file,) = (run_dir / "checkpoint-3").glob(f"{name}.*")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert f"{file.name} has another checksum" in refusal(run_dir)
    assert call("verify", run_dir).out.splitlines()[1].startswith("adapter: whole")


def test_what_is_missing_cut_or_marked_bad_is_found(run_dir):
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "adapter: " in refusal(run_dir)
    mark(run_dir / "checkpoint-3", "bad", "its loss was not finite")
    assert "marked bad: its loss was not finite" in refusal(run_dir)
    (run_dir / "checkpoint-3" / "ledger.safetensors").unlink()
    assert "ledger.safetensors is missing" in refusal(run_dir / "checkpoint-3")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_the_adapter_lacks_is_named(name, run_dir):
    (run_dir / "adapter" / name).unlink()
    for path in (run_dir, run_dir / "adapter"):
        said = refusal(path)
        assert "such as adapter: " in said and name in said


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_no_export_may_have_are_found(value, run_dir):
    """In an adapter, which has no checksums, and in a checkpoint whose loss nobody has seen."""
    for file in ("checkpoint-3/adapter.safetensors", "adapter/adapter_model.safetensors"):
        tensors = load_file(run_dir / file)
        with safe_open(run_dir / file, "pt") as opened:
            about = opened.metadata()
        first = next(name for name in tensors if tensors[name].is_floating_point())
        tensors[first].view(-1)[0] = value
        save_file(tensors, run_dir / file, about)
    fit_manifest(run_dir / "checkpoint-3")
    said = call("verify", run_dir).out + " ".join(call("verify", run_dir).sentences)
    for name in ("checkpoint-3", "adapter"):
        assert f"{name}: whole, but model.layers.0." in said
    assert "infinite or not a number" in refusal(run_dir / "adapter")


def fit_manifest(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / "adapter.safetensors"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_without_checkpoints_says_so(run_dir):
    shutil.rmtree(run_dir / "checkpoint-3")
    assert succeed("verify", run_dir).out.startswith("adapter: whole")
    shutil.rmtree(run_dir / "adapter")
    assert refusal(run_dir).endswith("such as run: has no checkpoint and no adapter; train first")


def test_a_newer_format_is_refused_by_name(run_dir):
    folder = run_dir / "checkpoint-3"
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    state["format"] = manifest["format"] = 99
    (folder / "state.json").write_text(json.dumps(state))
    entry = {"bytes": (folder / "state.json").stat().st_size, "sha256": sha256_of(folder / "state.json")}
    manifest["files"]["state.json"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "is of format 99, and this version of distlora reads checkpoints up to format" in refusal(run_dir)
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("format: 4", "format: 99"))
    assert "format" in refusal(run_dir) and "99" in refusal(run_dir)


def test_what_is_no_run_is_one_sentence(tmp_path):
    assert "is no run" in refusal(tmp_path)
    assert "is no directory" in refusal(tmp_path / "nothing")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert "link" in refusal(link)
