"""A recipe with a known loss curve: what a run must be like by whichever road it was started, and whatever
came between.
"""

import contextlib
from pathlib import Path

import pytest

from distlora.cluster.status import Status, read_status
from tests.e2e.program import curve, recipe_of, succeed, write_recipe, write_rows
from tests.tiny_models import tiny_model_dir


class Bench:
    """The recipe, and the plain engine's run of it on one process."""

    def __init__(self, folder: Path, rows: int = 22, **train):
        """rows: of the training set. train: of the recipe's section."""
        self.folder = folder
        content = recipe_of(
            tiny_model_dir("llama", folder), write_rows(folder / "data", rows), folder / "plain"
        )
        # One number for η spares the line search: that is a hundred gathers of the model under ZeRO-3.
        content["method"]["init"]["eta"] = 0.01
        content["targets"] = ["q_proj", "v_proj", "down_proj"]
        content["train"] |= {"lr": 0.005, "eval_every": 0, "exact_match_samples": 0} | train
        self.recipe = write_recipe(folder / "recipe.yaml", content)
        self.plain()

    def plain(self, name: str = "plain", *overrides: str) -> None:
        """Another run of the plain engine, into the run directory `name`."""
        succeed("train", self.recipe, f"output_dir={self.folder / name}", *overrides)

    def arguments(self, name: str, *overrides: str, stage: int = 3) -> list[str]:
        """RECIPE and overrides of a run at a ZeRO stage into the run directory `name`."""
        settings = f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        return [str(self.recipe), settings, f"output_dir={self.folder / name}", *overrides]

    def steps(self, name: str) -> int:
        """How many a run has made."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return max(curve(self.folder / name), default=0)
        return 0

    def status(self, name: str) -> Status:
        found = read_status(self.folder / name)
        assert found is not None, f"{name} has no status"
        return found

    def expect_same_curve(self, name: str, steps: int | None = None, quiet: str = "plain") -> None:
        """steps: of a shorter run. quiet: the run directory to compare with."""
        wanted, found = (curve(self.folder / place) for place in (quiet, name))
        steps = steps or max(wanted)
        assert list(found) == list(range(1, steps + 1))
        assert found[1] == pytest.approx(wanted[1], rel=1e-5)
        assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-4)
        wanted, found = (curve(self.folder / place, "eval/loss") for place in (quiet, name))
        assert max(found) == steps
        common = (
            found.keys() & wanted.keys()
        )  # a shorter run has its last one where the other need not have any
        assert common >= {step for step in wanted if step <= steps}
        assert {step: found[step] for step in common} == pytest.approx(
            {step: wanted[step] for step in common}, rel=1e-4
        )
