"""How a process ends whose company has gone: in time, whatever the file system does, and with one voice."""

import threading

import pytest
import torch

from distlora.cluster import supervision
from distlora.cluster.heartbeat import Verdict
from distlora.cluster.status import StatusFile, new_start, read_status
from distlora.cluster.supervision import Supervision
from distlora.engine.comm import Topology
from distlora.errors import UserError

SILENT = Verdict("rank 3 on node2 went silent for 9 s", silent=True)


class Ended(BaseException):
    """In place of the end of the process."""


class Heart:
    reading_time = 0.0


@pytest.fixture
def end(tmp_path, monkeypatch, caplog):
    """Ends a rank of four on two nodes; returns the sentences that it says on the terminal."""

    def leave(code):
        assert code == 1
        raise Ended

    monkeypatch.setattr(supervision.os, "_exit", leave)
    monkeypatch.setattr(supervision, "EXIT_DELAY", 0.0)
    monkeypatch.setattr(supervision.threading, "Timer", lambda *_: threading.Thread())

    def finish(rank: int, alone: bool, status: StatusFile | None, verdict: Verdict = SILENT) -> list[str]:
        caplog.clear()
        company = Supervision(Topology(rank, 4, rank % 2), 9.0)
        company._hosts, company._heartbeat, company._status = (
            ["node1", "node1", "node2", "node2"],
            Heart(),
            status,
        )
        with pytest.raises(Ended):
            company._end(verdict, alone)
        return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]

    return finish


@pytest.fixture
def status(tmp_path) -> StatusFile:
    file = StatusFile(tmp_path, 4, new_start())
    file.write("running")
    return file


def test_rank_0_speaks_for_all(end, status, tmp_path):
    assert end(1, False, status) == [] and read_status(tmp_path).state == "running"
    assert end(0, False, status) == [f"distlora: {SILENT.sentence}"]
    told = read_status(tmp_path)
    assert (told.state, told.requeue, told.message, told.code) == ("failed", True, SILENT.sentence, 75)


def test_a_rank_that_failed_by_itself_is_not_to_be_started_again(end, status, tmp_path):
    end(0, False, status, Verdict("rank 3 on node2 has ended: MemoryError", silent=False))
    assert not read_status(tmp_path).requeue


def test_without_rank_0_one_rank_of_each_host_speaks(end, status, tmp_path):
    assert [len(end(rank, True, status)) for rank in (1, 2, 3)] == [1, 1, 0]
    assert read_status(tmp_path).state == "failed"


@pytest.mark.parametrize("state", ["done", "preempted"])
def test_a_rank_alone_does_not_contradict_rank_0(end, status, tmp_path, state):
    status.write(state)
    assert len(end(2, True, status)) == 1
    assert read_status(tmp_path).state == state


@pytest.mark.parametrize("alone", [True, False])
def test_it_ends_whatever_the_file_system_does(end, tmp_path, alone):
    status = StatusFile(tmp_path / "gone", 0, new_start())
    rank = 2 if alone else 0
    assert end(rank, alone, status)[0].endswith(SILENT.sentence)
    (tmp_path / "gone").write_text("a file where the run directory was")
    assert end(rank, alone, status)[0].endswith(SILENT.sentence)


def test_ranks_that_share_a_gpu_are_told_so_before_nccl_fails():
    on_cpus = {3: ("node2", None, 0), 4: ("node2", None, 0)}
    supervision.refuse_shared_gpus(
        {0: ("node1", "a", 2), 1: ("node1", "b", 2), 2: ("node2", "a", 1)} | on_cpus
    )
    with pytest.raises(UserError) as refused:
        supervision.refuse_shared_gpus(
            {rank: ["node2" if rank > 1 else "node1", "ab"[rank % 2], 2] for rank in range(6)}
        )
    assert str(refused.value).startswith(
        "2 ranks on node2 share the GPU a: 2, 4; start one rank a GPU, here 2 (slots in "
    )
    assert refused.value.agreed, "every rank knows, and one of them says it"


def test_ranks_look_at_each_others_gpus_before_there_is_a_group(monkeypatch):
    class Roll:
        def exchange(self, topic, place):
            return dict.fromkeys(range(2), [place[0], "a", 1])

    company = Supervision(Topology(0, 2), 9.0)
    monkeypatch.setattr(company, "_meet", lambda asked_to_stop: Roll())
    with pytest.raises(UserError, match="^2 ranks on .* share the GPU a: 0, 1;"):
        company.gather(torch.device("cpu"), True)


def test_before_there_is_a_directory_it_only_speaks(end):
    assert end(0, False, None) == [f"distlora: {SILENT.sentence}"]
