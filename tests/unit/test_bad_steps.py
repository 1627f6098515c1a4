"""Bad steps: stopped at, skipped, or rolled back; what is trained afterwards is what a run trains that has
never had the batch.
"""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distlora.checkpoints.directory import last_good, newest, prune
from distlora.checkpoints.soundness import MARK, mark, soundness, why_bad
from distlora.cluster.status import read_status
from distlora.data import TrainOrder
from distlora.engine.comm import Topology
from distlora.errors import Preempted, TrainingError, UserError
from distlora.files.atomic import sha256_of
from distlora.recipe.load import run_identity
from distlora.training import bad_batches, bad_steps, train
from distlora.training.bad_batches import FILES
from distlora.training.bad_steps import FEWEST, WINDOW, BadSteps, read_left_out
from distlora.training.objective import Responses
from distlora.training.samples import RunSamples
from tests.tiny_models import tiny_model_dir
from tests.unit.test_resume import checkpoint
from tests.unit.test_train import curves, short_recipe

ALONE = Topology()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(model, tmp_path):
    return short_recipe(model, tmp_path)


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of some global batches what is asked for, in training mode and without: as a poisoned
    row does. The batches are known by their number in the data order."""

    def set_batches(**values: float) -> None:
        numbers = {int(name.removeprefix("batch_")): value for name, value in values.items()}
        of_step, loss = RunSamples.of_step, Responses.loss

        def marked(self, step):
            batches = of_step(self, step)
            return [batch | {"factor": torch.tensor(numbers.get(step, 1.0))} for batch in batches]

        def rows(self, step):
            return [
                (number, batch | {"factor": torch.tensor(numbers.get(step, 1.0))})
                for number, batch in rows_of_step(self, step)
            ]

        def poisoned(model, batch, weights=None):
            batch = dict(batch)
            factor = batch.pop("factor", torch.tensor(1.0))
            total, count = loss(model, batch, weights)
            if not math.isinf(factor):
                return total * factor, count
            if total.requires_grad:  # a finite loss whose gradient is not
                total.register_hook(lambda gradient: gradient * math.inf)
            return total, count

        rows_of_step = RunSamples.rows_of_step
        monkeypatch.setattr(RunSamples, "of_step", marked)
        monkeypatch.setattr(RunSamples, "rows_of_step", rows)
        monkeypatch.setattr(Responses, "loss", staticmethod(poisoned))

    return set_batches


def run(recipe) -> dict:
    """What a run of the recipe trains: the adapter's bytes, and its curve."""
    train.train(recipe, ALONE)
    return outcome(recipe)


def outcome(recipe) -> dict:
    curve = {key: value for key, value in curves(recipe).items() if not key[1].endswith("bad_steps")}
    return {"adapter": Path(recipe.output_dir, "adapter/adapter_model.safetensors").read_bytes()} | curve


SIX = ["train.steps=6", "train.save_every=2", "train.keep_checkpoints=2"]
#: Those that change frozen weights do so after steps 2 and 4.
METHODS = {
    "lora_xs": ["method.name=lora_xs", "method.dropout=0.5"],
    "srlora": ["method={name: srlora, rank: 4, target_rank: 12, gamma: 0.5, interval: 2}"],
    "lora_sb": [
        "method={name: lora_sb, rank: 4, init: {samples: 6, eta: 0.01}, recompose: {times: 2}}",
        "model.dtype=bfloat16",
    ],
}  # fmt: skip
#: The batch of step 5. Then the checkpoint after step 4 is unproven, and the last good one is that after step
#: 2.
BAD = 4


@pytest.fixture(scope="module")
def without_it(model, tmp_path_factory):
    """What a run of a method trains that has never had that batch."""

    @functools.cache
    def of(name: str) -> dict:
        indices = TrainOrder.indices
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainOrder, "indices", lambda self, step: indices(self, step + (step >= BAD)))
            return run(short_recipe(model, tmp_path_factory.mktemp(name))(*SIX, *METHODS[name]))

    return of


# ---------------------------------------------------------------------- equal to a run without the batch


@pytest.mark.parametrize(
    ("name", "what", "value"),
    [
        ("lora_xs", "skip", math.nan),
        ("lora_xs", "skip", math.inf),
        ("lora_xs", "rollback", math.inf),
        ("srlora", "skip", math.nan),
        ("srlora", "rollback", math.nan),
        ("lora_sb", "rollback", math.nan),
    ],
)
def test_what_follows_is_what_a_run_trains_that_has_never_had_the_batch(
    name, what, value, recipe, poison, without_it
):
    """Also where dropout has drawn for it, and where frozen weights have changed since the last good
    checkpoint. Infinite: the gradient alone."""
    wanted = without_it(name)
    poison(batch_4=value)
    made = recipe(*SIX, *METHODS[name], f"train.on_bad_step={what}")
    assert run(made) == wanted
    run_dir = Path(made.output_dir)
    if name != "lora_xs":
        decisions = map(json.loads, (run_dir / "recompositions.jsonl").read_text().splitlines())
        assert [each["step"] for each in decisions if each["swapped"]] == [2, 4]
    assert read_left_out(run_dir)["left_out"] == [BAD]
    assert curves(made)[6, "train/bad_steps"] == 1
    assert soundness(run_dir / "checkpoint-6") == "good"
    kept = json.loads((run_dir / "bad_steps" / "step-5.json").read_text())
    assert (kept["step"], kept["batch"], kept["rows_of_batch"]) == (5, BAD, 2)
    assert kept["why"].startswith("the training loss" if math.isnan(value) else "the norm of the gradient")
    assert all((row["loss"] == "nan") == math.isnan(value) for row in kept["rows"])


def test_a_loss_far_above_the_running_median_is_bad(recipe, poison, without_it, monkeypatch):
    monkeypatch.setattr(bad_steps, "FEWEST", 3)
    wanted = without_it("lora_xs")
    poison(batch_4=4.0)
    made = recipe(*SIX, *METHODS["lora_xs"], "train.on_bad_step=skip", "train.bad_loss_factor=3")
    assert run(made) == wanted
    why = json.loads(Path(made.output_dir, "bad_steps", "step-5.json").read_text())["why"]
    assert "above 3 times its running median" in why


def test_a_run_that_was_stopped_by_a_bad_batch_goes_on_without_it(recipe, poison, without_it):
    """What the newest checkpoint is worth shows with the batch after the bad one."""
    wanted = without_it("lora_xs")
    poison(batch_4=math.nan)
    made = recipe(*SIX, *METHODS["lora_xs"])
    run_dir = Path(made.output_dir)
    with pytest.raises(TrainingError) as ended:
        train.train(made, ALONE)
    assert str(ended.value) == (
        f"the training loss is nan at step 5; the last good checkpoint: {run_dir / 'checkpoint-2'}"
    )
    assert read_status(run_dir).state == "failed" and soundness(run_dir / "checkpoint-4") == "unproven"
    assert f"its batch is kept in {run_dir / 'bad_steps'}" in (run_dir / "logs" / "rank-0.log").read_text()
    kept = json.loads((run_dir / "bad_steps" / "step-5.json").read_text())
    assert kept["why"] == "the training loss is nan" and len(kept["rows"]) == 2
    for row in kept["rows"]:
        assert row["loss"] == "nan" and f"It is {row['row']}" in row["text"]
        assert len(row["input_ids"]) == len(row["labels"])
    again = recipe(*SIX, *METHODS["lora_xs"], "train.on_bad_step=skip")
    assert run(again) == wanted
    assert json.loads((run_dir / "environment.json").read_text())[-1]["resumed_at"] == 4


def test_what_is_left_out_survives_a_stop_right_after_the_rollback(recipe, poison, without_it, monkeypatch):
    """Though no checkpoint knows of it yet; the resumed run has no bad batch by which it could find out."""
    wanted = without_it("srlora")
    with monkeypatch.context() as patch:
        poison(batch_4=math.nan)
        made = recipe(*SIX, *METHODS["srlora"], "train.on_bad_step=rollback")
        asked = AskedAfter(Path(made.output_dir) / "bad_steps" / "left_out.json")
        with pytest.raises(Preempted):
            train.train(made, ALONE, None, asked)
        patch.undo()
    monkeypatch.undo()
    run_dir = Path(made.output_dir)
    assert read_status(run_dir).step < BAD and soundness(run_dir / "checkpoint-4") == "bad"
    assert run(made) == wanted


class AskedAfter:
    """Asks to stop once a file is there."""

    def __init__(self, path: Path):
        self._path = path

    def __call__(self) -> bool:
        return self._path.exists()


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize("what", ["skip", "rollback"])
def test_bad_steps_in_a_row_end_the_run(what, recipe, tmp_path):
    """The first step ruins the weights, so that no batch is to blame. Nothing that is saved later is good."""
    made = recipe("train.lr=1e30", f"train.on_bad_step={what}", "train.bad_steps_limit=2")
    with pytest.raises(TrainingError) as ended:
        train.train(made, ALONE)
    assert str(ended.value) == (
        "the training loss is nan at step 2, and that was bad step 2 in a row (train.bad_steps_limit=2): "
        "the same command meets these batches again, and goes on behind them with a higher limit; "
        "the last good checkpoint: none"
    )
    run_dir = Path(made.output_dir)
    assert not (run_dir / "adapter").exists() and read_status(run_dir).state == "failed"
    with pytest.raises(UserError, match="^[^\n]*marked bad[^\n]*--no-resume removes them and begins anew$"):
        train.train(made, ALONE)
    assert soundness(run_dir / "checkpoint-1") == "bad"
    good = recipe("train.lr=0.01")
    with pytest.raises(UserError, match="another recipe"):
        train.check(good, ALONE, None)


def test_weights_that_the_last_step_ruins_are_not_exported(recipe):
    made = recipe("train.lr=1e30", "train.steps=1")
    with pytest.raises(TrainingError, match="^the training loss is not finite after step 1, so nothing"):
        train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    assert not (run_dir / "adapter").exists() and soundness(run_dir / "checkpoint-1") == "bad"
    assert (read_status(run_dir).state, read_status(run_dir).requeue) == ("failed", False)


def test_a_last_evaluation_that_is_no_number_fails_the_run_and_keeps_the_older_adapter(recipe, monkeypatch):
    made = recipe("data.eval_split=train[:2]", "train.eval_every=1")
    train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(Responses, "evaluate", lambda *_: {"loss": math.nan})
    with pytest.raises(TrainingError) as ended:
        train.train(made, ALONE)
    assert str(ended.value) == (
        "the loss of the last evaluation is nan after step 3, so nothing is exported; "
        f"the last good checkpoint: {run_dir / 'checkpoint-3'}"
    )
    assert (run_dir / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert read_status(run_dir).state == "failed"


# ---------------------------------------------------------------------- going on


def ruin(checkpoint: Path) -> None:
    """Makes the weights of a checkpoint NaN, and the checkpoint whole, as a run leaves it that is stopped
    after a step which ruins them."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        tensors = {key: value * math.nan for key, value in load_file(checkpoint / name).items()}
        save_file(tensors, checkpoint / name)
        manifest["files"][name] = {
            "bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name),
        }  # fmt: skip
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["lora_xs", "srlora"])
def test_a_start_goes_on_from_the_newest_checkpoint_that_is_proven(name, recipe, caplog):
    """Also a start of a run from before there were marks."""
    made = recipe(*SIX, *METHODS[name], "train.keep_checkpoints=3")
    wanted = run(made)
    run_dir = Path(made.output_dir)
    for step in (4, 6):
        ruin(run_dir / f"checkpoint-{step}")
    (run_dir / "checkpoint-2" / MARK).unlink()
    assert {soundness(run_dir / f"checkpoint-{step}") for step in (2, 4, 6)} == {"unproven"}
    caplog.set_level("WARNING", logger="distlora")
    assert run(made) == wanted
    told = [line for line in caplog.messages if "marked bad:" in line]
    assert [f"checkpoint-{step} is" in line for step, line in zip((6, 4), told)] == [True, True]
    assert len(told) == 2


def test_a_checkpoint_that_is_marked_bad_is_passed_over_by_all_who_look_for_the_newest(recipe):
    made = recipe("train.keep_checkpoints=3")
    train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    mark(run_dir / "checkpoint-3", "bad", "for this test")
    assert newest(run_dir).step == 2 and newest(run_dir, only_good=True).step == 2
    mark(run_dir / "checkpoint-1", "bad", "for this test")
    (run_dir / "checkpoint-2" / MARK).unlink()
    assert (
        newest(run_dir).step == 2 and newest(run_dir, only_good=True) is None and last_good(run_dir) is None
    )
    with pytest.raises(UserError, match="marked bad"):
        mark(run_dir / "checkpoint-2", "bad", "for this test")
        train.train(made, ALONE)


# ---------------------------------------------------------------------- marks


@pytest.fixture
def run_dir(tmp_path) -> Path:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    return tmp_path


def test_a_mark_is_of_the_very_files_that_it_was_made_for(run_dir):
    first, second = run_dir / "checkpoint-1", run_dir / "checkpoint-2"
    assert soundness(first) == soundness(run_dir / "none") == "unproven"
    mark(first, "good", "seen")
    mark(second, "bad", "not finite")
    assert (soundness(first), soundness(second), why_bad(second)) == ("good", "bad", "not finite")
    (second / MARK).write_bytes((first / MARK).read_bytes())
    assert soundness(second) == "unproven"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"soundness": "good"}', b"[" * 9999])
def test_a_damaged_mark_counts_as_none(content, run_dir):
    mark(run_dir / "checkpoint-1", "good", "seen")
    (run_dir / "checkpoint-1" / MARK).write_bytes(content)
    assert soundness(run_dir / "checkpoint-1") == "unproven"


@pytest.mark.parametrize(
    ("marks", "keep", "kept"),
    [
        ({}, 2, [3, 4]),
        ({1: "good"}, 1, [1, 4]),
        ({1: "good", 2: "good"}, 2, [2, 3, 4]),
        ({1: "good", 3: "bad"}, 1, [1, 4]),
        ({1: "good", 3: "bad"}, 2, [1, 2, 4]),
        ({2: "good", 4: "good"}, 1, [4]),
        ({1: "bad", 2: "bad", 3: "bad"}, 3, [4]),
    ],
)
def test_the_last_good_one_is_never_pruned_while_those_after_it_are_not_known_to_be(
    marks, keep, kept, run_dir
):
    for step, verdict in marks.items():
        mark(run_dir / f"checkpoint-{step}", verdict, "for this test")
    prune(run_dir / "checkpoint-4", keep)
    assert sorted(int(path.name.rpartition("-")[2]) for path in run_dir.iterdir()) == kept


# ---------------------------------------------------------------------- what is remembered


def test_the_data_order_leads_past_what_is_left_out():
    memory = BadSteps(left_out=[0, 3, 4, 9])
    assert [memory.position(step) for step in range(7)] == [1, 2, 5, 6, 7, 8, 10]
    assert [memory.before(step) for step in (0, 2, 6)] == [1, 3, 4]
    memory.leave_out(1)  # the batch in the place of step 1
    assert memory.left_out == [0, 2, 3, 4, 9] and (memory.row, memory.latest) == ([2], 2)


def test_only_a_step_that_comes_further_ends_a_row():
    """Steps that a rollback makes again do not."""
    memory = BadSteps()
    memory.leave_out(12)
    memory.remember_good(12, 1.0)
    memory.leave_out(12)
    assert memory.row == [12, 13]
    memory.remember_good(13, 1.0)
    assert memory.row == []


def test_a_loss_is_held_against_the_median_of_the_last_good_ones():
    memory = BadSteps()
    for step in range(FEWEST - 1):
        memory.remember_good(step, 1.0)
    assert memory.problem_with(99.0, 2.0) is None, "too few to compare with"
    memory.remember_good(FEWEST, 1.0)
    assert memory.problem_with(2.0, 2.0) is None and memory.problem_with(99.0, None) is None
    assert memory.problem_with(2.1, 2.0) == "the training loss is 2.1, above 2 times its running median 1"
    for step in range(WINDOW):
        memory.remember_good(step, 5.0)
    assert memory.problem_with(9.9, 2.0) is None and len(memory.losses) == WINDOW


BROKEN = (b"[1.5]", b"[-1]", b"3", b"[true]", b"[1e999]")


def test_the_memory_goes_through_a_checkpoint_and_the_file_knows_the_newest(tmp_path):
    memory = BadSteps(losses=[1.5, 2.5])
    memory.leave_out(4)
    state = json.loads(json.dumps(memory.state()))
    memory.leave_out(4)
    memory.write(tmp_path)
    again = BadSteps()
    again.recall(read_left_out(tmp_path))
    again.go_on_from(3, state)
    assert again == memory and memory.row == [4, 5]
    again.go_on_from(5, state)  # so it has trained on batch 5
    assert again.row == [] and again.left_out == [4]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"\xff", *(b'{"left_out": %s, "in_row": 0, "latest": 0}' % a for a in BROKEN)],
)
def test_a_damaged_file_of_what_is_left_out_is_one_sentence(content, tmp_path):
    assert read_left_out(tmp_path) is None
    (tmp_path / "bad_steps").mkdir()
    (tmp_path / "bad_steps" / "left_out.json").write_bytes(content)
    with pytest.raises(UserError, match="^[^\n]*left_out.json does not say[^\n]*$"):
        read_left_out(tmp_path)


def test_the_files_of_bad_batches_are_bounded(tmp_path):
    rows = [{"row": 0, "loss": 1.0}]
    for batch in range(FILES + 5):
        bad_batches._write(tmp_path, {"step": 7, "batch": batch, "rows": rows})
    bad_batches._write(tmp_path, {"step": 7, "batch": FILES + 4, "rows": rows})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"step-7-{number}.json" for number in range(6, FILES + 6)}


@pytest.mark.parametrize("value", ["1", "0.5", "-2", ".nan", "high"])
def test_a_factor_that_makes_no_sense_is_refused(value, recipe):
    with pytest.raises(UserError, match="^[^\n]*bad_loss_factor[^\n]*$"):
        recipe(f"train.bad_loss_factor={value}")


def test_what_follows_a_bad_step_does_not_belong_to_the_identity_of_a_run(recipe):
    there = run_identity(recipe("train.on_bad_step=rollback", "train.bad_loss_factor=9"))
    assert there == run_identity(recipe("train.bad_steps_limit=1"))
