"""A run that starts from the adapter of another, by the command line."""

import shutil

import pytest
import yaml

from tests.e2e.program import call, curve, free_port, recipe_of, run, succeed, write_recipe
from tests.e2e.program import metrics as numbers

SHORT = ["train.steps=2", "train.save_every=1", "train.exact_match_samples=0", "train.eval_every=0"]


@pytest.fixture(scope="module")
def finished_first(model, data, tmp_path_factory):
    """The directory of a finished run of lora; not to be changed."""
    folder = tmp_path_factory.mktemp("first")
    recipe = write_recipe(folder / "recipe.yaml", recipe_of(model, data, folder / "run"))
    own = ["method={name: lora, rank: 3, alpha: 6}", "targets=[q_proj, v_proj]"]
    succeed("train", recipe, *own, *SHORT)
    return folder / "run"


@pytest.fixture
def first(finished_first, tmp_path):
    """The same, as this test's own: its adapter may be moved."""
    return shutil.copytree(finished_first, tmp_path / "first") / "adapter"


def _before(run_dir):
    return next(row["eval/loss"] for row in numbers(run_dir) if row["step"] == 0 and "eval/loss" in row)


def test_a_run_starts_where_another_ended(first, recipe, tmp_path):
    adapter = first
    start, run_dir = [f"method={{name: lora, from: '{adapter}'}}", *SHORT], tmp_path / "run"
    text = recipe.read_text()
    recipe.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(text).items() if k != "targets"}))
    outcome = succeed("train", recipe, *start)
    assert f"started from {adapter}" in outcome.err
    resolved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert resolved["method"]["rank"] == 3 and resolved["method"]["from"] == str(adapter)
    assert len(resolved["targets"]) == 6
    ended = [row["eval/loss"] for row in numbers(tmp_path / "first") if "eval/loss" in row][-1]
    assert _before(run_dir) == pytest.approx(ended, abs=1e-5)

    # Under ZeRO-3 on two ranks.
    zero3 = ["deepspeed=configs/zero/zero3.json", f"output_dir={tmp_path / 'zero3'}"]
    port = free_port()
    ranks = ["torchrun", "--nproc-per-node", "2", "--master-port", port, "-m", "distlora"]
    shared = run(*ranks, "train", recipe, *start, *zero3)
    assert shared.code == 0, shared.err
    assert _before(tmp_path / "zero3") == pytest.approx(ended, abs=1e-5)
    assert curve(tmp_path / "zero3") == pytest.approx(curve(run_dir), rel=1e-4)

    # It goes on from its own checkpoint, and is evaluated and exported without the adapter.
    last = max(run_dir.glob("checkpoint-*"))
    shutil.rmtree(last)
    succeed("train", recipe, *start, "--resume")
    shown = succeed("plan", recipe, *start, "--nodes", "1", "--gpus-per-node", "1").out
    assert shown
    shown = succeed("methods", recipe, *start).out
    assert "r is 3" in shown and "training starts from: for dora, lora, rslora" in shown
    adapter.rename(tmp_path / "away")
    succeed("export", run_dir, "--format", "peft", "--out", tmp_path / "out")
    refused = call("train", recipe, *start, f"output_dir={tmp_path / 'third'}")
    assert refused.code == 2 and "there is no such directory" in refused.sentences[0]


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("lora, rank: 5", [], "method.rank is 5, and the adapter that the run starts from"),
        ("lora", ["targets=[q_proj]"], "targets leaves out"),
        ("dora", [], "is not method dora; set method.name to lora"),
        ("pissa", [], "method pissa starts from no adapter"),
        ("lora_sb", [], "method lora_sb starts from no adapter"),
        ("lora_pro", [], "method lora_pro starts from no adapter"),
    ],
)
def test_what_a_start_does_not_fit_is_one_sentence(method, more, said, first, recipe, tmp_path):
    for verb in ("train", "plan"):
        own = [f"method={{name: {method}, from: '{first}'}}", "targets=[q_proj, v_proj]", *more]
        refused = call(verb, recipe, *own, *SHORT)
        assert refused.code == 2 and said in refused.sentences[0] and len(refused.sentences) == 1
    assert not (tmp_path / "run").exists()
