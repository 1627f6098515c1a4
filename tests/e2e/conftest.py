"""What the tests of the program share: a tiny model, its data, one finished run, and clusters."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.program import recipe_of, succeed, write_recipe, write_rows
from tests.e2e.testbed import Cluster, cluster, lacking
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


def _standing_cluster(slurm: bool) -> Iterator[Cluster]:
    reason = lacking(slurm)
    if reason:
        pytest.skip(reason)
    kind = "slurm" if slurm else "ssh"
    # pytest's own folders have paths that are too long for sockets.
    with tempfile.TemporaryDirectory(prefix=f"{kind}-") as folder:
        with cluster(Path(folder) / "bed", f"{kind}{os.getpid()}", slurm) as made:
            yield made


@pytest.fixture(scope="session")
def _ssh_hosts() -> Iterator[Cluster]:
    yield from _standing_cluster(slurm=False)


@pytest.fixture(scope="session")
def _slurm_hosts() -> Iterator[Cluster]:
    yield from _standing_cluster(slurm=True)


@pytest.fixture
def ssh_cluster(_ssh_hosts) -> Iterator[Cluster]:
    """head, node1 and node2 with ssh; repaired after every test."""
    yield _ssh_hosts
    _ssh_hosts.repair()


@pytest.fixture
def slurm_cluster(_slurm_hosts) -> Iterator[Cluster]:
    """The same with SLURM: its controller on head, two fake GPUs on each node; repaired after every test,
    jobs aside.
    """
    yield _slurm_hosts
    _slurm_hosts.repair()
