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
