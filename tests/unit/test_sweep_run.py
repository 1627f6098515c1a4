"""Sweeps are run: what is missing, each point once, in good order whatever ends in the middle."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from distlora.cli.main import main
from distlora.sweeps import claims
from distlora.sweeps.child import Signals, run
from distlora.sweeps.file import read_sweep_file
from distlora.sweeps.processes import MARK, kill_marked, marked
from distlora.sweeps.states import claim_path, folder_of
from tests.sweeping import Desk

ALL = {"train.seed=1": "done", "train.seed=2": "done", "train.seed=3": "done"}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def sweep(desk, *words, **changes) -> int:
    return main(["sweep", str(desk.write(**changes)), *words])


def wait_until(condition):
    deadline = time.monotonic() + 120
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
    assert sweep(desk, evaluate=tasks | {"batch_size": 3}) == 0 and len(desk.starts()) == 6
    assert sweep(desk, evaluate=["gsm8k"]) == 0
    assert desk.names()[6:] == [f"eval train.seed={seed}" for seed in (1, 2, 3)], "another evaluation alone"
    assert all(words[-1] == "--fresh" for words in desk.starts()[6:])
    assert sweep(desk, grid={"train.seed": [1, 2, 3, 4]}, evaluate=["gsm8k"]) == 0
    assert desk.names()[9:] == ["train train.seed=4", "eval train.seed=4"], "a new point alone"


def test_predictions_of_other_settings_are_removed_and_those_of_the_same_are_kept(desk):
    def evaluate(code, limit, *tasks):
        assert sweep(desk, "--point", "0", evaluate={"tasks": list(tasks), "limit": limit}) == code
        return desk.starts()[-1][-1] == "--fresh"

    assert not evaluate(0, 5, "gsm8k", "metamath")
    desk.play(eval_1="failed")
    assert evaluate(1, 7, "gsm8k")
    assert evaluate(1, 7, "gsm8k"), "it may have ended before it had removed them"
    desk.play(eval_1="stopped")
    assert evaluate(75, 7, "gsm8k")
    desk.play()
    assert not evaluate(0, 7, "gsm8k"), "it goes on from its own"
    assert evaluate(0, 7, "metamath"), "that was of the limit before"
    assert not evaluate(0, 7, "metamath", "gsm8k")


@pytest.mark.parametrize("end", ["stopped", "stopped early"])
def test_an_evaluation_that_was_asked_to_stop_has_not_failed(desk, capsys, end):
    """Whatever exit code its launcher makes of it."""
    desk.play(eval_2=end)
    assert sweep(desk, evaluate=["gsm8k"]) == 75
    assert desk.table() == {**ALL, "train.seed=2": "waiting"}
    assert "its evaluation is missing" in capsys.readouterr().out


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
def test_a_signal_is_passed_on_and_the_same_command_goes_on(desk, capsys, number, request):
    # Tests that run in the background of a shell may have been started with SIGINT ignored.
    before = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, before))
    desk.play(train_2="wait")
    status = desk.folder / "out" / "train.seed=2" / "status.json"

    def send():
        try:
            wait_until(status.exists)
        finally:  # else the sweep would wait for ever
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
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
    token = "of this test"
    left = "setsid sleep 600 & sleep 600 & exit 3"  # launchers start ranks in sessions of their own
    with Signals() as signals:
        code = run(["bash", "-c", left], tmp_path / "log", signals, token, lambda: None)
    assert code == 3 and marked(token) == []


def test_a_run_whose_claim_is_lost_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("distlora.sweeps.child.BEAT", 0.05)
    claim = claims.take(tmp_path / "x.claim")
    threading.Timer(0.3, (tmp_path / "x.claim").unlink).start()
    with Signals() as signals, pytest.raises(claims.Lost):
        run(["bash", "-c", "setsid sleep 600 & wait"], tmp_path / "log", signals, claim.token, claim.renew)
    assert marked(claim.token) == []


def test_a_claim_is_renewed_while_its_point_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("distlora.sweeps.child.BEAT", 0.05)
    path = tmp_path / "x.claim"
    claim = claims.take(path)
    os.utime(path, (0, 0))
    with Signals() as signals:
        run(["true"], tmp_path / "log", signals, claim.token, claim.renew)
    assert path.stat().st_mtime > time.time() - 60


# ---------------------------------------------------------------------- two sweeps


@contextlib.contextmanager
def another_sweep(desk):
    """Of the same file, in a process of its own. It has imported everything already."""
    other = multiprocessing.get_context("fork").Process(
        target=lambda file: sys.exit(main(["sweep", file])), args=(str(desk.write()),)
    )
    other.start()
    try:
        yield other
    finally:
        other.kill()
        other.join()


def test_two_sweeps_at_once_run_no_point_twice(desk, capsys):
    """One is another process; each waits in a point of its own while the other runs the rest."""
    desk.play(train_1="wait")
    with another_sweep(desk) as other:
        wait_until(lambda: (desk.folder / "out" / "train.seed=1" / "status.json").exists())
        assert sweep(desk) == 75, "that point is not done"
        said = capsys.readouterr().err
        claim = claim_path(desk.read(), desk.read().points[0])
        assert f"run by another sweep (process {other.pid} on" in said and f"{claim} says" in said
        assert desk.names() == [f"train train.seed={seed}" for seed in (1, 2, 3)]
        assert desk.table() == {**ALL, "train.seed=1": "running"}
        (desk.folder / "over").touch()
        other.join(60)
    assert other.exitcode == 0 and len(desk.starts()) == 3 and desk.table() == ALL


def test_a_killed_sweeps_point_is_left_while_its_run_goes_on_and_then_taken_over(desk, capsys):
    desk.play(train_1="wait")
    with another_sweep(desk) as other:
        wait_until(lambda: (desk.folder / "out" / "train.seed=1" / "status.json").exists())
    assert sweep(desk) == 75  # and the other one is killed
    assert (
        desk.table() == {**ALL, "train.seed=1": "running"}
        and f"process {other.pid}" in capsys.readouterr().out
    )
    path = claim_path(desk.read(), desk.read().points[0])
    kill_marked(claims.holder_of(path).token)
    wait_until(lambda: claims.holder_of(path) is None)
    desk.play()
    assert sweep(desk) == 0 and desk.table() == ALL
    assert desk.names()[3:] == ["train train.seed=1"]


def write_claim(path, age, **changes):
    """A claim that this process has not made, renewed `age` seconds ago."""
    owner = asdict(claims.new_owner()) | changes
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)


def test_claims(tmp_path, monkeypatch):
    path = tmp_path / "x.claim"
    first = claims.take(path)
    assert isinstance(first, claims.Claim)
    assert claims.take(path) == claims.holder_of(path) and claims.holder_of(path).pid == os.getpid()
    first.release()
    assert claims.holder_of(path) is None
    assert isinstance(claims.take(path), claims.Claim), "free again"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elsewhere = {"place": "another start or namespace", "pid": os.getpid(), "job": ""}
    for age, owner, dead in [
        (500, {}, False),  # its process runs
        (0, {"pid": 2**22 + 1}, True),
        (0, {"started": 1}, True),  # its number has come again
        (100, elsewhere, False),
        (130, elsewhere, True),
        (0, elsewhere | {"job": "7_1", "restart": "0"}, True),  # an earlier start of this job
        (0, elsewhere | {"job": "7_1", "restart": "1"}, False),
        (0, elsewhere | {"job": "7_2", "restart": "0"}, False),
    ]:
        write_claim(path, age, **owner)
        assert isinstance(claims.take(path), claims.Claim) == dead, owner
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".lock")] == [path.name]


def test_claims_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "x.claim"
    first = claims.take(path)
    assert isinstance(first, claims.Claim) and claims.take(path) == claims.holder_of(path)
    first.renew()
    first.release()
    assert not path.exists()


@pytest.mark.parametrize("text", ["", '{"host": "a', "[]", "{}"])
def test_a_file_that_is_no_claim_does_not_block_for_ever(tmp_path, text):
    path = tmp_path / "x.claim"
    path.write_text(text)
    assert "an unknown host" in claims.take(path).where
    os.utime(path, (time.time() - 130,) * 2)
    assert isinstance(claims.take(path), claims.Claim)


def test_a_claim_that_was_taken_over_is_neither_renewed_nor_released(tmp_path):
    path = tmp_path / "x.claim"
    first = claims.take(path)
    write_claim(path, 130, place="elsewhere", token="another")
    assert isinstance(claims.take(path), claims.Claim)
    with pytest.raises(claims.Lost):
        first.renew()
    first.release()
    assert path.exists()


def test_a_claim_is_kept_while_a_process_of_its_run_is_left(tmp_path):
    path = tmp_path / "x.claim"
    claim = claims.take(path)
    mark = {**os.environ, MARK: claim.token}
    with subprocess.Popen(["sleep", "600"], env=mark, start_new_session=True) as left:
        try:
            wait_until(lambda: marked(claim.token))
            claim.release()
            assert path.exists()
            write_claim(path, 0, token=claim.token, pid=2**22 + 1)
            assert claims.holder_of(path) is not None, "its sweep is dead, and its run is not"
        finally:
            left.kill()


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
        sweep(
            desk, "--slurm", "--sbatch=--gpus-per-node=8 --comment='a b'", "--jobs=2", "train.steps=3",
            launcher=None,
        ) == 0
    )  # fmt: skip
    *options, script, verb, name, file, override = sbatch()
    assert options == [
        "--parsable", "--job-name=sweep", "--array=0,2%2", "--gpus-per-node=8", "--comment=a b",
    ]  # fmt: skip
    assert script.endswith("launch/slurm.sbatch") and [verb, name] == ["--verb", "sweep"]
    assert override == "train.steps=3"
    submitted = read_sweep_file(desk.file, [override])
    desk.write(grid={"train.seed": [7]})
    found = read_sweep_file(file, [override])
    assert found.points == submitted.points
    assert (found.recipe, found.output) == (submitted.recipe, submitted.output)
    assert "job 12: 2 points" in capsys.readouterr().out and len(desk.starts()) == 1


def test_a_launcher_does_not_go_with_slurm(desk, sbatch, capsys):
    for words, launcher in (["--launcher", "env"], None), ([], "env"):
        assert sweep(desk, "--slurm", *words, launcher=launcher) == 2
        said = capsys.readouterr().err
        assert "not by the launcher env; leave --launcher, or the file's launcher, out" in said
    assert desk.starts() == []


def test_slurm_that_is_missing_or_refuses(desk, sbatch, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/usr/bin/env bash\necho 'sbatch: error: no such partition.' >&2; exit 1\n"
    )
    assert sweep(desk, "--slurm", launcher=None) == 2
    assert "--slurm: sbatch refused: sbatch: error: no such partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert sweep(desk, "--slurm", launcher=None) == 2 and "there is no sbatch here" in capsys.readouterr().err
