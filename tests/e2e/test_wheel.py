"""The wheel, built and installed, away from the repository: recipes, ZeRO configs and scripts are in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.program import REPOSITORY, run

#: What pip reads to build it, as the images and a source archive have it.
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "distlora", "configs", "launch", "examples")


def build(sources: Path, out: Path) -> Path:
    """The wheel of these sources; without a network, by the build tools of this environment."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", out, sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("distlora-*.whl")
    return wheel


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy, since a build leaves folders beside what it builds."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source, ignored = REPOSITORY / name, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build(sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the installed package; what it needs is in this environment."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_file_that_is_shipped_lies_in_the_wheel_and_is_the_repositorys(wheel):
    with zipfile.ZipFile(wheel) as archive:
        prefix = "distlora/shipped/"
        found = {
            name.removeprefix(prefix): archive.read(name)
            for name in archive.namelist()
            if name.startswith(prefix)
        }
    assert found == {name: (REPOSITORY / name).read_bytes() for name in found}
    wanted = [
        path.relative_to(REPOSITORY).as_posix()
        for pattern in ("configs/recipes/*", "configs/sweeps/*", "configs/zero/*", "examples/*.jsonl")
        for path in REPOSITORY.glob(pattern)
    ]
    scripts = ["launch/deepspeed.sh", "launch/mpi.sh", "launch/slurm.sbatch"]
    assert wanted and set(found) >= {*wanted, *scripts}


def test_a_file_that_an_earlier_build_has_left_is_not_shipped(sources, wheel, tmp_path):
    """pip builds where the sources lie, in a folder that stays."""
    stale = sources / "build" / "lib" / "distlora" / "shipped" / "configs" / "recipes" / "removed.yaml"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text("model: {}\n")
    with zipfile.ZipFile(build(sources, tmp_path)) as archive:
        assert not any("removed.yaml" in name for name in archive.namelist())
    assert not stale.exists()


def test_the_installed_package_is_used_without_the_repository(installed, model, data, tmp_path):
    """Recipes are listed and copied, and a copy is planned and tried on a model and data of the user's."""
    own = [
        f"model.path={model}", "model.dtype=float32", f"output_dir={tmp_path / 'run'}",
        "data.task=gsm8k", f"data.path={data}", "data.split=train", "data.eval_split=test",
        "method.rank=4", "data.max_length=400",
    ]  # fmt: skip
    commands = [
        ["recipes"],
        ["copy", "quickstart", "mine.yaml"],
        ["copy", "deepspeed.sh", "."],
        ["plan", "mine.yaml", *own, "--nodes", "1", "--gpus-per-node", "2"],
        ["train", "mine.yaml", "--dry-run", *own],
    ]
    # In one process: a start takes longer than any of them. With -P the working directory is not searched.
    program = (
        "import os, distlora; from distlora.cli.main import main; "
        f"os.chdir({str(tmp_path)!r}); "
        f"print(distlora.__file__); assert not any([main(words) for words in {commands!r}])"
    )
    outcome = run(sys.executable, "-P", "-c", program, PYTHONPATH=str(installed))
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0] == str(installed / "distlora" / "__init__.py")
    recipes = REPOSITORY / "configs" / "recipes"
    assert all(path.stem in outcome.out for path in recipes.glob("*.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == (recipes / "quickstart.yaml").read_text()
    assert {"deepspeed.sh", "_job.sh", "_environment.sh"} <= set(os.listdir(tmp_path))
    assert not (tmp_path / "run").exists()
