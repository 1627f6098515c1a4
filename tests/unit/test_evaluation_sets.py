"""When a run is evaluated and saved, by steps and shares of epochs, and on which sets."""

import json
from pathlib import Path

import pytest

from distlora.engine.comm import Topology
from distlora.errors import UserError
from distlora.recipe.every import is_due
from distlora.training import evaluate, train
from distlora.training.evaluated import Asked, subject_of_run
from tests.tiny_models import tiny_model_dir
from tests.unit.test_train import short_recipe

ALONE = Topology()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(model, tmp_path):
    other = [json.dumps({"query": f"Add {n}.", "response": f"The answer is: {n}"}) for n in range(4)]
    (tmp_path / "other.jsonl").write_text("\n".join(other))
    return short_recipe(model, tmp_path)


# ---------------------------------------------------------------------- how often


@pytest.mark.parametrize(
    ("every", "steps_per_epoch", "due"),
    [
        (3, 10, [3, 6, 9, 12, 15, 18]),
        (None, 10, []),
        ("0.25 epoch", 10, [3, 5, 8, 10, 13, 15, 18, 20]),
        ("25%", 10, [3, 5, 8, 10, 13, 15, 18, 20]),
        ("0.1 epoch", 10, list(range(1, 21))),
        ("1 epoch", 7, [7, 14]),
        ("2 epochs", 5, [10, 20]),
        ("50 %", 4, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        ("1%", 10, list(range(1, 21))),
        (".5 epoch", 3, [2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20]),
    ],
)
def test_shares_of_an_epoch_end_with_it(every, steps_per_epoch, due):
    assert [step for step in range(1, 21) if is_due(every, step, steps_per_epoch)] == due


def test_a_run_is_evaluated_and_saved_by_shares_of_its_epochs(make):
    made = make(
        "data.eval_split=train[:2]", "train.steps=6", "train.eval_every=1 epoch", "train.save_every=200%",
        "train.keep_checkpoints=9",
    )  # fmt: skip
    train.train(made, ALONE)  # three steps make an epoch
    run_dir = Path(made.output_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, 6]
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-6"}
    train.check(make("data.eval_split=train[:2]", "train.steps=6", "train.eval_every=1"), ALONE, None)


# ---------------------------------------------------------------------- several sets


def test_every_set_has_tags_of_its_own_and_a_task_of_its_own(make, tmp_path):
    other = f"{{task: metamath, path: {tmp_path / 'other.jsonl'}, split: train}}"
    made = make(
        f"data.eval={{held_out: 'train[:2]', other: {other}}}", "train.steps=2", "train.eval_every=1",
        "train.keep_best=other/loss",
    )  # fmt: skip
    train.check(made, ALONE, None)
    summary = train.train(made, ALONE)
    assert summary.after.keys() == summary.before.keys() == {"held_out/loss", "other/loss"}
    assert summary.best.metric == "other/loss"
    run_dir = Path(made.output_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tags = {"eval/held_out/loss", "eval/other/loss"}
    assert [line["step"] for line in lines if tags <= line.keys()] == [0, 1, 2]
    assert json.loads((run_dir / "data.json").read_text()).keys() == {
        "training", "evaluation (held_out)", "evaluation (other)",
    }  # fmt: skip

    subject = subject_of_run(run_dir, [])
    evaluate.check(subject, ALONE, Asked())
    found = evaluate.evaluate(subject, ALONE, Asked())[evaluate.OWN_SPLIT]
    assert found == pytest.approx(summary.after, rel=1e-6)

    alone = make("data.eval_split=train[:2]", "train.steps=2", f"output_dir={tmp_path / 'alone'}")
    assert train.train(alone, ALONE).after["loss"] == pytest.approx(summary.after["held_out/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.eval_every=0.25"], 'train.eval_every: 0.25 is no number of steps; for a share of an epoch'),
        (["train.save_every=quarter"], 'found "quarter", wanted a number of steps, or a share of an epoch'),
        (["train.eval_every=0%"], 'found "0%", wanted a number of steps'),
        (["train.eval_every=-1"], "train.eval_every: found -1"),
        (["data.eval={a: test}", "data.eval_split=train"], "eval_split names another one"),
        (["data.eval={a/b: train}"], 'the name "a/b" is part of a tag'),
        (["data.eval={}"], "no set is named"),
        (["data.eval={a: {splitt: train}}"], "splitt"),
        (["data.eval={a: trian}"], "has no split 'trian'"),
        (["data.eval={a: {task: sst2}}"], "data.eval.a: the task sst2 asks something else"),
        (["data.eval={a: 'train[:2]'}", "train.keep_best=true"], "an evaluation of this run has a/loss"),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_sentence(make, overrides, says):
    with pytest.raises(UserError) as refused:
        train.check(make(*overrides), ALONE, None)
    assert says in str(refused.value) and "\n" not in str(refused.value)
