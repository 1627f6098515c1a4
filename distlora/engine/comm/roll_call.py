"""Before there is a process group: every rank says that it is there, so that the missing can be named."""

import datetime
import functools
import json
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from distlora.engine.comm.group import STOPPED, Topology
from distlora.errors import Preempted, TrainingError, UserError
from distlora.sentences import first_line

#: At the master: that a rank was asked to stop and will not come.
_LEFT = "left"
#: Seconds that rank 0 then stays, so that the others hear of it: they ask once a second.
_FAREWELL = 3.0
#: Seconds for which rank 0 waits until the others have read that one of them does not come.
REFUSAL_LINGER = 5.0


class RollCall:
    """Every rank says something at the master before a group is made, so that those who do not come can be
    named. Where one of them is asked to stop meanwhile, nobody waits any longer.
    """

    def __init__(self, topology: Topology, seconds: float, asked_to_stop: Callable[[], bool] = lambda: False):
        """Meets at the topology's master. seconds: how long a silent rank is waited for. asked_to_stop:
        whether this rank should wait no longer: it and all others then raise Preempted.

        Errors: UserError where the master cannot be reached, or its port cannot be listened on.
        """
        self._rank, self._seconds, self._asked_to_stop = topology.rank, seconds, asked_to_stop
        self._expected = list(range(topology.world_size))
        address, port = topology.master
        listens = topology.rank == 0 and topology.rank_0_listens
        # A launcher's store outlives the ranks: what those of an earlier attempt have said there is not
        # meant.
        self._prefix = f"attempt-{topology.attempt}"
        patience = datetime.timedelta(seconds=seconds)
        self._connect = functools.partial(
            dist.TCPStore, address, port, topology.world_size, timeout=patience, wait_for_workers=False
        )
        if listens:
            _allow_open_files(3 * topology.world_size + 1024)
        try:
            self.store = dist.PrefixStore(self._prefix, self._connect(is_master=listens))
        except dist.DistError as error:
            what = "cannot listen on" if listens else "cannot reach"
            reason = first_line(error).split(". ")[0]
            where = f"rank {topology.rank} on {socket.gethostname()}"
            raise UserError(f"{where} {what} the master {address}:{port} ({reason})") from error

    def exchange(self, topic: str, value: Any, seconds: float | None = None) -> dict[int, Any]:
        """The JSON-able values of all who came in time, by rank, on every rank that came. Each topic can be
        exchanged once. Who was missing once is not waited for again.

        seconds: how long a silent rank is waited for, where that is not the usual. Errors: TrainingError on a
        rank that has lost the master; on all ranks, what one of them has said by `refuse`.
        """
        seconds = seconds or self._seconds
        try:
            self.store.set(f"{topic}/{self._rank}", json.dumps(value))
            if self._rank == 0:
                self._expected = self._await(topic, self._expected, seconds)
                # One value for all: with every rank reading every other's, the requests grow as the square.
                said = self.store.multi_get([f"{topic}/{rank}" for rank in self._expected])
                came = {rank: json.loads(text) for rank, text in zip(self._expected, said)}
                self.store.set(f"{topic}/came", json.dumps(list(came.items())))
            # The master may have waited for somebody until its last second.
            self._wait(f"{topic}/came", 2 * seconds)
            values = dict(json.loads(self.store.get(f"{topic}/came")))
            self.store.set(f"{topic}/read/{self._rank}", "")
            if self._rank == 0:
                self._await(
                    f"{topic}/read", values, self._seconds
                )  # if this process ends next, the store ends with it
            return values
        except dist.DistError as error:
            raise self._lost("has lost the master") from error

    def refuse(self, sentence: str, mistake: bool) -> bool:
        """Instead of an exchange: says why this rank does not come, and waits until all have read it, or as
        long as this object waits for a silent rank. mistake: of the user, see `_end_if_refused`.

        Returns whether rank 0 has read it, or does not come either.
        """
        try:
            if not self.store.check(["refused"]):
                said = f"rank {self._rank} on {socket.gethostname()}: {sentence}"
                self.store.set("refused", json.dumps([said, mistake]))
            self.store.set(f"refused/read/{self._rank}", "")
            readers = self._expected if self._rank == 0 else [0]
            return 0 in self._await("refused/read", readers, self._seconds, refusable=False)
        except dist.DistError:
            return False

    def _end_if_refused(self) -> None:
        """Raises on every rank what one of them has refused with, a UserError or a TrainingError."""
        if not self.store.check(["refused"]):
            return
        sentence, mistake = json.loads(self.store.get("refused"))
        self.store.set(f"refused/read/{self._rank}", "")
        if self._rank == 0:  # the store may end with this process
            self._await("refused/read", self._expected, REFUSAL_LINGER, refusable=False)
        raise (UserError if mistake else TrainingError)(sentence, agreed=True)

    def board(self) -> "StoreBoard":
        """Where ranks write down what others may read, by a connection of its own: it can be used from
        another thread.
        """
        try:
            return StoreBoard(dist.PrefixStore(f"{self._prefix}/board", self._connect(is_master=False)))
        except dist.DistError as error:
            raise self._lost("reaches the master once, but not again") from error

    def _lost(self, what: str) -> TrainingError:
        return TrainingError(f"rank {self._rank} on {socket.gethostname()} {what}", agreed=False)

    def _wait(self, name: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.store.wait([name], datetime.timedelta(seconds=1))
                return
            except dist.DistStoreError:  # not yet there
                self._end_if_refused()
                self._leave_if_asked()
                if time.monotonic() > deadline:
                    raise

    def _await(self, topic: str, ranks: Iterable[int], seconds: float, refusable: bool = True) -> list[int]:
        """Those of the ranks that have spoken in time. refusable: a rank may have refused to."""
        deadline = time.monotonic() + seconds
        names = {rank: f"{topic}/{rank}" for rank in ranks}
        if not names:
            return []
        # One question about all of them; who is missing is asked for only when the time is over.
        while not self.store.check(list(names.values())):
            if refusable:
                self._end_if_refused()
            self._leave_if_asked()
            if time.monotonic() > deadline:
                return sorted(rank for rank, name in names.items() if self.store.check([name]))
            time.sleep(0.02)
        return sorted(names)

    def _leave_if_asked(self) -> None:
        """Raises Preempted where this rank, or another one that has come, was asked to stop."""
        is_asked = self._asked_to_stop()
        if not is_asked and not self.store.check([_LEFT]):
            return
        if is_asked:
            self.store.set(_LEFT, "")
        if self._rank == 0:  # the store ends with it
            time.sleep(_FAREWELL)
        raise Preempted(STOPPED)


class StoreBoard:
    """See `distlora.cluster.heartbeat.Board`."""

    def __init__(self, store: dist.Store):
        self._store = store
        self._there: set[str] = set()  # nothing is ever taken off

    def write(self, name: str, text: str) -> None:
        with _lost_connection():
            self._store.set(name, text)

    def read(self, names: Iterable[str]) -> list[str | None]:
        names = list(names)
        with _lost_connection():
            self._there |= {name for name in names if name not in self._there and self._store.check([name])}
            found = [name for name in names if name in self._there]
            texts = dict(zip(found, self._store.multi_get(found) if found else []))
        return [texts[name].decode() if name in texts else None for name in names]


def _allow_open_files(wanted: int) -> None:
    """Every rank has two connections to rank 0; many systems allow 1024 files unless one asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


@contextmanager
def _lost_connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # every failure of torch.distributed
        raise ConnectionError(first_line(error)) from error
