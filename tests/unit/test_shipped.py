"""Files that come with distlora are found by name from any folder, in a checkout or installed."""

import json
import shutil
from pathlib import Path

import pytest

from distlora.errors import UserError
from distlora.recipe import shipped
from distlora.recipe.load import load_recipe
from distlora.sweeps.file import read_sweep_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The files as they lie in an installed package."""
    package = tmp_path / "site-packages" / "distlora"
    for folder in ("configs", "launch", "examples"):
        shutil.copytree(ROOT / folder, package / "shipped" / folder)
    (package.parent / "configs" / "recipes").mkdir(parents=True)  # of another package
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    return package / "shipped"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_the_files_of_a_checkout_are_found():
    assert shipped.shipped_root() == ROOT
    assert shipped.shipped_recipes()["quickstart"] == ROOT / "configs/recipes/quickstart.yaml"
    assert shipped.shipped_zero()["zero3"] == ROOT / "configs/zero/zero3.json"
    assert shipped.shipped_launch().keys() == {"deepspeed.sh", "mpi.sh", "slurm.sbatch"}
    assert "minilm-glue" in shipped.shipped_sweeps() and "conversations.jsonl" in shipped.shipped_examples()


def test_the_files_of_an_installed_package_are_found(installed):
    assert shipped.shipped_recipes()["quickstart"] == installed / "configs/recipes/quickstart.yaml"
    assert len(shipped.shipped_recipes()) == len(list((ROOT / "configs/recipes").glob("*.yaml")))


@pytest.mark.parametrize(
    "name", ["quickstart", "configs/recipes/quickstart.yaml", "./configs/recipes/quickstart.yaml"]
)
def test_a_shipped_recipe_and_its_deepspeed_config_need_no_checkout(name, installed):
    recipe = load_recipe(name, ["train.steps=3"])
    assert recipe.train.steps == 3 and recipe.deepspeed["zero_optimization"]["stage"] == 3


def test_a_shipped_sweep_needs_no_checkout(installed):
    assert read_sweep_file("minilm-glue").recipe == installed / "configs/recipes/minilm-rte.yaml"


def test_a_file_of_the_user_comes_before_a_shipped_one(installed):
    shutil.copy(ROOT / "configs/recipes/minilm-rte.yaml", "quickstart")
    assert load_recipe("quickstart").data.task == "rte"
    zero = Path("configs/zero/zero3.json")
    zero.parent.mkdir(parents=True)
    zero.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert load_recipe("smollm2-gsm8k", [f"deepspeed={zero}"]).deepspeed == {
        "zero_optimization": {"stage": 1}
    }


@pytest.mark.parametrize("folder", [False, True])
def test_a_copy_can_be_changed_and_run_where_it_lies(folder, installed):
    Path("mine").mkdir()
    (copy,) = shipped.copy_shipped("mistral-7b-metamath", Path("mine" if folder else "mine/own.yaml"))
    assert copy == Path("mine") / ("mistral-7b-metamath.yaml" if folder else "own.yaml")
    assert load_recipe(copy) == load_recipe("mistral-7b-metamath")


def test_a_script_is_copied_with_the_files_that_it_reads():
    copied = shipped.copy_shipped("deepspeed.sh", Path())
    assert sorted(path.name for path in copied) == ["_environment.sh", "_job.sh", "deepspeed.sh"]
    assert [path.name for path in shipped.copy_shipped("slurm.sbatch", Path("job.sbatch"))] == ["job.sbatch"]


@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        ("mistral-7b-metamat", "x.yaml", "is called mistral-7b-metamat, did you mean mistral-7b-metamath?"),
        ("quickstart", "there.yaml", "there.yaml exists already; name another file"),
        ("deepspeed.sh", "run.sh", "_job.sh exists already; name another file"),
        ("quickstart", "nowhere/x.yaml", "there is no folder nowhere; make it first"),
        ("quickstart", "a/..", "there is no folder a; make it first"),
    ],
)
def test_nothing_is_overwritten_and_nothing_half_copied(name, target, told):
    for there in ("there.yaml", "_job.sh"):
        Path(there).write_text("mine")
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        shipped.copy_shipped(name, Path(target))
    assert {path.name: path.read_text() for path in Path().iterdir()} == {
        "there.yaml": "mine",
        "_job.sh": "mine",
    }


def test_every_recipe_and_sweep_is_described_in_one_line():
    for path in (*shipped.shipped_recipes().values(), *shipped.shipped_sweeps().values()):
        said = shipped.description(path)
        assert 20 < len(said) < 220 and "#" not in said and "\n" not in said, (path, said)
    assert shipped.description(shipped.shipped_file("smollm2-chat")).startswith(
        "SmolLM2-135M-Instruct on conv"
    )


def test_a_mistyped_name_is_answered_by_the_nearest():
    with pytest.raises(UserError, match=r"^quikstart: no such recipe, did you mean quickstart\?$"):
        load_recipe("quikstart")
