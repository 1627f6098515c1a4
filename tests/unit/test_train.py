"""The run: what is checked before it starts, and how it ends where it must not go on. The rest is in
tests/e2e.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from distlora.cluster.status import read_status
from distlora.engine.comm import Comm, Topology
from distlora.engine.coordination import on_every_rank
from distlora.engine.local import LocalEngine
from distlora.engine.protocol import StepInfo
from distlora.errors import Preempted, TrainingError, UserError
from distlora.files.tensors import TensorFiles
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import Recipe
from distlora.training import evaluate, evaluated, setbacks, train
from distlora.training.evaluated import Subject, fitted_to_ranks
from distlora.training.export_run import export_run
from distlora.training.samples import probe_samples
from tests.tiny_models import tiny_model_dir

CPU = torch.device("cpu")
ALONE = Comm(Topology(), CPU, distributed=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


def of_run(recipe: Recipe) -> Subject:
    return Subject(recipe, recipe.data, frozenset(), None, run=True)


@pytest.fixture
def recipe(model, tmp_path):
    """Makes the recipe of a short run, with overrides."""
    return short_recipe(model, tmp_path)


def short_recipe(model, folder):
    rows = [json.dumps({"question": f"What is {n}?", "answer": f"It is {n}"}) for n in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    content = {
        "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "method": {"name": "lora_xs", "rank": 4},
        "data": {
            "task": "gsm8k",
            "path": str(folder / "rows.jsonl"),
            "template": "{prompt}\n",
            "max_length": 32,
        },
        "train": {"steps": 3, "global_batch_size": 2, "save_every": 1, "keep_checkpoints": 1, "lr": 0.01},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return lambda *overrides: load_recipe(folder / "recipe.yaml", overrides)


# ---------------------------------------------------------------------- before the start


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.path=/none/rows.jsonl"], "/none/rows.jsonl does not exist"),
        (["data.fields={prompt: quession}"], "did you mean question?"),
        (["data.split=train[:0]"], "has no rows"),
        (["data.eval_split=test"], "has no split 'test'"),
        (["data.task=gsm"], "unknown task 'gsm'"),
        (["data.task=arithmetic", "data.path=null", "data.split=trian"], "has no split 'trian'"),
        (["model.path=/none"], "there is no such directory"),
        (["model.attention=flush"], "has only auto"),
        (["train.global_batch_size=3", "train.micro_batch_size=2"], "is not divisible"),
        (["deepspeed={train_batch_size: 7}"], "contradicts train_batch_size=7"),
        (
            ["deepspeed={gradient_cliping: 1}"],
            "deepspeed section: gradient_cliping: unknown key, did you mean gradient_clipping?",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 3, offload_param: cpu}}"],
            'offload_param: found "cpu", wanted a mapping',
        ),
        (["method.name=srlora", "method.interval=3"], "method.interval=3 passes step 2"),
        (
            ["method={name: lora_sb, rank: 4, init: {eta: schedule}}", "train.lr=search"],
            "set eta of method lora_sb to search or a number, or train.lr to one",
        ),
        # What does not depend on the length is found where the length is not known yet.
        (
            ["method.name=pissa", "train.weight_decay=0.1", "train.steps=null", "train.epochs=1"],
            "decays pretrained directions",
        ),
        (
            ["model.quantization=int8", "deepspeed={zero_optimization: {stage: 3}}"],
            "int8 does not go with ZeRO stage 3",
        ),
        (
            ["model.quantization=nf4", "method.name=full"],
            "model.quantization: method full trains the weights themselves",
        ),
        (
            ["model.quantization=int8", "method.name=dora"],
            "model.quantization: method dora sets norms of rows",
        ),
    ],
)
def test_what_needs_no_weights_is_found_before_anything_happens(recipe, overrides, expected, tmp_path):
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        train.check(recipe(*overrides), Topology(), None)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override", ["data.task=gsm", "model.path=/none", "data.path=/none/a.jsonl", "train.global_batch_size=3"]
)
def test_a_mistake_from_before_the_ranks_meet_is_known_as_such(recipe, override):
    with pytest.raises(UserError) as refused:
        train.check(recipe("train.micro_batch_size=2", override), Topology(), None)
    assert refused.value.early and not refused.value.agreed


def test_without_an_evaluation_split_no_rank_goes_to_meet_the_others(recipe):
    with pytest.raises(UserError, match="^data.eval_split is null") as refused:
        evaluate.check(of_run(recipe("data.eval_split=null")), Topology(), evaluated.Asked())
    assert refused.value.early


SRLORA = ["method={name: srlora, rank: 4, target_rank: 8}", "train.steps=50"]


def test_the_number_of_swaps_is_held_against_a_length_that_the_data_decide(recipe):
    """And that the layers decide: from rank 5 to the 20 directions of the smallest one, a component at a
    time.
    """
    made = recipe("method={name: srlora, rank: 5, gamma: 0.2}", "train.steps=null", "train.epochs=1")
    train.check(made, Topology(), None)
    with pytest.raises(UserError, match="asks for 15 replacements"):
        train.train(made, Topology())


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_single_components_of_8_bit_moments_cannot_be_forgotten(recipe, name):
    with pytest.raises(UserError) as caught:
        train.check(recipe(*SRLORA, f"train.optimizer.name={name}"), Topology(), None)
    assert str(caught.value) == (
        f"train.optimizer.name={name} keeps moments in blocks, "
        "and srlora as it is set here forgets those of single components; "
        f"set it to {name.removesuffix('8bit')}, or turn the recomposition off in method"
    )
    for others in (
        [f"train.optimizer.name={name}", "method.schedule=none"],
        ["train.optimizer.name=paged_adamw"],
    ):
        train.check(recipe(*SRLORA, *others), Topology(), None)


def test_a_missing_package_is_found_before_anything_happens(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes, which is not installed"):
        train.check(recipe("train.optimizer.name=paged_adamw"), Topology(), None)


def test_a_good_recipe_passes_and_hub_names_are_left_for_later(recipe, monkeypatch):
    train.check(recipe(), Topology(), None)
    monkeypatch.setattr(
        "distlora.models.hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    for module in ("hub", "sources"):
        name = f"distlora.data.{module}.hub_split"
        monkeypatch.setattr(name, lambda *_: pytest.fail("asked the hub"))
    train.check(recipe("model.path=someone/model", "data.path=someone/rows"), Topology(), None)


def test_ranks_need_deepspeed_and_a_batch_for_each(recipe):
    two = Topology(rank=1, world_size=2)
    with pytest.raises(UserError, match="2 ranks need DeepSpeed"):
        train.check(recipe(), two, None)
    train.check(recipe("deepspeed={}"), two, None)
    with pytest.raises(UserError, match="not divisible by train.micro_batch_size=2 times 2 ranks"):
        train.check(recipe("deepspeed={}", "train.micro_batch_size=2"), two, None)


@pytest.mark.parametrize(
    ("setting", "available", "count"),
    [
        (0.001, 50_000, 50),
        (0.001, 4000, 25),
        (0.001, 10, 10),
        (0.5, 100, 50),
        (48, 1000, 48),
        (48, 30, 30),
        (1, 30, 1),
    ],
)
def test_samples_of_the_probe(setting, available, count):
    assert probe_samples(setting, available) == count


# ---------------------------------------------------------------------- packed weights


@pytest.fixture(scope="module")
def packed_run(model, tmp_path_factory):
    """A run of PiSSA over weights in 4 bits: recipe, summary, and the metrics of its start."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps({"question": f"What is {n}?", "answer": f"It is {n}"}) for n in range(6))
    )
    content = {
        "model": {
            "path": str(model),
            "dtype": "float32",
            "gradient_checkpointing": False,
            "quantization": "nf4",
        },
        "method": {"name": "pissa", "rank": 4},
        "data": {
            "task": "gsm8k",
            "path": str(folder / "rows.jsonl"),
            "eval_split": "train[:4]",
            "max_length": 32,
            "template": "{prompt}\n",
        },
        "train": {"steps": 3, "global_batch_size": 2, "lr": 0.01},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    recipe = load_recipe(folder / "recipe.yaml")
    train.check(recipe, Topology(), None)
    return recipe, train.train(recipe, Topology())


def test_a_run_over_packed_weights_trains_is_told_and_evaluates_alike_from_its_checkpoint(packed_run):
    recipe, summary = packed_run
    start = json.loads(Path(recipe.output_dir, "metrics.jsonl").read_text().splitlines()[0])
    assert 0.05 < start["init/quantization_error"] < 0.15 and start["init/quantization_error_left"] < 1
    assert summary.after["loss"] < summary.before["loss"]
    scores = evaluate.evaluate(of_run(recipe), Topology(), evaluated.Asked())[evaluate.OWN_SPLIT]
    assert scores["loss"] == pytest.approx(summary.after["loss"], rel=1e-6)


def test_the_merged_model_is_the_pretrained_one_in_full_precision_with_the_update(
    packed_run, model, tmp_path
):
    recipe, _ = packed_run
    export_run(recipe.output_dir, "merged", tmp_path / "merged")
    export_run(recipe.output_dir, "peft", tmp_path / "adapter")
    layer = "model.layers.1.mlp.up_proj"
    before, after = (
        TensorFiles(place, "model").read(f"{layer}.weight") for place in (model, tmp_path / "merged")
    )
    a, b = (
        TensorFiles(tmp_path / "adapter", "adapter_model").read(f"base_model.model.{layer}.lora_{x}.weight")
        for x in "AB"
    )
    assert a.shape[0] == 8  # the trained pair and, negated, the one that was taken out
    torch.testing.assert_close(after, before + b @ a)


# ---------------------------------------------------------------------- the end, before its time


def test_a_gradient_that_is_no_number_ends_the_run_before_anything_is_saved(recipe, monkeypatch):
    """The loss can be finite still. Adam would spread the NaN over the weights, and a checkpoint would keep
    it.
    """
    plain, steps = LocalEngine.step, iter([1.0, math.nan])
    monkeypatch.setattr(LocalEngine, "step", lambda self: StepInfo(plain(self).grad_norm * next(steps)))
    made = recipe("train.keep_checkpoints=2")
    with pytest.raises(
        TrainingError, match="^the optimizer refused step 2: its gradient is not finite; the last good"
    ):
        train.train(made, Topology())
    assert (
        "ended: the optimizer refused step 2" in (Path(made.output_dir) / "logs" / "rank-0.log").read_text()
    )
    assert [path.name for path in Path(made.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_last_good_checkpoint_stays_while_only_unproven_ones_are_newer(recipe, monkeypatch):
    """Of the one checkpoint that is to be kept, nobody knows yet whether its weights are good."""
    losses = iter([1.0, 1.0, math.nan])

    def accumulate(engine, batches, loss_sum, mark):
        value = next(losses)
        if math.isnan(value):
            raise TrainingError("the training loss is nan")
        return plain(engine, batches, loss_sum, mark)

    plain = setbacks.accumulate
    monkeypatch.setattr(setbacks, "accumulate", accumulate)
    with pytest.raises(TrainingError, match="nan at step 3; the last good checkpoint: .*/checkpoint-1$"):
        train.train(recipe(), Topology())


class Asked:
    """Asks to stop when it is looked at for the n-th time."""

    def __init__(self, when: int | None):
        self.when, self.looks = when, 0

    def __call__(self) -> bool:
        self.looks += 1
        return self.looks == self.when


#: Three micro-batches a step whose dropout draws, an evaluation (of two batches) after the second step, and
#: one at the end.
INTERRUPTED = [
    "method.dropout=0.5", "train.steps=4", "train.global_batch_size=3", "train.save_every=2",
    "train.eval_every=2", "data.eval_split=train[:2]", "targets=[q_proj]",
]  # fmt: skip


@pytest.fixture(scope="module")
def quiet(model, tmp_path_factory):
    """What a run that nobody interrupts tells, and how often it looks."""
    folder = tmp_path_factory.mktemp("quiet")
    asked, made = Asked(None), short_recipe(model, folder)(*INTERRUPTED)
    train.train(made, Topology(), None, asked)
    return curves(made), asked.looks


def curves(made) -> dict:
    """(step, tag) -> value of all that does not depend on the clock."""
    lines = map(json.loads, (Path(made.output_dir) / "metrics.jsonl").read_text().splitlines())
    pairs = [
        ((line["step"], tag), value)
        for line in lines
        for tag, value in line.items()
        if tag != "step" and "second" not in tag
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# Looks 1-2: before and after loading; 3-4: the evaluation before; 5-7: layers; 8-10, 11-13: two steps; 14-15:
# an evaluation; 16-21: two steps; 22-23: the last evaluation.
@pytest.mark.parametrize("look", [1, 3, 6, 10, 12, 13, 14, 15, 18, 23])
def test_asked_to_stop_at_any_moment_it_goes_on_as_if_nothing_had_been(recipe, quiet, look):
    wanted, looks = quiet
    made = recipe(*INTERRUPTED)
    assert looks == 23
    with pytest.raises(Preempted, match="^asked to stop"):
        train.train(made, Topology(), None, Asked(look))
    told = read_status(Path(made.output_dir))
    assert (told.state, told.requeue, told.steps) == ("preempted", True, None if look == 1 else 4)
    kept = {path.name for path in Path(made.output_dir).glob("checkpoint-*")}
    newest, last_good = {f"checkpoint-{told.step}"}, {"checkpoint-2"}  # which stays until a newer one is good
    assert kept - last_good == (newest - last_good if told.step else set()) and told.saved == told.step
    assert train.train(made, Topology(), None).steps == 4
    assert curves(made) == wanted
    assert read_status(Path(made.output_dir)).state == "done"


def test_what_ends_a_run_is_in_its_status(recipe, monkeypatch):
    def refuse(self):
        raise MemoryError("no room\nat all")

    made = recipe()
    monkeypatch.setattr(LocalEngine, "step", refuse)
    with pytest.raises(MemoryError):
        train.train(made, Topology())
    told = read_status(Path(made.output_dir))
    assert (told.state, told.requeue, told.message) == ("failed", False, "MemoryError: no room")


def test_a_start_that_fails_while_loading_replaces_the_outcome_of_the_one_before(recipe, monkeypatch):
    """Or a script that starts again what was asked to stop would do so for ever."""

    def refuse(self, *_):
        raise UserError("no room")

    made = recipe()
    run_dir = Path(made.output_dir)
    with monkeypatch.context() as broken:
        broken.setattr(LocalEngine, "start", refuse)
        with pytest.raises(UserError):
            train.train(made, Topology())
        assert read_status(run_dir) is None, "a new directory stays as it was"
        with pytest.raises(Preempted):
            train.train(made, Topology(), None, Asked(1))
        assert read_status(run_dir).state == "preempted"
        with pytest.raises(UserError):
            train.train(made, Topology())
    assert (read_status(run_dir).state, read_status(run_dir).requeue) == ("failed", False)


def test_every_start_is_recorded_with_where_it_ran(recipe, caplog):
    caplog.set_level("INFO", logger="distlora")
    made = recipe("train.steps=1")
    for _ in range(2):
        train.train(made, Topology())
    assert "1 rank on 1 host" in caplog.text and "started without a launcher" in caplog.text
    run_dir = Path(made.output_dir)
    first, second = json.loads((run_dir / "environment.json").read_text())
    assert (first["resumed_at"], second["resumed_at"]) == (None, 1)
    assert list(first["topology"]["hosts"].values()) == [[0]] and first["deepspeed"] is None
    assert (run_dir / "logs" / "rank-0.log").read_text().count("1 rank on 1 host") == 2
    train.train(made, Topology(), resume=False)
    assert len(json.loads((run_dir / "environment.json").read_text())) == 1, (
        "a run that begins anew forgets the old one's"
    )


def test_an_unreadable_file_is_a_users_matter():
    def work():
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    with pytest.raises(UserError, match="rows.jsonl: Permission denied"):
        on_every_rank(ALONE, work)


def test_evaluation_turns_the_monitors_off_and_keeps_the_rest(recipe):
    monitors = {name: {"enabled": True} for name in ("tensorboard", "csv_monitor", "wandb", "comet")}
    loud = recipe(f"deepspeed={json.dumps(monitors | {'zero_optimization': {'stage': 2}})}")
    quiet = fitted_to_ranks(loud, world_size=3)
    assert quiet.deepspeed == {"zero_optimization": {"stage": 2}}
    assert quiet.deepspeed_source == loud.deepspeed_source
    assert fitted_to_ranks(recipe(), 3).deepspeed is None


def test_an_evaluation_runs_on_any_number_of_ranks(recipe):
    """Also where the run's batch divides among none but its own."""
    sizes = ["train.micro_batch_size=2", "train.global_batch_size=4"]
    assert plan_batches(fitted_to_ranks(recipe(*sizes), world_size=3), world_size=3) == 1


def test_evaluation_wants_a_checkpoint(recipe):
    with pytest.raises(UserError, match="holds no complete checkpoint; train first"):
        evaluate.evaluate(of_run(recipe("data.eval_split=train[:2]")), Topology(), evaluated.Asked())


def test_the_callers_random_numbers_are_as_before(recipe):
    before = torch.get_rng_state()
    train.train(recipe("train.steps=1", "method.dropout=0.5"), Topology())
    assert torch.equal(torch.get_rng_state(), before)
