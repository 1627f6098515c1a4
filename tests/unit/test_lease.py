"""One start owns a run directory: who may take it over, who is refused, and who stops writing."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distlora.checkpoints.directory import newest
from distlora.cluster import lease as leases
from distlora.cluster.lease import BEAT, LEASE, STALE, is_others, living_owner, take_lease
from distlora.cluster.status import StatusFile, new_start, read_status
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.errors import Preempted, UserError
from distlora.files.ownership import new_owner, owner_of
from distlora.training import train
from distlora.training.monitor import Monitor
from distlora.training.writing import Writing
from tests.e2e.program import call
from tests.unit.test_train import model, recipe  # noqa: F401 (fixtures)

ELSEWHERE = {"host": "node7", "place": "another start of a kernel", "job": ""}
DEAD = {"pid": 2**22 + 1}


def write_lease(run_dir: Path, silent: float = 0.0, **changes) -> None:
    """One that this process has not taken, renewed `silent` seconds ago."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / LEASE).write_text(json.dumps(asdict(new_owner()) | changes))
    heard(run_dir, silent)


def heard(run_dir: Path, silent: float) -> None:
    os.utime(run_dir / LEASE, (time.time() - silent,) * 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_names_its_owner_and_is_gone_afterwards(tmp_path):
    held = take_lease(tmp_path / "a" / "run", "me")
    owner = owner_of(tmp_path / "a" / "run" / LEASE)
    assert (owner.token, owner.pid) == ("me", os.getpid()) and owner.since.endswith("+00:00")
    assert living_owner(tmp_path / "a" / "run") == owner and held.problem(at_once=True) is None
    held.release()
    assert names(tmp_path) == [], "what was made for it is taken away too"


def test_directories_that_were_there_or_hold_something_stay(tmp_path):
    take_lease(tmp_path / "run", "me").release()
    assert names(tmp_path) == []
    (tmp_path / "run").mkdir()
    take_lease(tmp_path / "run", "me").release()
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == []
    held = take_lease(tmp_path / "b" / "run", "me")
    (tmp_path / "b" / "run" / "recipe.yaml").touch()
    held.release()
    assert names(tmp_path / "b" / "run") == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("silent", "owner", "taken"),
    [
        (500, {}, False),  # its process runs
        (0, DEAD, True),
        (0, {"started": 1}, True),  # its number has come again
        (STALE - 5, ELSEWHERE, False),
        (STALE + 5, ELSEWHERE, True),
        (0, ELSEWHERE | DEAD, False),  # its number means nothing here
    ],
)
def test_only_a_living_owner_is_refused(tmp_path, silent, owner, taken):
    write_lease(tmp_path, silent, **owner, since="2026-01-02T03:04:05+00:00")
    assert (living_owner(tmp_path) is None) == taken
    if taken:
        take_lease(tmp_path, "me").release()
        return
    with pytest.raises(UserError) as refused:
        take_lease(tmp_path, "me")
    host = owner.get("host", "")
    assert f"is being written by process {owner.get('pid', os.getpid())} on {host}" in str(refused.value)
    assert "since 2026-01-02T03:04:05+00:00" in str(refused.value)
    assert ("--take-over" in str(refused.value)) == bool(host)
    assert names(tmp_path) == [LEASE]


@pytest.mark.parametrize("silent", [STALE - 5, STALE + 5])
def test_a_process_that_is_hidden_from_this_user_is_judged_by_its_silence(tmp_path, monkeypatch, silent):
    """/proc mounted with hidepid does not show it, and it may get no signals."""

    def refuse(pid, signal):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    write_lease(tmp_path, silent, **DEAD)
    monkeypatch.setattr(os, "kill", refuse)
    if silent > STALE:
        take_lease(tmp_path, "me").release()
        return
    assert living_owner(tmp_path) is not None
    with pytest.raises(UserError, match=r"last heard of .* or give --take-over"):
        take_lease(tmp_path, "me")
    take_lease(tmp_path, "me", take_over=True).release()


def test_take_over_does_not_wait_for_another_host_and_does_not_touch_what_runs_here(tmp_path):
    write_lease(tmp_path, **ELSEWHERE)
    take_lease(tmp_path, "me", take_over=True).release()
    write_lease(tmp_path)
    with pytest.raises(UserError, match="is being written by"):
        take_lease(tmp_path, "me", take_over=True)


@pytest.fixture
def queued_again(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return ELSEWHERE | {"job": "7", "restart": "0"}


def test_a_start_of_the_same_job_waits_for_the_silence_of_the_one_before(tmp_path, queued_again):
    write_lease(tmp_path, **queued_again)
    waited = []

    def pause(seconds):
        waited.append(seconds)
        heard(tmp_path, STALE - 3 + len(waited) * 2)

    take_lease(tmp_path, "me", pause=pause).release()
    assert len(waited) == 2


def test_it_is_refused_where_the_one_before_goes_on(tmp_path, queued_again):
    write_lease(tmp_path, **queued_again)
    waited = []

    def pause(seconds):
        waited.append(seconds)
        heard(tmp_path, [9, 1, 9, 2, 9][len(waited) - 1])

    with pytest.raises(UserError, match="process .* on node7, job 7"):
        take_lease(tmp_path, "me", pause=pause)
    assert len(waited) == 4, "one late sign of life is none"


def test_of_many_starts_at_once_one_gets_it(tmp_path):
    """Each in a process of its own that takes over the same dead owner."""
    write_lease(tmp_path, **DEAD)
    script = (
        "import sys; from pathlib import Path; from distlora.cluster.lease import take_lease\n"
        "from distlora.errors import UserError\n"
        "try: take_lease(Path(sys.argv[1]), sys.argv[2]); print('mine', flush=True); sys.stdin.read()\n"
        "except UserError as error: print(error, flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    starts = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(number)], **pipes)
        for number in range(4)
    ]
    try:
        said = [start.stdout.readline() for start in starts]
    finally:
        for start in starts:
            start.stdin.close()
            start.wait()
            start.stdout.close()
    assert said.count("mine\n") == 1 and sum("is being written by process" in line for line in said) == 3


def test_an_owner_whose_lease_is_gone_writes_nothing_more(tmp_path):
    now = [0.0]
    held = take_lease(tmp_path, "me", clock=lambda: now[0])
    writing = Writing(Comm(Topology(), torch.device("cpu"), distributed=False), held)
    writing.agree()
    write_lease(tmp_path, **ELSEWHERE, pid=12, token="another")
    writing.agree()
    now[0] = BEAT + 1  # it does not look at a file after every step
    with pytest.raises(UserError, match="process 12 on node7 has taken it over.* writes nothing more there"):
        writing.agree()
    assert not writing.is_ours()
    held.release()
    assert owner_of(tmp_path / LEASE).token == "another"


def test_the_lease_is_renewed_by_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.02)
    held = take_lease(tmp_path, "me")
    heard(tmp_path, 50)
    deadline = time.monotonic() + 20
    while time.time() - (tmp_path / LEASE).stat().st_mtime > 30 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert living_owner(tmp_path) is not None and time.time() - (tmp_path / LEASE).stat().st_mtime < 30
    held.release()


# ---------------------------------------------------------------------- the status


def test_an_old_start_that_wakes_up_does_not_overwrite_the_status_of_a_newer_one(tmp_path):
    old = StatusFile(tmp_path, 0, new_start())
    old.write("running")
    new = StatusFile(tmp_path, 0, new_start())
    new.write("running")
    for state in ("running", "failed", "preempted", "done"):
        with pytest.raises(UserError, match="another start has begun there"):
            old.write(state)
    assert read_status(tmp_path).start == json.loads((tmp_path / "status.json").read_text())["start"]
    new.write("done")
    assert read_status(tmp_path).state == "done"


def test_nor_before_that_has_written_one(tmp_path):
    old = StatusFile(tmp_path, 0, new_start())
    old.write("running")
    old.claim()
    write_lease(tmp_path, **ELSEWHERE, token="another")
    with pytest.raises(UserError, match="another start has begun there"):
        old.write("failed", "too late")
    old.release()
    assert is_others(tmp_path, "me") and (tmp_path / ".status.reserve").exists()


@pytest.mark.parametrize(
    ("owner", "said"),
    [({}, "running (process {} on "), (DEAD, "ended without saying why at step 0"), (None, "ended")],
    ids=["living", "dead", "none"],
)
def test_the_status_tells_a_run_that_goes_on_from_one_that_was_killed(tmp_path, owner, said):
    StatusFile(tmp_path, 0, new_start()).write("running")
    if owner is not None:
        write_lease(tmp_path, **owner)
    told = call("status", tmp_path)
    assert told.code == 1 and told.out.startswith(f"{tmp_path}: {said.format(os.getpid())}")


# ---------------------------------------------------------------------- whole runs


def test_a_second_start_is_refused_and_changes_nothing(recipe):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    write_lease(run)
    with pytest.raises(UserError, match="is being written by process"):
        train.train(made, Topology())
    assert names(run) == [LEASE]
    write_lease(run, **DEAD)
    train.train(made, Topology())
    assert LEASE not in names(run)


def test_asked_to_stop_it_waits_no_longer_for_a_silence(recipe, queued_again):  # noqa: F811
    made = recipe()
    write_lease(Path(made.output_dir), **queued_again)
    with pytest.raises(Preempted, match="^asked to stop"):
        train.train(made, Topology(), None, lambda: True)
    assert names(Path(made.output_dir)) == [LEASE]


def test_a_run_that_is_taken_over_ends_at_its_step_and_saves_nothing(recipe, monkeypatch):  # noqa: F811
    made, step, steps = recipe(), LocalEngine.step, []
    run = Path(made.output_dir)

    def taken(self):
        steps.append(1)
        if len(steps) == 2:
            write_lease(run, **ELSEWHERE, pid=12, token="another")
        return step(self)

    monkeypatch.setattr(LocalEngine, "step", taken)
    with pytest.raises(UserError, match="process 12 on node7 has taken it over.*writes nothing more there$"):
        train.train(made, Topology())
    assert newest(run).step == 1 and read_status(run).state == "running"
    assert [name for name in names(run) if name.startswith(".")] == [".status.reserve"], "the newer start's"


def test_a_start_that_wakes_up_writes_no_line_and_no_checkpoint(tmp_path):
    now = [0.0]
    held = take_lease(tmp_path, "me", clock=lambda: now[0])
    comm = Comm(Topology(), torch.device("cpu"), distributed=False)
    writing = Writing(comm, held)
    told = Monitor(SimpleNamespace(comm=comm, write_events=lambda events: None), tmp_path, 0, writing)
    told.write(1, {"train/loss": 1.0})
    write_lease(tmp_path, **ELSEWHERE, token="another")
    now[0] = STALE + 10
    told.write(2, {"train/loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    with pytest.raises(UserError, match="has taken it over"):
        writing.agree()
    held.release()


def test_a_refused_start_leaves_nothing(recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = tmp_path / "deep" / "er"
    with pytest.raises(UserError, match="someone/no-model"):
        train.train(recipe("model.path=someone/no-model", f"output_dir={there}"), Topology())
    assert not (tmp_path / "deep").exists()
