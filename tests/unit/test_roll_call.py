"""Ranks that wait for each other, of whom one is asked to stop."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distlora.engine.comm import RollCall, Topology
from distlora.errors import Preempted
from tests.e2e.program import free_port


@pytest.mark.parametrize("asked", [0, 1])
def test_one_rank_that_is_asked_to_stop_takes_the_others_with_it(asked):
    """Of three ranks the last never comes; the other two would wait for it for a minute."""
    master, stop = ("127.0.0.1", int(free_port())), threading.Event()

    def meet(rank: int) -> None:
        roll = RollCall(Topology(rank, 3, master=master), 60, stop.is_set if rank == asked else lambda: False)
        stop.set()
        with pytest.raises(Preempted, match="asked to stop"):
            roll.exchange("place", rank)

    with ThreadPoolExecutor(2) as ranks:
        ends = [ranks.submit(meet, rank) for rank in (0, 1)]
        for end in ends:
            end.result(timeout=30)


class Counting:
    """A store that counts the values that are read from it and written to it."""

    def __init__(self, store):
        self._store, self.requests = store, 0

    def __getattr__(self, name):
        def request(*arguments):
            self.requests += name in ("get", "multi_get", "set")
            return getattr(self._store, name)(*arguments)

        return request


@pytest.mark.parametrize("ranks", [2, 12])
def test_what_a_rank_reads_and_writes_does_not_grow_with_their_number(ranks):
    master, here = ("127.0.0.1", int(free_port())), threading.Barrier(ranks)

    def meet(rank: int) -> tuple[dict[int, object], int]:
        roll = RollCall(Topology(rank, ranks, master=master), 60)
        roll.store = store = Counting(roll.store)
        here.wait()
        return roll.exchange("place", {"rank": rank}), store.requests

    with ThreadPoolExecutor(ranks) as together:
        heard, requests = zip(*together.map(meet, range(ranks)))
    assert all(said == {rank: {"rank": rank} for rank in range(ranks)} for said in heard)
    assert requests == (5, *[3] * (ranks - 1))
