"""A rank that fails before the ranks have met, played by threads and real stores."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from distlora.cluster import early
from distlora.engine.comm import RollCall, Topology
from distlora.errors import TrainingError, UserError
from tests.e2e.program import free_port

WORLD = 3


def played(*parts, late: float = 0.0) -> list:
    """What the ranks end with. parts: by rank, the error of one that fails, or None of one that comes to
    meet. late: seconds by which all but rank 0 come after it.
    """
    master = ("127.0.0.1", int(free_port()))

    def play(rank: int):
        topology = Topology(rank, WORLD, rank, master=master)
        if rank:
            time.sleep(late)
        try:
            with early.failure_told(topology):
                if parts[rank] is not None:
                    raise parts[rank]
            return RollCall(topology, 20.0).exchange("place", rank)
        except Exception as error:
            if getattr(error, "parting", None) is not None:
                error.heard = error.parting()
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(play, range(WORLD)))


@pytest.mark.parametrize("late", [0.0, 0.5])
@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_mistake_on_one_rank_ends_all_with_its_sentence(failed, late):
    began = time.monotonic()
    parts = [UserError("model.path=m: it is not there") if rank == failed else None for rank in range(WORLD)]
    ends = played(*parts, late=late)
    assert time.monotonic() - began < 10
    assert ends[failed] is parts[failed] and ends[failed].heard
    for rank in {0, 1, 2} - {failed}:
        assert type(ends[rank]) is UserError and ends[rank].agreed
        assert str(ends[rank]).startswith(f"rank {failed} on ")
        assert str(ends[rank]).endswith(": model.path=m: it is not there")


def test_a_crash_on_one_rank_ends_the_others_as_a_failure():
    ends = played(None, MemoryError("too little"), None)
    assert type(ends[1]) is MemoryError
    for rank in (0, 2):
        assert type(ends[rank]) is TrainingError and str(ends[rank]).endswith(": MemoryError: too little")


def test_where_all_make_the_same_mistake_each_keeps_its_own():
    began = time.monotonic()
    parts = [UserError("no such key") for _ in range(WORLD)]
    assert played(*parts) == parts and all(part.heard for part in parts)
    assert time.monotonic() - began < 10


def test_who_makes_no_mistake_meets():
    assert played(None, None, None) == [{0: 0, 1: 1, 2: 2}] * WORLD


def test_one_process_tells_nobody():
    with pytest.raises(UserError) as raised, early.failure_told(Topology()):
        raise UserError("no such key")
    assert raised.value.parting is None
