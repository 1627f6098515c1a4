"""metrics.jsonl, the monitors' events and the progress bar."""

import json
import math

import pytest
import torch

from distlora.engine.comm import Comm, Topology
from distlora.progress import told_to
from distlora.training.monitor import Monitor, Progress
from tests.boards import Watched


def engine_of(rank=0):
    comm = Comm(Topology(), torch.device("cpu"), distributed=False)
    comm.rank = rank
    return Watched(comm)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_with_step_and_tags(tmp_path):
    engine = engine_of()
    monitor = Monitor(engine, tmp_path)
    monitor.write(0, {"init/eta": 1e-4})
    monitor.write(1, {"train/loss": 2.5, "train/learning_rate": 1e-3})
    assert lines(tmp_path) == [
        {"step": 0, "init/eta": 1e-4},
        {"step": 1, "train/loss": 2.5, "train/learning_rate": 1e-3},
    ]
    assert engine.events == [("init/eta", 1e-4, 0), ("train/loss", 2.5, 1), ("train/learning_rate", 1e-3, 1)]


def test_the_curve_of_a_search_is_a_picture_and_its_outcome_for_all(tmp_path):
    engine = engine_of()
    Monitor(engine, tmp_path).tell_rates({"lr_search/rate": 1e-3}, [(1e-4, 1.9), (1e-3, 1.5), (1, math.inf)])
    assert lines(tmp_path) == [{"step": 0, "lr_search/rate": 1e-3}]
    assert engine.events == [("init/lr_search/rate", 1e-3, 0)]
    assert [(tag, step) for tag, step, _ in engine.board.images] == [("init/lr_search/losses", 0)]


@pytest.mark.parametrize(
    ("tag", "shown"),
    [
        ("train/loss", "train/loss"),
        ("recompose/sigma", "method/recompose/sigma"),
        ("recompose/init/eta", "method/recompose/init/eta"),
        ("lr_search/rate", "init/lr_search/rate"),
    ],
)
def test_monitors_have_groups_that_the_file_of_metrics_has_not(tag, shown, tmp_path):
    engine = engine_of()
    Monitor(engine, tmp_path).write(1, {tag: 2.0})
    assert lines(tmp_path) == [{"step": 1, tag: 2.0}] and engine.events == [(shown, 2.0, 1)]


@pytest.mark.parametrize("unit", ["tokens", "images"])
def test_the_mean_speed_is_for_the_file_alone(unit, tmp_path):
    engine = engine_of()
    Monitor(engine, tmp_path).write(1, {f"train/{unit}_per_second": 9.0, f"system/{unit}_per_second": 11.0})
    assert lines(tmp_path)[0][f"train/{unit}_per_second"] == 9.0
    assert engine.events == [(f"system/{unit}_per_second", 11.0, 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_is_a_string(value, tmp_path):
    engine = engine_of()
    Monitor(engine, tmp_path).write(3, {"train/loss": value, "train/grad_norm": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert strict == {"step": 3, "train/loss": str(value), "train/grad_norm": 1.0}
    assert engine.events[0][1] is value


def test_other_ranks_write_nothing(tmp_path):
    engine = engine_of(rank=1)
    Monitor(engine, tmp_path).write(1, {"train/loss": 2.5})
    assert not (tmp_path / "metrics.jsonl").exists() and engine.events == []


def test_other_ranks_forget_nothing(tmp_path):
    Monitor(engine_of(), tmp_path).write(1, {"train/loss": 2.5})
    Monitor(engine_of(rank=1), tmp_path)
    assert len(lines(tmp_path)) == 1


def test_a_resumed_run_forgets_what_it_makes_again(tmp_path):
    monitor = Monitor(engine_of(), tmp_path)
    for step in range(6):
        monitor.write(step, {"train/loss": float(step)})
    monitor.write(4, {"eval/loss": 9.0})
    again = Monitor(engine_of(), tmp_path, resumed_at=4)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 4]
    again.write(5, {"train/loss": 50.0})
    assert lines(tmp_path)[-1] == {"step": 5, "train/loss": 50.0}
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("length", [1, 10, 29])
def test_a_line_that_a_crash_cut_is_forgotten(length, tmp_path):
    monitor = Monitor(engine_of(), tmp_path)
    for step in (1, 2, 3):
        monitor.write(step, {"train/loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    *whole, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + last[:length])
    resumed = Monitor(engine_of(), tmp_path, resumed_at=2)
    resumed.write(3, {"train/loss": 30.0})
    assert lines(tmp_path) == [{"step": n, "train/loss": loss} for n, loss in ((1, 1.0), (2, 2.0), (3, 30.0))]


def test_a_run_that_begins_anew_begins_a_new_file(tmp_path):
    Monitor(engine_of(), tmp_path).write(0, {"init/eta": 1.0})
    Monitor(engine_of(), tmp_path).write(0, {"init/eta": 2.0})
    assert lines(tmp_path) == [{"step": 0, "init/eta": 2.0}]


# ---------------------------------------------------------------------- progress


def test_loss_rate_and_speed_are_told_of_each_step():
    told = []

    class Audience:
        def begin(self, *about):
            told.append(about)
            return self

        def advance(self, count=1, said=""):
            told.append(said)

        def close(self):
            told.append("over")

    with told_to(Audience()):
        progress = Progress(steps=4, start=1)
        speeds = [progress.advance(loss, 2e-3, amount=100) for loss in (1.5, 1.25, 1.125)]
        progress.close()
    assert told[0] == ("training", "steps", 4, 1) and told[-1] == "over" and len(told) == 5
    assert "loss 1.1250" in told[3] and "lr 2.00e-03" in told[3] and "tokens/s" in told[3]
    assert all(speed > 0 for speed in speeds)


def test_speed_is_tokens_over_the_time_since_the_start(monkeypatch):
    clock = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("distlora.training.monitor.time.perf_counter", lambda: next(clock))
    progress = Progress(steps=2, start=0)
    assert progress.advance(1.0, 1e-3, 100) == 50.0
    assert progress.advance(1.0, 1e-3, 300) == 80.0


def test_without_an_audience_nothing_is_shown(capsys):
    progress = Progress(steps=2, start=0)
    assert progress.advance(1.0, 1e-3, 10) > 0
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
