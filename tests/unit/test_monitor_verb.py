"""`distlora monitor`: which event files it finds, what it refuses, and TensorBoard itself."""

import json
import os
import socket
import urllib.parse
import urllib.request
from contextlib import closing

import pytest

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.report import board
from distlora.report.board import boards, first_screen, serving

RECIPE = {"model": {"path": "x"}, "method": {"name": "lora", "rank": 1}, "data": {"task": "arithmetic"}}


def a_run(folder, deepspeed=None, events=("tensorboard",)):
    """A run directory with event files in these places of it."""
    folder.mkdir(parents=True)
    content = {**RECIPE, "output_dir": str(folder), "deepspeed": deepspeed}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    for place in events:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "events.out.tfevents.1.host.2.0").touch()
    return folder


def board_at(place="auto", job="auto"):
    return {"tensorboard": {"enabled": True, "output_path": str(place), "job_name": job}}


def test_a_run_a_sweep_and_a_folder_of_events_are_found_by_short_names(tmp_path):
    single = a_run(tmp_path / "one", board_at())
    for point in ("lr=1", "lr=2"):
        a_run(tmp_path / "sweep" / point, board_at())
    other = tmp_path / "other"
    other.mkdir()
    (other / "events.out.tfevents.7").touch()
    assert boards([single, tmp_path / "sweep", other]) == {
        "one": single / "tensorboard",
        "lr=1": tmp_path / "sweep" / "lr=1" / "tensorboard",
        "lr=2": tmp_path / "sweep" / "lr=2" / "tensorboard",
        "other": other,
    }
    assert boards([single, single, tmp_path / "one"]) == {"one": single / "tensorboard"}


@pytest.mark.parametrize("moved", [False, True])
def test_the_place_of_event_files_is_that_of_the_recipe(moved, tmp_path):
    far = tmp_path / "far"
    run = a_run(tmp_path / "run", board_at(far, "mine"), events=())
    (far / "mine").mkdir(parents=True)
    (far / "mine" / "events.out.tfevents.1").touch()
    if moved:
        run = run.rename(tmp_path / "elsewhere")
    assert boards([run]) == {run.name: far / "mine"}


def test_runs_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        a_run(tmp_path / folder / "run", board_at())
    assert set(boards([tmp_path])) == {"a/run", "b/run"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "none", "none is no run directory: there is no such directory"),
        (lambda folder: folder, "holds no run: neither it nor a directory below it has a recipe.yaml"),
        (lambda folder: a_run(folder / "quiet", events=()), "quiet: no run here has event files"),
        (lambda folder: a_run(folder / "off", {}, events=("logs",)), "whose tensorboard section is on, such"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_sentence(make, said, tmp_path, capsys):
    assert main(["monitor", str(make(tmp_path))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("port", ["0", "-1", "x", "65536", "6006.0"])
def test_a_wrong_port_is_one_sentence(port, tmp_path, capsys):
    assert main(["monitor", str(a_run(tmp_path / "run")), f"--port={port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distlora: --port")


def test_without_the_package_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "is_installed", lambda package: False)
    with pytest.raises(UserError, match="^distlora monitor needs the package tensorboard; pip install"):
        with serving([a_run(tmp_path / "run")]):
            pass


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tensorboard_serves_the_runs_and_later_ones_by_their_names(tmp_path):
    a_run(tmp_path / "runs" / "first", board_at())
    port = free_port()
    with serving([tmp_path / "runs"], port=port) as (address, look_again):
        assert address.startswith("http://") and str(port) in address
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/logdir", timeout=60) as answer:
            (folder,) = json.load(answer).values()
        assert os.listdir(folder) == ["first"]
        a_run(tmp_path / "runs" / "second", board_at())
        look_again()
        look_again()
        assert sorted(os.listdir(folder)) == ["first", "second"]
        with pytest.raises(UserError, match="^TensorBoard cannot be started: [^\n]+$"):
            with serving([tmp_path / "runs"], port=port):
                pass
    assert not os.path.exists(folder)


def test_the_first_screen_has_loss_and_speed_at_its_top():
    query = urllib.parse.urlparse(first_screen("http://localhost:6006/")).query
    cards = json.loads(urllib.parse.parse_qs(query)["pinnedCards"][0])
    assert [card["tag"] for card in cards][:2] == ["train/loss", "eval/loss"]
    assert all(card["plugin"] == "scalars" for card in cards)
