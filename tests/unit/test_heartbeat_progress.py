"""Ranks that all beat: one of them fails, or none of them gets anywhere."""

import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from distlora.cluster.heartbeat import Heartbeat, heart_interval
from distlora.cluster.progress import Report
from tests.unit.test_heartbeat import HOSTS, INTERVAL, PATIENCE, Board

MOVING = Report("training", step=4, begun=9, ended=8, met=30, waits=True, still=0.0)


class Company:
    """Four ranks around a board. verdicts: rank -> its verdict. reports: what each tells of itself; may be
    changed while they run.
    """

    def __init__(self, stack: ExitStack, limit: float | None = PATIENCE, patience: float = 600.0):
        self.board, self.verdicts, self.reports = Board(), {}, dict.fromkeys(range(len(HOSTS)), MOVING)
        link = threading.Event()
        link.set()

        def heart(rank: int) -> Heartbeat:
            return Heartbeat(
                self.board.seen_by(link), rank, HOSTS, limit,
                lambda verdict, alone: self.verdicts.update({rank: verdict}), INTERVAL,
                look=lambda now: self.reports[rank], patience=patience,
            )  # fmt: skip

        self.hearts = [heart(rank) for rank in range(len(HOSTS))]
        for heart in self.hearts:
            heart.start()
            stack.callback(heart.stop)
        self.wait_until(lambda: len(self.board.texts) >= len(HOSTS))

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.verdicts
            time.sleep(INTERVAL / 4)


def everybody(report: Report) -> dict[int, Report]:
    return dict.fromkeys(range(len(HOSTS)), report)


def test_a_halt_ends_all_with_one_sentence_and_another_start_may_succeed():
    with ExitStack() as stack:
        company = Company(stack, limit=30.0)
        company.reports = everybody(replace(MOVING, still=40.0)) | {3: replace(MOVING, still=40.0, met=29)}
        company.wait_until(lambda: len(company.verdicts) == len(HOSTS))
        (verdict,) = set(company.verdicts.values())
    assert verdict.silent and verdict.code == 1
    assert verdict.sentence.startswith(
        "nothing has moved on any rank for 40 s in training after step 4: rank 3 on node2 is behind"
    )


@pytest.mark.parametrize(
    ("limit", "reports"),
    [
        (30.0, everybody(replace(MOVING, still=40.0)) | {2: MOVING}),
        (30.0, everybody(replace(MOVING, still=40.0, waits=False))),
        (30.0, everybody(replace(MOVING, still=40.0, patient=True))),
        (30.0, everybody(replace(MOVING, still=29.0))),
        (None, everybody(replace(MOVING, still=1e6))),
    ],
    ids=["one moves", "nobody waits", "a patient phase", "not yet", "no limit"],
)
def test_a_run_that_may_get_somewhere_goes_on(limit, reports):
    with ExitStack() as stack:
        company = Company(stack, limit)
        company.reports = reports
        time.sleep(10 * INTERVAL)
        assert company.verdicts == {}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("limit", [PATIENCE, None])
def test_who_fails_ends_the_others_with_its_exit_code(rank, limit):
    """Also where silence has no limit. Whoever has failed knows that rank 0 has heard of it."""
    with ExitStack() as stack:
        company = Company(stack, limit)
        assert company.hearts[rank].explain("model.path=m: it is not there", 2)
        company.wait_until(lambda: len(company.verdicts) == len(HOSTS) - 1)
        assert rank not in company.verdicts
        (verdict,) = set(company.verdicts.values())
    assert (verdict.code, verdict.silent) == (2, False)
    assert verdict.sentence == f"rank {rank} on {HOSTS[rank]} has ended: model.path=m: it is not there"


def test_where_all_fail_alike_each_ends_by_itself():
    with ExitStack() as stack:
        company = Company(stack)
        threads = [threading.Thread(target=heart.explain, args=["no weights", 2]) for heart in company.hearts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert company.verdicts == {}


def test_nobody_hears_of_a_failure_once_rank_0_is_gone():
    with ExitStack() as stack:
        company = Company(stack)
        company.board.refused = True
        assert not company.hearts[1].explain("no weights", 2)


@pytest.mark.parametrize(("limit", "seconds"), [(None, 2.0), (600.0, 2.0), (6.0, 0.6), (0.5, 0.2)])
def test_beats_are_a_tenth_of_the_limit_apart(limit, seconds):
    assert heart_interval(limit) == pytest.approx(seconds)
