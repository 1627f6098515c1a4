"""What the tests of the program share: a tiny model, its data, and one finished run."""

from pathlib import Path

import pytest

from tests.e2e.program import recipe_of, succeed, write_recipe, write_rows
from tests.tiny_models import tiny_model_dir


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def recipe(model, data, tmp_path) -> Path:
    """A recipe whose run goes to `tmp_path / "run"`."""
    return write_recipe(tmp_path / "recipe.yaml", recipe_of(model, data, tmp_path / "run"))


@pytest.fixture(scope="session")
def finished(model, data, tmp_path_factory):
    """The outcome of a whole run, and its directory; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = succeed("train", write_recipe(folder / "recipe.yaml", recipe_of(model, data, folder / "run")))
    return outcome, folder / "run"
