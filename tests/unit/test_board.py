"""What a run writes for TensorBoard: real runs, read back from the event files."""

import json
import os
from collections import Counter

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as Records
from torch.utils.tensorboard import SummaryWriter

from distlora.engine.comm import Topology
from distlora.engine.local import LocalEngine
from distlora.errors import Preempted
from distlora.recipe.load import load_recipe
from distlora.training import layer_looks, train
from distlora.training.board import begin_board, hyperparameters
from distlora.training.layer_looks import LayerLooks
from distlora.training.monitor import Monitor
from distlora.training.step_clock import PARTS
from tests.boards import Watched
from tests.tiny_models import tiny_model_dir
from tests.tiny_runs import BF16, SRLORA, Run, method_of

NO_LIMIT = dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def boarded(tmp_path, monkeypatch):
    """The plain engine with TensorBoard's files in `run/tensorboard`, as DeepSpeed's monitors write them."""
    writers = []

    def on_board(engine, action):
        if not writers:
            writers.append(SummaryWriter(tmp_path / "run" / "tensorboard"))
        action(writers[0])
        writers[0].flush()

    def write_events(engine, events):
        on_board(engine, lambda writer: [writer.add_scalar(*event) for event in events])

    monkeypatch.setattr(layer_looks, "LOOKS", 2)
    for name, value in (("monitored", True), ("on_board", on_board), ("write_events", write_events)):
        monkeypatch.setattr(LocalEngine, name, value)
    return writers


@pytest.fixture
def recipe(model, tmp_path):
    rows = [json.dumps({"question": f"What is {n}?", "answer": f"It is {n}"}) for n in range(6)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    content = {
        "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "method": {
            "name": "lora_sb", "rank": 4, "init": {"eta": 0.01, "samples": 2, "micro_batch_size": 2},
        },
        "data": {
            "task": "gsm8k", "path": str(tmp_path), "template": "{prompt}\n", "max_length": 32,
            "eval_split": "test",
        },
        "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "save_every": 2, "lr": 0.01,
                  "eval_every": 3},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def read(folder, reader=EventAccumulator):
    found = reader(str(folder), size_guidance=NO_LIMIT)
    found.Reload()
    return found


def steps(found, tag):
    return [event.step for event in found.Scalars(tag)]


# ---------------------------------------------------------------------- a whole run


def test_a_run_has_five_groups_and_every_step_in_them(recipe, boarded, tmp_path):
    train.train(recipe(), Topology())
    found = read(tmp_path / "run" / "tensorboard")
    tags = found.Tags()
    shown = [*tags["scalars"], *tags["images"], *tags["histograms"]]
    assert {tag.partition("/")[0] for tag in shown} == {"train", "eval", "init", "method", "system"}
    assert max(Counter(shown).values()) == 1, "two kinds of cards of one tag hide each other"
    every = [f"system/seconds/{part}" for part in (*PARTS, "total")]
    every += ["system/tokens_per_second", "system/samples_per_second", "system/peak_memory_gib"]
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", *every):
        assert steps(found, tag) == [1, 2, 3, 4, 5, 6], tag
        assert all(event.value >= 0 for event in found.Scalars(tag))
    assert steps(found, "eval/loss") == [0, 3, 6]
    assert "train/tokens_per_second" not in tags["scalars"]
    assert "system/model_flops_utilisation" not in tags["scalars"], "of a CPU nobody knows the peak"
    for tag in ("method/update_norm", "method/core/largest", "method/core/smallest", "method/core/median"):
        assert steps(found, tag) == [0, 3, 6], tag
    assert [image.step for image in found.Images("init/captured_energy_by_layer")] == [0]
    assert [image.step for image in found.Images("method/update_norm_by_layer")][-1] == 6
    assert len(found.Histograms("method/core/singular_values")) == 3
    total = found.Scalars("system/seconds/total")[2].value
    parts = [found.Scalars(f"system/seconds/{part}")[2].value for part in PARTS]
    assert total == pytest.approx(sum(parts), rel=1e-4) and all(part > 0 for part in parts)


def test_the_recipe_the_environment_and_the_hyperparameters_are_there(recipe, boarded, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTLORA_HUB_TOKEN", "hunter2-hunter2")
    train.train(recipe("train.steps=1", "train.save_every=0", "data.eval_split=null"), Topology())
    records = read(tmp_path / "run" / "tensorboard", Records)
    texts = {
        tag: records.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("recipe", "environment")
    }
    assert "name: lora_sb" in texts["recipe"] and '"versions"' in texts["environment"]
    for text in texts.values():
        assert all(line.startswith("    ") for line in text.splitlines()), "a block of code"
        assert "hunter2" not in text
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(
        records.summary_metadata
    )


def test_hyperparameters_are_what_decides_the_numbers_of_a_run(recipe):
    found = hyperparameters(recipe())
    assert found["method.name"] == "lora_sb" and found["method.rank"] == 4 and found["train.lr"] == 0.01
    assert found["method.init.eta"] == 0.01 and found["data.task"] == "gsm8k"
    assert not any(key.startswith(("output_dir", "deepspeed", "data.path", "train.eval")) for key in found)
    secret = hyperparameters(recipe("model.path=https://me:hunter2@host/model"))
    assert secret["model.path"] == "https://***@host/model"
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())


def test_a_run_that_goes_on_has_every_step_once(recipe, boarded, tmp_path):
    """Also steps that were made after the last checkpoint, by a start that was killed then."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(Preempted):
        train.train(
            recipe(),
            Topology(),
            asked_to_stop=lambda: metrics.exists() and '"step": 3' in metrics.read_text(),
        )
    assert steps(read(tmp_path / "run" / "tensorboard"), "train/loss") == [1, 2, 3]
    for step in (4, 5):
        boarded[0].add_scalar("train/loss", 99.0, step)
    boarded[0].close()
    boarded.clear()
    train.train(recipe(), Topology())
    found = read(tmp_path / "run" / "tensorboard")
    for tag in ("train/loss", "system/seconds/total"):
        assert steps(found, tag) == [1, 2, 3, 4, 5, 6], tag
    assert steps(found, "eval/loss") == [0, 3, 6]
    assert max(event.value for event in found.Scalars("train/loss")) < 99


# ---------------------------------------------------------------------- the layers


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "lora", "rank": 3},
        {"name": "pissa", "rank": 3},
        {"name": "dora", "rank": 3},
        {"name": "lora_xs", "rank": 3},
        {"name": "lora_sb", "rank": 3, "init": {"eta": 0.01, "samples": 6}, "recompose": {"times": 2}},
        SRLORA,
    ],
    ids=lambda settings: settings["name"],
)  # fmt: skip
def test_the_norm_of_an_update_is_that_of_the_whole_change_of_w0(settings, tmp_path):
    """With all that was fused into W, or taken out of it, in float32."""
    run = Run(settings, steps=20)
    run.train()
    engine = Watched(run.engine.comm)
    engine.read, engine.ledger = run.engine.read, run.ledger
    LayerLooks(engine, run.method, run.layers, Monitor(engine, tmp_path), 20).look(20)
    told = {tag: value for tag, value, _ in engine.events}
    norms = [float((run.adapted(name) - run.first_weights[name].double()).norm()) for name in run.layers]
    assert told["method/update_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    images = {tag for tag, _, _ in engine.board.images}
    assert "method/update_norm_by_layer" in images
    has_core = "R" in run.method.path
    assert ("method/core/largest" in told) == ("method/core/spectra" in images) == has_core
    if has_core:
        largest = [float(torch.linalg.matrix_norm(run.used(name)["R"], 2)) for name in run.layers]
        assert told["method/core/largest"] == pytest.approx(sum(largest) / len(largest), rel=1e-4)


def test_layers_are_looked_at_some_ten_times_and_at_the_end(tmp_path):
    looked = []
    engine = Watched(Run({"name": "lora", "rank": 2}).engine.comm)
    looks = LayerLooks(engine, method_of({"name": "lora"}), {}, Monitor(engine, tmp_path), 1003)
    object.__setattr__(looks, "look", looked.append)
    for step in range(1, 1004):
        looks.after_step(step)
    assert 10 <= len(looked) <= 12 and looked[-1] == 1003 and looked[0] == 100


@pytest.mark.parametrize("settings", [{"name": "lora", "rank": 2}, {"name": "full"}], ids=str)
def test_without_a_monitor_or_factors_no_layer_is_read(settings, tmp_path):
    run = Run(settings, steps=1)
    engine = Watched(run.engine.comm, on=settings["name"] == "full")
    LayerLooks(engine, run.method, run.layers, Monitor(engine, tmp_path), 1).look(1)  # it has no `read`
    assert engine.events == [] and engine.board.images == []


def test_the_pictures_of_a_recomposition_are_drawn(tmp_path):
    run = Run(SRLORA, BF16)
    engine = Watched(run.engine.comm)
    monitor = Monitor(engine, tmp_path)
    run.to_recomposition()
    monitor.tell_recomposition(run.decide())
    for _, step, image in engine.board.images:
        assert step == 4 and image.shape[0] > 200 and image.std() > 5, "something is on it"


def test_a_directory_without_a_recipe_or_an_environment_has_a_board_too(tmp_path):
    engine = Watched(Run({"name": "lora", "rank": 2}).engine.comm)
    begin_board(engine, tmp_path, 0)
    assert engine.board.texts == [] and len(engine.board.records) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", [0, 7])
def test_only_a_run_that_begins_anew_removes_event_files_and_only_its_own(step, tmp_path):
    engine = Watched(Run({"name": "lora", "rank": 2}).engine.comm)
    inside, outside = tmp_path / "run" / "tensorboard", tmp_path / "shared"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "events.out.tfevents.1.elsewhere.2.0").touch()
        (folder / "notes.txt").touch()
        engine.board.log_dir = folder
        begin_board(engine, tmp_path / "run", step)
    kept = ["events.out.tfevents.1.elsewhere.2.0", "notes.txt"]
    assert sorted(os.listdir(inside)) == (kept if step else ["notes.txt"])
    assert sorted(os.listdir(outside)) == kept
