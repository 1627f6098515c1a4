"""The program under every launcher, on two ranks of this machine: one loss curve, one sentence, and nobody left behind.

A start with DeepSpeed takes many seconds, so each has to show several things.
"""

import csv
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.program import (
    Outcome,
    curve,
    free_port,
    metrics,
    python,
    recipe_of,
    run,
    started,
    succeed,
    wait_until,
    write_recipe,
    write_rows,
)
from tests.tiny_models import tiny_model_dir

STEPS = 24
#: Seconds within which the ranks of a group must have followed one that died.
FAREWELL = 60

MONITORS = {name: {"enabled": True, "output_path": "auto", "job_name": "auto"} for name in ("tensorboard", "csv_monitor")}


class Bench:
    """A recipe, and the plain engine's run of it: what all others must be like."""

    def __init__(self, folder: Path):
        self.folder = folder
        content = recipe_of(tiny_model_dir("llama", folder), write_rows(folder / "data"), folder / "plain")
        content["train"] |= {"steps": STEPS, "lr": 0.002, "save_every": 4, "eval_every": 6}
        self.recipe = write_recipe(folder / "recipe.yaml", content)
        succeed("train", self.recipe)
        self.losses, self.evaluations = curve(folder / "plain"), curve(folder / "plain", "eval/loss")

    def arguments(self, name: str, stage: int, *overrides: str, **zero) -> list[str]:
        """`train RECIPE …` at a ZeRO stage, into the run directory `name`."""
        settings = f"{{zero_optimization: {{stage: {stage}}}}}"
        return ["train", str(self.recipe), f"deepspeed={settings}", f"output_dir={self.folder / name}", *overrides]

    def same_curve(self, name: str, steps: int = STEPS) -> None:
        found = curve(self.folder / name)
        assert list(found) == list(range(1, steps + 1))
        assert found == pytest.approx({step: self.losses[step] for step in found}, rel=1e-4)
        evaluations = curve(self.folder / name, "eval/loss")
        assert evaluations == pytest.approx({step: self.evaluations[step] for step in evaluations}, rel=1e-4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("launchers"))


def deepspeed(*arguments: str) -> list[str]:
    return ["deepspeed", "--hostfile", os.devnull, "--num_gpus", "2", "--master_port", free_port(), "--module", "distlora", *arguments]


# ---------------------------------------------------------------------- the same run


def test_deepspeed_with_its_monitors(bench):
    arguments = bench.arguments("deepspeed", 3, "deepspeed.tensorboard={enabled: true, output_path: auto, job_name: auto}",
                                "deepspeed.csv_monitor={enabled: true, output_path: auto, job_name: auto}",
                                "deepspeed.zero_optimization.stage3_param_persistence_threshold=auto", "train.steps=6")
    outcome = run(*deepspeed(*arguments))
    assert outcome.code == 0, outcome.err
    print(outcome.out, outcome.err)
    bench.same_curve("deepspeed", 6)
