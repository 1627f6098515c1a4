"""Sweeps are run: what is missing, each point once, in good order whatever ends in the middle."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from distlora.cli.main import main
from distlora.sweeps import claims
from distlora.sweeps.child import Signals, run
from distlora.sweeps.processes import group_runs
from distlora.sweeps.states import claim_path, folder_of
from tests.sweeping import Desk

ALL = {"train.seed=1": "done", "train.seed=2": "done", "train.seed=3": "done"}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def sweep(desk, *words, **changes) -> int:
    return main(["sweep", str(desk.write(**changes)), *words])


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------- what is run


def test_each_point_is_trained_and_evaluated_once(desk, capsys):
    tasks = {"tasks": ["gsm8k", "metamath"], "limit": 7, "data": {"gsm8k": "a b"}}
    assert sweep(desk, evaluate=tasks) == 0
    assert desk.names() == [f"{verb} train.seed={seed}" for seed in (1, 2, 3) for verb in ("train", "eval")]
    train, evaluation = desk.starts()[:2]
    assert train[2:] == [
        str(desk.folder / "recipe.yaml"), "train.seed=1", f"output_dir={desk.folder}/out/train.seed=1",
    ]  # fmt: skip
    assert evaluation[2:] == [
        f"{desk.folder}/out/train.seed=1", "--tasks", "gsm8k,metamath", "--limit", "7", "--data", "gsm8k=a b",
    ]  # fmt: skip
    assert desk.table() == ALL and "3 done" in capsys.readouterr().out
    assert sweep(desk, evaluate=tasks) == 0 and len(desk.starts()) == 6, "nothing is left to do"
    assert sweep(desk, evaluate=["gsm8k"]) == 0
    assert desk.names()[6:] == [f"eval train.seed={seed}" for seed in (1, 2, 3)], "another evaluation alone"
    assert sweep(desk, grid={"train.seed": [1, 2, 3, 4]}, evaluate=["gsm8k"]) == 0
    assert desk.names()[9:] == ["train train.seed=4", "eval train.seed=4"], "a new point alone"


def test_a_run_that_was_removed_is_trained_and_evaluated_again(desk):
    assert sweep(desk, "--point", "0", evaluate=["gsm8k"]) == 0
    status = desk.folder / "out" / "train.seed=1" / "status.json"
    status.write_text("{")  # damaged, which is as good as none
    assert sweep(desk, "--point", "0", evaluate=["gsm8k"]) == 0
    assert desk.names()[2:] == ["train train.seed=1", "eval train.seed=1"]


def test_one_point(desk):
    assert sweep(desk, "--point", "1") == 0
    assert desk.names() == ["train train.seed=2"]
    assert desk.table() == {**dict.fromkeys(ALL, "waiting"), "train.seed=2": "done"}


def test_a_launchers_words_stand_before_the_verb_or_around_it(desk):
    words = [*desk.content["launcher"], "{verb}"]
    assert sweep(desk, "--point", "0", launcher=words) == 0 and desk.names() == ["train train.seed=1"]


@pytest.mark.parametrize(
    ("end", "state", "code", "message"),
    [
        ("failed", "failed", 1, "the loss is NaN"),
        ("mistake", "failed", 1, "train.lr: wanted a number"),
        ("killed", "failed", 1, "killed by signal 9"),
        ("silent", "preempted", 75, "rank 1 went silent"),
    ],
)
def test_a_point_that_does_not_end_well_does_not_stop_the_others(desk, capsys, end, state, code, message):
    desk.play(train_2=end)
    assert sweep(desk) == code
    assert desk.table() == {**ALL, "train.seed=2": state} and len(desk.starts()) == 3
    said = capsys.readouterr()
    assert message in said.out and "train.seed=2" in said.err.splitlines()[-1]
    desk.play()
    assert sweep(desk) == 0 and desk.names()[3:] == ["train train.seed=2"] and desk.table() == ALL


def test_an_evaluation_that_fails_is_done_again_without_training(desk, capsys):
    desk.play(eval_1="mistake")
    assert sweep(desk, evaluate=["gsm8k"]) == 1
    assert desk.table() == {**ALL, "train.seed=1": "failed"}
    assert "its evaluation: train.lr: wanted a number" in capsys.readouterr().out
    desk.play()
    assert sweep(desk, evaluate=["gsm8k"]) == 0
    assert desk.names()[6:] == ["eval train.seed=1"]


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_command_goes_on(desk, capsys, number):
    desk.play(train_2="wait")
    status = desk.folder / "out" / "train.seed=2" / "status.json"
    sender = threading.Thread(target=lambda: (wait_until(status.exists), os.kill(os.getpid(), number)))
    sender.start()
    assert sweep(desk) == 75
    sender.join()
    assert desk.table() == {"train.seed=1": "done", "train.seed=2": "preempted", "train.seed=3": "waiting"}
    assert f"asked to stop ({number.name})" in capsys.readouterr().err
    assert list(folder_of(desk.read()).glob("*.claim")) == []
    desk.play()
    assert sweep(desk) == 0 and desk.table() == ALL
    assert desk.names()[2:] == ["train train.seed=2", "train train.seed=3"]


def test_what_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_run_leaves_is_ended_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("distlora.sweeps.child.GRACE", 0.2)
    numbers = []
    with Signals() as signals:
        code = run(["bash", "-c", "sleep 600 & exit 3"], tmp_path / "log", signals, numbers.append)
    assert code == 3 and numbers[1] == 0
    assert not group_runs(numbers[0])


# ---------------------------------------------------------------------- two sweeps


def test_two_sweeps_at_once_run_no_point_twice(desk):
    """One is another process; each waits in a point of its own while the other runs the rest."""
    desk.play(train_1="wait")
    command = [sys.executable, "-m", "distlora", "sweep", str(desk.write())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        wait_until(lambda: (desk.folder / "out" / "train.seed=1" / "status.json").exists())
        assert sweep(desk) == 1, "that point is not done"
        assert desk.names() == [f"train train.seed={seed}" for seed in (1, 2, 3)]
        assert desk.table() == {**ALL, "train.seed=1": "running"}
        (desk.folder / "over").touch()
        other.communicate(timeout=60)
    assert other.returncode == 0 and len(desk.starts()) == 3 and desk.table() == ALL


def test_a_killed_sweeps_point_is_left_while_its_run_goes_on_and_then_taken_over(desk, capsys):
    desk.play(train_1="wait")
    command = [sys.executable, "-m", "distlora", "sweep", str(desk.write())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        wait_until(lambda: (desk.folder / "out" / "train.seed=1" / "status.json").exists())
        other.kill()
    assert sweep(desk) == 1
    assert (
        desk.table() == {**ALL, "train.seed=1": "running"}
        and f"process {other.pid}" in capsys.readouterr().out
    )
    owner = claims.owner_of(claim_path(desk.read(), desk.read().points[0]))
    os.killpg(owner.child, signal.SIGKILL)
    wait_until(owner.is_dead)
    desk.play()
    assert sweep(desk) == 0 and desk.table() == ALL
    assert desk.names()[3:] == ["train train.seed=1"]


def test_claims(tmp_path, monkeypatch):
    path = tmp_path / "x.claim"
    first = claims.take(path)
    assert isinstance(first, claims.Claim)
    assert claims.take(path) == claims.this_process() and not claims.this_process().is_dead()
    first.release()
    assert isinstance(claims.take(path), claims.Claim), "free again"
    here = socket.gethostname()
    for owner, dead in [
        (claims.Owner(here, 2**22 + 1, 1, ""), True),
        (claims.Owner(here, os.getpid(), 1, ""), True),  # its number has come again
        (claims.Owner("elsewhere", 1, 1, ""), False),
        (claims.Owner("elsewhere", 1, 1, "7_1", "0"), True),  # an earlier start of this job
        (claims.Owner("elsewhere", 1, 1, "7_1", "1"), False),
        (claims.Owner("elsewhere", 1, 1, "7_2", "0"), False),
    ]:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        path.write_text(claims._text(owner))
        assert isinstance(claims.take(path), claims.Claim) == dead, owner


# ---------------------------------------------------------------------- SLURM


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in, which writes its words down."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >{tmp_path}/called\necho '12;cluster'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: (tmp_path / "called").read_text().split("\0")[:-1]


def test_what_is_missing_becomes_a_job_array(desk, sbatch, capsys):
    assert sweep(desk, "--point", "1") == 0
    assert (
        sweep(desk, "--slurm", "--sbatch=--gpus-per-node=8 --comment='a b'", "--jobs=2", "train.steps=3") == 0
    )
    *options, script, verb, name, file, override = sbatch()
    assert options == [
        "--parsable", "--job-name=sweep", "--array=0,2%2", "--gpus-per-node=8", "--comment=a b",
    ]  # fmt: skip
    assert script.endswith("launch/slurm.sbatch") and [verb, name] == ["--verb", "sweep"]
    assert [file, override] == [str(desk.file), "train.steps=3"]
    assert "job 12: 2 points" in capsys.readouterr().out and len(desk.starts()) == 1


def test_slurm_that_is_missing_or_refuses(desk, sbatch, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/usr/bin/env bash\necho 'sbatch: error: no such partition.' >&2; exit 1\n"
    )
    assert sweep(desk, "--slurm") == 2
    assert "--slurm: sbatch refused: sbatch: error: no such partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert sweep(desk, "--slurm") == 2 and "there is no sbatch here" in capsys.readouterr().err
