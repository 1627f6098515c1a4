"""The ranks of a run together: how they meet, what is done about one that goes silent, and what is told about
the end.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import torch

from distlora.cluster.heartbeat import Heartbeat, Verdict
from distlora.cluster.status import StatusFile
from distlora.cluster.topology import publish
from distlora.engine.comm import Comm, RollCall, Topology, is_broken_collective
from distlora.errors import Ending, Preempted, TrainingError, UserError

#: Seconds that ranks wait for each other at the start at least: one may read its libraries from a slow file
#: system.
LATECOMERS = 600.0
#: Seconds that ranks without a word of their own let the others speak first: launchers end all as soon as one
#: has ended.
COURTESY = 1.0
#: Seconds for what is written at a sudden end.
LAST_WORDS = 15.0

log = logging.getLogger(__name__)


class Supervision:
    """A context manager around all that the ranks of one run do together.

    With `hang_timeout` this process is ended (exit code 1) where another one goes silent for so many seconds:
    a main thread that waits in a collective cannot be told otherwise.
    """

    def __init__(self, topology: Topology, hang_timeout: float | None):
        self._topology, self._hang_timeout = topology, hang_timeout
        self._comm: Comm | None = None
        self._hosts: list[str] = []
        self._heartbeat: Heartbeat | None = None
        self._status: StatusFile | None = None

    def __enter__(self) -> "Supervision":
        return self

    def gather(
        self, device: torch.device, distributed: bool, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> Comm:
        """The process group, once all ranks have come. See `Comm`. Errors: TrainingError, naming those that
        have not; UserError where the master cannot be reached, or ranks share a GPU."""
        for note in self._topology.notes:
            log.info("%s", note)
        if not distributed or self._topology.world_size == 1:
            self._comm = Comm(self._topology, device, distributed=distributed, asked_to_stop=asked_to_stop)
            publish(self._topology, device, self._comm.master)
            return self._comm
        roll = self._meet(asked_to_stop)
        places = roll.exchange("place", [socket.gethostname(), *_gpu(device)])
        hosts = {rank: host for rank, (host, *_) in places.items()}
        if len(hosts) < self._topology.world_size:
            raise TrainingError(_missing(hosts, self._topology.world_size))
        refuse_shared_gpus(places)
        self._comm = Comm(self._topology, device, roll=roll, asked_to_stop=asked_to_stop)
        publish(self._topology, device, self._comm.master)
        if self._hang_timeout:
            self._hosts = [hosts[rank] for rank in range(len(hosts))]
            self._heartbeat = Heartbeat(
                roll.board(),
                self._topology.rank,
                self._hosts,
                self._hang_timeout,
                self._end,
                hurried=asked_to_stop,
            )
            self._heartbeat.start()
        return self._comm

    def _meet(self, asked_to_stop: Callable[[], bool]) -> RollCall:
        try:
            return RollCall(self._topology, max(LATECOMERS, self._hang_timeout or 0), asked_to_stop)
        except UserError as error:
            remedy = "MASTER_ADDR must name rank 0's host in a network that all nodes share, and MASTER_PORT a free port there"
            raise UserError(f"{error}; {remedy}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        agreed = error is None or (isinstance(error, Ending) and error.agreed)
        if self._heartbeat is not None:
            if not agreed:
                self._heartbeat.explain(None if is_broken_collective(error) else _sentence(error))
            self._heartbeat.stop()
        if agreed and self._comm is not None:
            self._comm.close()

    @contextlib.contextmanager
    def telling(self, status: StatusFile) -> Iterator[None]:
        """Inside, the run is under way; what becomes of it is told in its status file. Rank 0 writes.

        A start that is refused leaves nothing in a new directory; in an old one it replaces the outcome of
        the start before.
        """
        self._status = status
        if status.begun:
            self._tell("running")
        try:
            yield
        except Preempted as error:
            self._tell("preempted", str(error), requeue=True)
            self._comm.barrier()  # launchers kill the last soon after the first has ended, and rank 0 must have written
            raise
        except BaseException as error:
            if status.begun:
                self._tell("failed", _sentence(error), requeue=is_broken_collective(error))
            raise
        self._tell("done")

    def _tell(self, *what: str, requeue: bool = False) -> None:
        if self._topology.rank == 0:
            self._write_status(*what, requeue=requeue)

    def _write_status(self, *what: str, requeue: bool) -> None:
        try:
            self._status.write(*what, requeue=requeue)
        except OSError as error:  # a full disk must not hide what ends the run
            log.error("the run's status cannot be written: %s", error)

    def _end(self, verdict: Verdict, alone: bool) -> None:
        """Ends this process from the heartbeat's thread. alone: rank 0 cannot be reached, and so cannot
        speak.
        """
        # What is left to do waits for a file system that may have gone with the silent host.
        deadline = threading.Timer(LAST_WORDS, os._exit, [1])
        deadline.daemon = True
        deadline.start()
        try:
            self._last_words(verdict, alone)
        finally:
            os._exit(1)

    def _last_words(self, verdict: Verdict, alone: bool) -> None:
        rank = self._topology.rank
        host = self._hosts[rank]
        speaks = rank == (
            1 + self._hosts[1:].index(host) if alone else 0
        )  # if rank 0 cannot, one on every host
        who = "distlora" if rank == 0 else f"distlora (rank {rank} on {host})"
        log.log(logging.ERROR if speaks else logging.INFO, "%s: %s", who, verdict.sentence)
        if speaks and self._status is not None and (rank == 0 or self._status.is_open()):
            self._write_status("failed", verdict.sentence, requeue=verdict.silent)
        time.sleep(self._heartbeat.reading_time if rank == 0 else COURTESY)


def _sentence(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, Ending):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _gpu(device: torch.device) -> tuple[str | None, int]:
    """What tells this rank's GPU from all others, None for a CPU; and how many GPUs the rank sees."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return uuid and str(uuid), torch.cuda.device_count()


def refuse_shared_gpus(places: Mapping[int, tuple[str, str | None, int]]) -> None:
    """places: rank -> its host, its GPU, and how many of those it sees. Raises UserError where two ranks have
    the same GPU: NCCL would only fail, in words of its own."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, (host, gpu, _) in sorted(places.items()):
        if gpu is not None:
            users.setdefault((host, gpu), []).append(rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1:
            raise UserError(
                f"{len(ranks)} ranks on {host} share the GPU {gpu}: {', '.join(map(str, ranks))}; start one rank a GPU, here "
                f"{places[ranks[0]][2]} (slots in the hostfile, torchrun --nproc-per-node, sbatch --gpus-per-node), each with its "
                "own LOCAL_RANK if the launcher sets none",
                agreed=True,
            )


def _missing(hosts: dict[int, str], world_size: int) -> str:
    absent = ", ".join(str(rank) for rank in range(world_size) if rank not in hosts)
    there = ", ".join(sorted(set(hosts.values())))
    return (
        f"{world_size - len(hosts)} of {world_size} ranks have not come ({absent}; those of {there} have): look at the output of "
        "the missing ones, or ask distlora doctor"
    )
