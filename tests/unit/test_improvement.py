"""Early stopping, and the best checkpoint: what follows from evaluations, also in a run that is resumed."""

import json
from pathlib import Path

import pytest
import torch

from distlora.checkpoints.best import Best, best_of, write_best
from distlora.checkpoints.directory import prune
from distlora.cli.main import main
from distlora.engine.comm import Comm, Topology
from distlora.errors import Preempted, UserError
from distlora.recipe.sections import TrainSection
from distlora.training import train
from distlora.training.export_run import export_run
from distlora.training.improvement import Improvement
from distlora.training.writing import Writing
from tests.tiny_models import tiny_model_dir
from tests.unit.test_train import short_recipe

ALONE = Topology()
WRITING = Writing(Comm(ALONE, torch.device("cpu"), distributed=False))


def followed(tmp_path, **settings) -> Improvement:
    return Improvement(TrainSection(**settings), WRITING, tmp_path)


def ends_after(improvement: Improvement, values, metric="loss") -> int | None:
    """The number of the evaluation after which the run ends."""
    for number, value in enumerate(values, 1):
        improvement.look({metric: value}, number)
        if improvement.is_over:
            return number
    return None


@pytest.mark.parametrize(
    ("settings", "values", "end"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.0, 2.5], 4),
        ({"patience": 2}, [3.0, 3.1, 2.9, 3.0, 2.8], None),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.6, 2.4, 2.0, 1.95], 5),
        ({"patience": 1, "mode": "max"}, [1.0, 2.0, 2.0], 3),
        ({"patience": 2}, [float("nan"), float("inf"), 1.0], 2),
        ({"patience": 3}, [float("nan"), 1.0, float("nan"), 2.0, 0.5], None),
        ({"patience": 2, "metric": "accuracy"}, [0.1, 0.2, 0.2, 0.1], 4),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_an_improvement(tmp_path, settings, values, end):
    improvement = followed(tmp_path, early_stopping=settings)
    assert ends_after(improvement, values, settings.get("metric", "loss")) == end


def test_what_is_known_goes_into_a_checkpoint_and_back(tmp_path):
    settings = {"early_stopping": {"patience": 2}, "keep_best": {}}
    first = followed(tmp_path, **settings)
    (tmp_path / "checkpoint-1").mkdir()
    assert [first.look({"loss": value}, step) for step, value in ((1, 2.0), (2, 2.5))] == [True, False]
    state = json.loads(json.dumps(first.state()))
    second = followed(tmp_path, **settings)
    second.go_on_from(state)
    assert second.best is None, "there is no whole checkpoint of step 1"
    assert not second.is_over and ends_after(second, [2.1]) == 1
    other = followed(tmp_path, early_stopping={"patience": 2, "metric": "perplexity"})
    other.go_on_from(state)
    assert ends_after(other, [9.0, 8.0], "perplexity") is None


# ---------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def made(model, tmp_path):
    """Its loss falls with every step, and counts as worse for that."""
    worse = "{metric: loss, mode: max}"
    return short_recipe(model, tmp_path)(
        "data.eval_split=train[:2]", "train.steps=6", "train.eval_every=1", f"train.keep_best={worse}",
        "train.early_stopping={patience: 2, mode: max}", "train.save_every=0",
    )  # fmt: skip


def steps_kept(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.glob("checkpoint-*")}


def test_a_run_stops_early_and_keeps_its_best_checkpoint_resumed_or_not(made, tmp_path, capsys):
    train.check(made, ALONE, None)
    summary = train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    assert (summary.steps, summary.stopped_early, summary.best.step) == (3, True, 1)
    assert steps_kept(run_dir) == {"checkpoint-1", "checkpoint-3"}
    written = json.loads((run_dir / "summary.json").read_text())
    assert written["best"] == {"metric": "loss", "value": summary.best.value, "step": 1}
    best = export_run(run_dir, "peft", tmp_path / "best", checkpoint="best")
    first = export_run(run_dir, "peft", tmp_path / "first", checkpoint=1)
    weights = "adapter_model.safetensors"
    assert (best.path / weights).read_bytes() == (first.path / weights).read_bytes()
    assert main(["export", str(run_dir), "--format", "peft", "--checkpoint", "best", "--out",
                 str(tmp_path / "third")]) == 0  # fmt: skip

    again = train.train(made, ALONE)
    assert (again.steps, again.stopped_early, again.best) == (3, True, summary.best)

    other = made.model_copy(update={"output_dir": str(tmp_path / "other")})
    asked = iter([False] * 30 + [True] * 1000)
    with pytest.raises(Preempted):
        train.train(other, ALONE, asked_to_stop=lambda: next(asked))
    resumed = train.train(other, ALONE)
    assert (resumed.steps, resumed.best) == (3, summary.best)
    last = "checkpoint-3/adapter.safetensors"
    assert (tmp_path / "other" / last).read_bytes() == (run_dir / last).read_bytes()

    longer = made.model_copy(
        update={"train": made.train.model_copy(update={"early_stopping": None, "keep_best": None})}
    )
    train.check(longer, ALONE, None)
    assert train.train(longer, ALONE).steps == 6


def test_the_best_is_not_pruned_and_another_one_takes_its_place(made, tmp_path):
    train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    prune(run_dir / "checkpoint-3", 1)
    assert steps_kept(run_dir) == {"checkpoint-1", "checkpoint-3"}
    write_best(run_dir, Best("loss", 1.0, 3))
    prune(run_dir / "checkpoint-3", 1)
    assert steps_kept(run_dir) == {"checkpoint-3"}
    write_best(run_dir, None)
    assert best_of(run_dir) is None
    with pytest.raises(UserError, match="has kept no best checkpoint"):
        export_run(run_dir, "peft", tmp_path / "out", checkpoint="best")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["train.keep_best=accuracy"],
            "train.keep_best.metric=accuracy: an evaluation of this run has loss;",
        ),
        (["train.keep_best=exact_match"], "set train.exact_match_samples"),
        (["train.early_stopping={metric: los}"], "train.early_stopping.metric=los: an evaluation"),
        (["train.early_stopping=0"], "early_stopping: found 0, wanted a number of at least 1"),
        (["train.early_stopping={mode: up}"], 'mode: found "up", wanted max or min'),
        (["train.keep_best=true", "train.eval_every=0"], "keep_best follows the evaluations"),
        (["train.keep_best=true", "data.eval_split=null"], "train.keep_best needs data.eval_split"),
        (["train.early_stopping={min_delta: -1}"], "min_delta: found -1, wanted a number of at least 0"),
    ],
)
def test_mistakes_end_in_a_sentence(model, tmp_path, overrides, says):
    make = short_recipe(model, tmp_path)
    with pytest.raises(UserError) as refused:
        train.check(make("data.eval_split=train[:2]", *overrides), ALONE, None)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_may_follow_its_answers(model, tmp_path):
    made = short_recipe(model, tmp_path)(
        "data.eval_split=train[:2]", "train.eval_every=1", "train.exact_match_samples=2",
        "train.keep_best=exact_match", "train.steps=2",
    )  # fmt: skip
    rows = [json.dumps({"question": f"What is {n}?", "answer": f"It is\n#### {n}"}) for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    train.check(made, ALONE, None)
    assert train.train(made, ALONE).best.step == 1
    lines = (Path(made.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert any({"eval/exact_match", "eval/loss"} <= json.loads(line).keys() for line in lines[1:])
