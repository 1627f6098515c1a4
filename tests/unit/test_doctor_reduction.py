"""The all-reduce of the doctor: what outcomes mean, who is missing, and one real run of two processes."""

import os
import socket

import pytest

from distlora.cluster.addresses import free_port
from distlora.doctor import reduction
from distlora.doctor.node import answers
from distlora.engine.comm import RollCall, Topology
from distlora.errors import UserError

RANKS = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}


def outcome(rank: int, **fields) -> dict:
    good = {
        "rank": rank,
        "host": RANKS[rank],
        "stage": "sum",
        "device": "cuda",
        "wrong": 0,
        "seconds": 0.01,
        "bytes": 100_000_000,
    }
    return good | fields


def judged(*outcomes):
    (finding,) = reduction.judge(outcomes, RANKS, "node1:29500")
    return finding


def test_all_is_well():
    finding = judged(*map(outcome, RANKS))
    assert finding.level == "ok" and finding.nodes == ("node1", "node2")
    assert "right on 4 ranks" in finding.found and "15.00 GB/s" in finding.found  # 2 · 3/4 · 100 MB in 10 ms


def test_the_slowest_rank_counts_and_a_slow_network_is_told():
    finding = judged(*map(outcome, (0, 1, 2)), outcome(3, seconds=1.0))
    assert (
        finding.level == "warning" and "0.15 GB/s" in finding.found and "NCCL_SOCKET_IFNAME" in finding.remedy
    )
    within = {0: "node1", 1: "node1"}
    (finding,) = reduction.judge([outcome(0, seconds=1.0), outcome(1)], within, "node1:1")
    assert finding.level == "ok", "within a node there is no interface to choose"


@pytest.mark.parametrize("stage", ["nowhere", None])
def test_who_did_not_come_is_named_with_its_host(stage):
    others = [outcome(rank, stage="master", missing=[2, 3]) for rank in (0, 1)]
    absent = [outcome(rank, stage=stage, error="cannot reach the master") for rank in (2, 3)] if stage else []
    finding = judged(*others, *absent)
    assert finding.level == "failure" and finding.nodes == ("node2",) and "node1:29500" in finding.remedy
    assert finding.found.startswith("ranks 2, 3 on node2 did not come to node1:29500")
    assert ("(cannot reach the master)" in finding.found) == bool(stage)


def test_ranks_that_reach_the_master_but_not_each_other():
    finding = judged(
        outcome(0),
        outcome(1),
        outcome(2, stage="master", error="connect timed out"),
        outcome(3, stage="group"),
    )
    assert (
        finding.level == "failure"
        and "ranks 2, 3 on node2 reached the master, but not the other ranks" in finding.found
    )
    assert "connect timed out" in finding.found and "GLOO_SOCKET_IFNAME" in finding.remedy


def test_a_wrong_sum():
    finding = judged(outcome(0), outcome(1), outcome(2, wrong=7), outcome(3))
    assert finding.level == "failure" and "the sum is wrong on rank 2 on node2" in finding.found


# ---------------------------------------------------------------------- the roll call


@pytest.fixture
def master() -> tuple[str, int]:
    return "127.0.0.1", free_port()


def test_the_roll_is_called_and_the_missing_do_not_hold_it_up(master):
    roll = RollCall(Topology(0, 3, master=master), seconds=0.3)
    assert roll.exchange("presence", {"host": "a"}) == {0: {"host": "a"}}
    assert roll.exchange("more", 1, seconds=1000) == {0: 1}, "who was missing is not waited for again"
    seen = []
    found = reduction.reduce_once(
        Topology(0, 1, master=master), reduction.device_of(0), 5, lambda outcome: seen.append(dict(outcome))
    )
    assert found["stage"] == "nowhere" and "cannot listen on the master" in found["error"], (
        "the port is taken by now"
    )
    assert [outcome["stage"] for outcome in seen] == ["nowhere", "nowhere"]


def test_a_master_that_cannot_be_reached_is_named(master):
    with pytest.raises(
        UserError, match=rf"^rank 1 on \S+ cannot reach the master 127.0.0.1:{master[1]} \([^\n]*\)$"
    ):
        RollCall(Topology(1, 2, master=master), seconds=0.2)


def test_missing_ranks_end_the_attempt(master):
    found = reduction.reduce_once(
        Topology(0, 2, master=master), reduction.device_of(0), 0.3, lambda outcome: None
    )
    assert (found["stage"], found["missing"]) == ("master", [1]) and "wrong" not in found


def test_two_real_ranks(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    request = {"first": 0, "count": 2, "world": 2, "master": "127.0.0.1", "port": free_port(), "limit": 60}
    before = dict(os.environ)
    outcomes = [value for line in reduction.run_ranks(request) for value in answers(line)]
    assert os.environ == before
    assert {(found["rank"], found["stage"], found["wrong"]) for found in outcomes} == {
        (0, "sum", 0),
        (1, "sum", 0),
    }, outcomes
    (finding,) = reduction.judge(outcomes, dict.fromkeys((0, 1), socket.gethostname()), "here")
    assert finding.level == "ok" and "right on 2 ranks" in finding.found
