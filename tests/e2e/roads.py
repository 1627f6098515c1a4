"""What the tests of clusters share: a recipe with a known loss curve, and the command lines of every road over two hosts."""

import contextlib
import sys
from pathlib import Path

import pytest

from distlora.status import Status, read_status
from tests.e2e.program import curve, recipe_of, succeed, write_recipe, write_rows
from tests.tiny_models import tiny_model_dir

#: Long enough to be interrupted, on a quiet machine and on a busy one.
STEPS = 40
#: Seconds for a start over two hosts, on a machine that does other things too.
PATIENCE = 280
#: Seconds within which everything has ended after a signal.
FAREWELL = 35


class Bench:
    """A recipe, and the plain engine's run of it on one process: what all others must be like."""

    def __init__(self, folder: Path):
        self.folder = folder
        content = recipe_of(tiny_model_dir("llama", folder), write_rows(folder / "data"), folder / "plain")
        content["method"]["init"]["eta"] = 0.01  # spares a line search
        content["targets"] = ["q_proj", "v_proj", "down_proj"]
        content["train"] |= {"steps": STEPS, "lr": 0.005, "save_every": 8, "eval_every": 0, "exact_match_samples": 0}
        self.recipe = write_recipe(folder / "recipe.yaml", content)
        succeed("train", self.recipe)
        self.losses = curve(folder / "plain")
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("node1 slots=1\nnode2 slots=1\n")

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """RECIPE and overrides of a run at ZeRO-3 into the run directory `name`."""
        return [str(self.recipe), "deepspeed={zero_optimization: {stage: 3}}", f"output_dir={self.folder / name}", *overrides]

    def steps(self, name: str) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return max(curve(self.folder / name), default=0)
        return 0

    def status(self, name: str) -> Status:
        found = read_status(self.folder / name)
        assert found is not None
        return found

    def expect_same_curve(self, name: str, steps: int = STEPS) -> None:
        found = curve(self.folder / name)
        assert list(found) == list(range(1, steps + 1))
        assert found[1] == pytest.approx(self.losses[1], rel=1e-5)
        assert found == pytest.approx({step: self.losses[step] for step in found}, rel=1e-4)


def deepspeed_sh(*words: object) -> list[object]:
    return ["bash", "launch/deepspeed.sh", *words]


def mpi_sh(*words: object) -> list[object]:
    """Open MPI refuses to run as root unless it is told."""
    return ["bash", "launch/mpi.sh", "--mpirun-args=--allow-run-as-root --oversubscribe", *words]


def torchrun(node: int, *arguments: str) -> list[object]:
    """One node's part, as the README says it."""
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", node, "--master-addr", "node1", "--master-port", "29511"]
    return [Path(sys.executable).with_name("torchrun"), *place, "-m", "distlora", "train", *arguments]
