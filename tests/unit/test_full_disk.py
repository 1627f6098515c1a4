"""A disk that is full, or broken, under any of a run's files: one sentence, the last step saved where that
can be, the status written, nothing left over, and the run goes on when there is room.
"""

import errno
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from distlora.cluster.lease import STALE
from distlora.cluster.logs import RankLog
from distlora.cluster.status import RESERVE, RESERVED_BYTES, StatusFile, new_start, read_status
from distlora.engine.comm import Topology
from distlora.errors import Preempted, UserError
from distlora.files import atomic
from distlora.files.problems import WriteErrors, file_errors_explained, is_of_the_disk, sentence_on
from distlora.training import monitor, train
from distlora.training.monitor import writers_silenced
from tests.e2e.program import curve
from tests.unit.test_train import model, recipe  # noqa: F401 (fixtures)

REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def refusal(code: int = errno.ENOSPC, name: object = None) -> OSError:
    return OSError(code, os.strerror(code), name)


@pytest.mark.parametrize("code", REASONS)
def test_what_a_disk_says_becomes_a_sentence_with_the_place_and_a_remedy(code):
    with pytest.raises(UserError) as told, file_errors_explained("run/checkpoint-2"):
        raise refusal(code, "run/checkpoint-2/state.json")
    assert str(told.value).startswith(
        f"run/checkpoint-2: {os.strerror(code)} (run/checkpoint-2/state.json); "
    )
    assert is_of_the_disk(refusal(code))
    assert sentence_on(refusal(code)).startswith("a file: ")


def test_a_mistake_in_the_program_is_none_of_the_disk():
    assert not is_of_the_disk(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))


# ---------------------------------------------------------------------- single files


@pytest.fixture
def failing(monkeypatch):
    """Makes os.fsync fail from the n-th call on, as where blocks are given out late."""

    def fail(after: int = 0) -> None:
        calls, flush = [], os.fsync

        def fsync(handle):
            calls.append(handle)
            if len(calls) > after:
                raise refusal()
            flush(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    return fail


def test_a_file_that_cannot_be_replaced_stays_and_no_draft_is_left(tmp_path, failing):
    atomic.write_text(tmp_path / "a.json", "old", writer="me")
    failing()
    with pytest.raises(OSError):
        atomic.write_text(tmp_path / "a.json", "new", writer="me")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_of_a_line_that_does_not_fit_nothing_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    atomic.append_text(path, "one\n")
    with limited_files(6), pytest.raises(OSError):
        atomic.append_text(path, "two and more\n")
    assert path.read_text() == "one\n"
    atomic.append_text(path, "three\n")
    assert path.read_text() == "one\nthree\n"


class limited_files:  # noqa: N801 (a context manager)
    """The system writes a part of what passes the limit and refuses the rest, as a full disk does."""

    def __init__(self, size: int):
        import resource

        self._resource, self._size = resource, size

    def __enter__(self):
        self._before = self._resource.getrlimit(self._resource.RLIMIT_FSIZE)
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_):
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, self._before)


def test_the_end_of_a_run_is_written_with_what_was_reserved(tmp_path, monkeypatch):
    """The disk has room for the status again once the reserve is given back."""
    status = StatusFile(tmp_path, 0, new_start())
    status.claim()
    assert (tmp_path / RESERVE).stat().st_blocks * 512 >= RESERVED_BYTES
    status.write("running")
    write, full = atomic.write_text, tmp_path / RESERVE
    monkeypatch.setattr("distlora.cluster.status.write_text", lambda *given, **more: (
        write(*given, **more) if not full.exists() else (_ for _ in ()).throw(refusal(errno.EDQUOT))
    ))  # fmt: skip
    with pytest.raises(OSError):
        status.write("running")
    assert full.exists(), "the reserve is for the end alone"
    status.write("failed", "no room")
    assert read_status(tmp_path).message == "no room"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_where_there_is_no_room_for_the_reserve_nothing_is_left(tmp_path, failing):
    failing()
    with pytest.raises(OSError):
        StatusFile(tmp_path, 0, new_start()).claim()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [10, 300])
def test_a_log_that_cannot_be_written_says_nothing_on_the_terminal(tmp_path, size, capsys, monkeypatch):
    """Logging would print a traceback for every line."""
    errors = WriteErrors()
    # Those of other tests write to the terminal, which the limit would hit as well.
    monkeypatch.setattr(logging.getLogger("distlora"), "handlers", [])
    logging.getLogger("distlora").setLevel("INFO")
    with limited_files(size), RankLog(0, errors) as log:
        log.open(tmp_path)
        for _ in range(5):
            logging.getLogger("distlora.test").info("a line of the log that is written to a file")
    assert "rank-0.log: File too large" in str(errors.first)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "Logging error" not in captured.err


def test_the_thread_of_a_monitor_that_fails_prints_nothing(capsys):
    writer = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary.writer"})

    def fail():
        raise refusal()

    def end(kind):
        thread = kind(target=fail)
        thread.start()
        thread.join()
        return capsys.readouterr().err

    before, threading.excepthook = threading.excepthook, threading.__excepthook__
    try:
        with writers_silenced():
            assert end(writer) == ""
            assert "No space left" in end(threading.Thread), "others are heard"
    finally:
        threading.excepthook = before


# ---------------------------------------------------------------------- whole runs


@pytest.fixture
def full(monkeypatch):
    """Makes the disk full for a function that writes, from its n-th call on."""

    def fill(module, name: str, at: int, only: str = "") -> None:
        write, calls = getattr(module, name), []

        def refuse(path, *given, **more):
            calls.append(path)
            if str(path).endswith(only) and len(calls) >= at:
                raise refusal(name=str(path))
            return write(path, *given, **more)

        monkeypatch.setattr(module, name, refuse)

    return fill


def refused(made, *given) -> str:
    with pytest.raises(UserError, match="^[^\n]+$") as told:
        train.train(made, Topology(), *given)
    status = read_status(Path(made.output_dir))
    assert (status.state, status.message, status.requeue) == ("failed", str(told.value), False)
    hidden = [path.name for path in Path(made.output_dir).rglob(".*")]
    assert hidden == [] and not (Path(made.output_dir) / "lease.json").exists()
    return str(told.value)


def test_full_under_the_metrics_the_last_step_is_saved_and_no_line_is_lost(recipe, full, monkeypatch):  # noqa: F811
    made = recipe("train.save_every=null")
    with monkeypatch.context() as there:
        write = atomic.append_text

        def refuse(path, text):
            if '"train/loss"' in text and '"step": 2' in text:
                raise refusal(name=str(path))
            write(path, text)

        there.setattr(monitor, "append_text", refuse)
        said = refused(made)
    run = Path(made.output_dir)
    assert (run / "logs" / "rank-0.log").read_text().splitlines()[-1].endswith(f"ended: {said}")
    assert said == (
        f"{run}/metrics.jsonl: No space left on device; make room there; "
        f"stopped after step 2, which is saved; the same command goes on from {run}/checkpoint-2"
    )
    assert train.train(made, Topology()).steps == 3
    losses = curve(run)
    assert list(losses) == [1, 2, 3], "the line of step 2 was kept in the checkpoint"
    train.train(made, Topology())
    assert curve(run) == losses


def test_full_under_the_metrics_every_checkpoint_keeps_the_line(recipe, monkeypatch):  # noqa: F811
    """The run is asked to stop before it would have ended because of the disk."""
    made = recipe("data.eval_split=train", "train.eval_every=1", "train.exact_match_samples=0")
    asked = []
    with monkeypatch.context() as there:
        write = atomic.append_text

        def refuse(path, text):
            if '"eval/loss"' in text and '"step": 2' in text:
                asked.append(True)
                raise refusal(name=str(path))
            write(path, text)

        there.setattr(monitor, "append_text", refuse)
        with pytest.raises(Preempted, match="stopped after step 2"):
            train.train(made, Topology(), None, lambda: bool(asked))
    train.train(made, Topology())
    lines = map(json.loads, (Path(made.output_dir) / "metrics.jsonl").read_text().splitlines())
    assert sorted(line["step"] for line in lines if "eval/loss" in line) == [0, 1, 2, 3]


def test_full_under_metrics_and_checkpoints(recipe, full):  # noqa: F811
    made = recipe("train.save_every=null")
    full(monitor, "append_text", at=2)
    full(sys.modules["distlora.checkpoints.save"], "write_json", at=1)
    assert "stopped after step 1, which cannot be saved; the same command begins anew" in refused(made)


def test_full_under_a_checkpoint_the_older_one_is_named(recipe, full):  # noqa: F811
    made = recipe()
    full(sys.modules["distlora.checkpoints.save"], "write_json", at=4)
    run = Path(made.output_dir)
    assert refused(made).startswith(
        f"{run}/checkpoint-2: No space left on device ({run}/.checkpoint-2.partial/"
    )
    assert read_status(run).saved == 1
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("module", "name", "file"),
    [
        ("distlora.exports.peft", "write_json", "adapter_config.json"),
        ("distlora.training.summary", "write_text", "summary.json"),
        ("distlora.cluster.environment", "write_text", "environment.json"),
    ],
)
def test_full_under_any_other_file(recipe, full, monkeypatch, module, name, file):  # noqa: F811
    made = recipe()
    with monkeypatch.context():
        full(sys.modules[module], name, at=1, only=file)
        said = refused(made)
        assert ": No space left on device" in said
        monkeypatch.undo()
    assert train.train(made, Topology()).adapter is not None


def test_full_under_the_status_after_a_save_that_save_is_named(recipe, monkeypatch):  # noqa: F811
    made, write, states = recipe(), StatusFile.write, []

    def refuse(self, state, *given, **more):
        states.append(state)
        if states == ["running", "running"]:
            raise refusal()
        write(self, state, *given, **more)

    monkeypatch.setattr(StatusFile, "write", refuse)
    run = Path(made.output_dir)
    assert refused(made).endswith(f"make room there; the same command goes on from {run}/checkpoint-1")
    assert read_status(run).saved == 1


def test_what_a_kill_has_left_goes_with_the_next_start(recipe):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    run.mkdir()
    for name in (".status.json.node1-7.partial", ".summary.json.partial", ".metrics.jsonl.partial", ".mine"):
        (run / name).touch()
    for name in (".lease.json.old", ".lease.json.old.dead", ".lease.json.now"):
        (run / name).touch()
        silent = 0 if name.endswith("now") else STALE + 10
        os.utime(run / name, (time.time() - silent,) * 2)
    (run / ".adapter.partial").mkdir()
    train.train(made, Topology())
    assert sorted(path.name for path in run.glob(".*")) == [".lease.json.now", ".mine"]


def test_a_line_that_no_run_has_written_does_not_end_a_start(recipe):  # noqa: F811
    made = recipe()
    train.train(made, Topology())
    metrics = Path(made.output_dir) / "metrics.jsonl"
    foreign = [b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"step": "2"}\n', b"[" * 100_000 + b"\n"]
    metrics.write_bytes(b"".join(foreign) + metrics.read_bytes())
    train.train(made, Topology())
    assert all(isinstance(json.loads(line)["step"], int) for line in metrics.read_text().splitlines())
