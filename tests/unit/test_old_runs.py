"""Runs of earlier versions go on as they would have gone on then.

tests/data/runs_of_format_N holds run directories as a version wrote them: six steps, and the checkpoint after
the third. Their paths are relative to the folder that they are copied into. The template of the run of
format 2 ends without white space, so that format 3 makes other tokens of its rows. That of format 3 is the
tokenizer's chat template, of which format 4 takes no space before the response. From format 4 on the exported
adapter is kept, too.
"""

import json
import shutil
from pathlib import Path

import pytest

from distlora.engine.comm import Topology
from distlora.recipe.load import load_recipe, load_run_recipe
from distlora.recipe.sections import FORMAT
from distlora.training import evaluate, run, train
from distlora.training.evaluated import Asked, subject_of_run
from tests.tiny_models import tiny_model_dir

DATA = Path(__file__).parents[1] / "data"
RUNS = [path.relative_to(DATA) for path in sorted(DATA.glob("runs_of_format_*/*"))]
STEPS = {4, 5, 6}


@pytest.fixture(params=RUNS, ids=str)
def kept(request) -> Path:
    return request.param


@pytest.fixture
def run_dir(kept, tmp_path, monkeypatch) -> Path:
    """A copy of a run directory, in the current folder, beside its model."""
    monkeypatch.chdir(tmp_path)
    tiny_model_dir("llama", Path("models"))
    return Path(shutil.copytree(DATA / kept, Path("runs") / kept.name))


def resume(run_dir: Path) -> None:
    """Goes on with a run as `distlora train RUN/recipe.yaml` does."""
    recipe = load_recipe(run_dir / "recipe.yaml")
    train.check(recipe, Topology(), None)
    summary = train.train(recipe, Topology(), None)
    assert summary.steps == max(STEPS) and (run_dir / "checkpoint-6").is_dir()


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(run_dir: Path, key: str) -> dict[int, float]:
    """By step, the last that was written."""
    return {line["step"]: line[key] for line in lines(run_dir / "metrics.jsonl") if key in line}


def recompositions(run_dir: Path) -> dict[int, dict]:
    """By step, the last that was written: what was decided, and which components it replaced."""
    return {
        line["step"]: {
            "swapped": line["swapped"],
            "reason": line["reason"].replace("swap ", "recomposition "),  # as they were called then
            "components": {layer: found["components"] for layer, found in line["layers"].items()},
        }
        for line in lines(run_dir / "recompositions.jsonl")
    }


def test_there_are_runs_of_earlier_formats():
    runs = {"runs_of_format_1/srlora", "runs_of_format_1/lora_sb", "runs_of_format_2/lora_sb"}
    runs |= {"runs_of_format_3/lora_sb_chat", "runs_of_format_4/lora_sb", "runs_of_format_4/srlora"}
    assert FORMAT == 4, "keep runs of the new format, too"
    assert {str(run) for run in RUNS} >= runs


def test_a_resumed_run_takes_the_steps_that_it_took_then(run_dir):
    trained, evaluated = losses(run_dir, "train/loss"), losses(run_dir, "eval/loss")
    decided = {step: line for step, line in recompositions(run_dir).items() if step in STEPS}
    assert trained.keys() >= STEPS and decided
    for name in ("metrics.jsonl", "recompositions.jsonl"):  # so that they hold only what is written now
        (run_dir / name).write_text("")
    resume(run_dir)
    again = losses(run_dir, "train/loss")
    assert again == pytest.approx({step: trained[step] for step in STEPS}, rel=1e-5)
    assert losses(run_dir, "eval/loss")[6] == pytest.approx(evaluated[6], rel=1e-5)
    assert recompositions(run_dir) == decided


def test_a_resumed_run_keeps_its_format(kept, run_dir):
    before = load_run_recipe(run_dir / "recipe.yaml")
    assert kept.parent.name == f"runs_of_format_{before.format}"
    resume(run_dir)
    assert load_run_recipe(run_dir / "recipe.yaml") == before
    assert load_recipe(run_dir / "recipe.yaml").format == before.format


def test_training_and_evaluation_read_the_data_in_the_format_of_the_run(kept, run_dir, monkeypatch):
    seen, objective_of = [], run.objective_of
    for module in (run, evaluate):
        monkeypatch.setattr(
            module, "objective_of", lambda recipe: seen.append(recipe.format) or objective_of(recipe)
        )
    given = load_recipe(run_dir / "recipe.yaml").in_format(FORMAT)
    evaluate.evaluate(subject_of_run(run_dir, []), Topology(), Asked())
    train.train(given, Topology())
    assert given.format == FORMAT and seen == [load_run_recipe(DATA / kept / "recipe.yaml").format] * 2


@pytest.mark.parametrize("kept", [run for run in RUNS if (DATA / run / "adapter").exists()], ids=str)
def test_an_export_computes_what_its_run_computed(kept, run_dir):
    """A run that starts from the adapter begins with the loss with which the run ended."""
    ended = losses(run_dir, "eval/loss")[6]
    start = [f"method={{name: lora, from: {run_dir}/adapter}}", "output_dir=runs/again", "train.steps=1"]
    recipe = load_recipe(run_dir / "recipe.yaml", start)
    train.check(recipe, Topology(), None)
    assert train.train(recipe, Topology(), None).before["loss"] == pytest.approx(ended, rel=1e-5)
