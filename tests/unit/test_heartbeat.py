"""Ranks that watch each other, played by threads around a board in memory."""

import threading
import time
from contextlib import ExitStack

import pytest

from distlora.cluster.heartbeat import Heartbeat

HOSTS = ["node1", "node1", "node2", "node2"]
INTERVAL, PATIENCE = 0.02, 0.3
#: How much slower that is where a living rank's thread must not run too late, on a loaded machine either.
UNHURRIED = 6


class Board:
    """What all ranks write to; cut off from it, a rank hangs as behind a cut link, or is refused."""

    def __init__(self):
        self.texts: dict[str, str] = {}
        self.refused = False

    def seen_by(self, link: threading.Event) -> "Seen":
        return Seen(self, link)


class Seen:
    def __init__(self, board: Board, link: threading.Event):
        self._board, self._link = board, link

    def _pass(self) -> None:
        self._link.wait()
        if self._board.refused:
            raise ConnectionError("refused")

    def write(self, name, text):
        self._pass()
        self._board.texts[name] = text

    def read(self, names):
        self._pass()
        return [self._board.texts.get(name) for name in names]


class Ranks:
    """Four ranks with their heartbeats. verdicts: rank -> (its verdict, whether it judged alone)."""

    def __init__(self, stack: ExitStack, slower: int = 1):
        """slower: how many times the usual seconds all takes."""
        self.board, self.verdicts, self.hurried = Board(), {}, False
        self.interval, self.patience = INTERVAL * slower, PATIENCE * slower
        self.links = [threading.Event() for _ in HOSTS]
        for link in self.links:
            link.set()
        self.hearts = [self._heart(rank) for rank in range(len(HOSTS))]
        for heart in self.hearts:
            heart.start()
            stack.callback(heart.stop)
        stack.callback(lambda: [link.set() for link in self.links])
        self.wait_until(lambda: len(self.board.texts) >= len(HOSTS))

    def _heart(self, rank: int) -> Heartbeat:
        def end(verdict, alone):
            self.verdicts[rank] = verdict, alone

        board, hurried = self.board.seen_by(self.links[rank]), lambda: self.hurried
        return Heartbeat(board, rank, HOSTS, self.patience, end, self.interval, hurried)

    def cut(self, *ranks: int) -> None:
        for rank in ranks:
            self.links[rank].clear()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.verdicts
            time.sleep(INTERVAL / 4)

    def wait_for_verdicts(self, *ranks: int) -> dict:
        self.wait_until(lambda: set(self.verdicts) >= set(ranks))
        return {rank: verdict.sentence for rank, (verdict, _) in self.verdicts.items()}


@pytest.fixture
def ranks():
    with ExitStack() as stack:
        yield Ranks(stack)


def at_some_pace(scene) -> bool:
    """Whether `scene(ranks)` is true. On a loaded machine a living rank's thread may run too late to be
    called alive: then once more, slower; what is wrong with the program does not depend on the pace."""
    for slower in (1, UNHURRIED, UNHURRIED**2):
        with ExitStack() as stack:
            if scene(Ranks(stack, slower)):
                return True
    return False


def test_those_who_beat_are_left_alone():
    with ExitStack() as stack:
        ranks = Ranks(stack, UNHURRIED)
        time.sleep(2 * ranks.patience)
        assert ranks.verdicts == {}


def test_a_cut_off_host_is_named_to_all_and_names_rank_0_itself():
    def scene(ranks):
        ranks.cut(2, 3)
        said = ranks.wait_for_verdicts(0, 1, 2, 3)
        return (
            said[0] == said[1]
            and said[0].startswith("ranks 2, 3 on node2 went silent for ")
            and said[2].startswith("rank 0 on node1 went silent")
            and [ranks.verdicts[rank][1] for rank in range(4)] == [False, False, True, True]
            and all(verdict.silent for verdict, _ in ranks.verdicts.values())
        )

    assert at_some_pace(scene)


def test_rank_0_is_missed_though_its_launcher_keeps_the_board(ranks):
    ranks.cut(0)
    said = ranks.wait_for_verdicts(1, 2, 3)
    assert all(sentence.startswith("rank 0 on node1 went silent") for sentence in said.values())
    assert 0 not in ranks.verdicts


def test_a_board_that_refuses_means_that_rank_0_has_ended(ranks):
    ranks.board.refused = True
    said = ranks.wait_for_verdicts(1, 2, 3)
    assert set(said) == {1, 2, 3} and "rank 0 on node1 has ended without saying why" in said[1]


def test_at_the_end_of_a_run_a_board_that_is_gone_means_nothing(ranks):
    ranks.board.refused = True
    for heart in ranks.hearts:
        heart.stop()
    time.sleep(10 * INTERVAL)
    assert ranks.verdicts == {}


@pytest.mark.parametrize("broken", [0, 2])
def test_who_fails_says_so_and_the_others_need_not_wait(ranks, broken):
    ranks.hearts[broken].explain("OutOfMemoryError: CUDA out of memory")
    ranks.hearts[broken].stop()
    others = {0, 1, 2, 3} - {broken}
    said = ranks.wait_for_verdicts(*others)
    assert set(said) == others
    assert set(said.values()) == {
        f"rank {broken} on {HOSTS[broken]} has ended: OutOfMemoryError: CUDA out of memory"
    }
    assert not any(verdict.silent for verdict, _ in ranks.verdicts.values())


def test_a_broken_collective_makes_a_silent_rank_found_sooner():
    def scene(patient):
        for heart in patient.hearts:
            heart._patience = 600
        patient.cut(3)
        threading.Thread(target=patient.hearts[1].explain, args=[None], daemon=True).start()
        return patient.wait_for_verdicts(0, 1, 2)[2].startswith("rank 3 on node2 went silent")

    assert at_some_pace(scene)


def test_who_was_asked_to_stop_has_no_time_to_be_patient():
    """A launcher that has lost a rank asks the others to stop, and kills them half a minute later."""

    def scene(patient):
        for heart in patient.hearts:
            heart._patience = 600
        patient.cut(3)
        patient.hurried = True
        return patient.wait_for_verdicts(0, 1, 2)[1].startswith("rank 3 on node2 went silent")

    assert at_some_pace(scene)


def test_a_broken_collective_among_the_living_is_explained_by_nobody():
    with ExitStack() as stack:
        ranks = Ranks(stack, UNHURRIED)
        thread = threading.Thread(target=ranks.hearts[1].explain, args=[None], daemon=True)
        thread.start()
        ranks.wait_until(
            lambda: ranks.verdicts or not thread.is_alive()
        )  # of a rank that is condemned it never ends
        assert ranks.verdicts == {}
