"""The ranks of a run together: how they meet, what happens if one goes silent, and what is written about the
end.
"""

import contextlib
import datetime
import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch

from distlora.cluster.heartbeat import Heartbeat, Verdict, heart_interval
from distlora.cluster.lease import Lease
from distlora.cluster.progress import Movement
from distlora.cluster.status import State, StatusFile
from distlora.cluster.topology import publish
from distlora.engine.comm import Comm, RollCall, Topology, is_broken_collective
from distlora.errors import Ending, Preempted, TrainingError, UserError
from distlora.sentences import first_line

#: Seconds that ranks wait for each other at the start, at least. One may read its libraries from a slow file
#: system.
START_TIMEOUT = 600.0
#: Seconds that ranks other than 0 wait before they end. Launchers end all ranks as soon as one has ended, so
#: the rank that speaks must come first.
EXIT_DELAY = 1.0
#: Seconds, for each minute that a collective waits, in which a rank may wait for something outside of the
#: run: fewer, so that the run ends with a sentence and not with the error of a collective.
PATIENCE = 54.0
#: Seconds within which log and status must be written before a sudden end.
EXIT_LIMIT = 15.0
#: Exit code for a mistake of the user.
USER_ERROR = 2
#: The file of a rank's stacks, by its number.
STACKS = "stacks-rank-{}.txt"

log = logging.getLogger(__name__)


class Supervision:
    """A context manager around all that the ranks of one run do together.

    If another rank fails, this process is ended within seconds, with the exit code of that failure: there is
    no other way to stop a main thread that waits in a collective. It is ended with exit code 1 if another
    rank is silent for `hang_timeout` seconds, or if nothing moves on any rank for so long; None turns these
    two off.
    """

    def __init__(self, topology: Topology, hang_timeout: float | None, logs: Path | None = None):
        """logs: the folder for what every rank was doing when one of them, or a link, went silent."""
        self._topology, self._hang_timeout, self._logs = topology, hang_timeout, logs
        self._comm: Comm | None = None
        self._hosts: list[str] = []
        self._heartbeat: Heartbeat | None = None
        self._status: StatusFile | None = None
        #: Set once the heartbeat's thread ends this process: it says why, whatever the main thread meets.
        self._ending = threading.Event()
        self._lease: Lease | None = None

    def __enter__(self) -> "Supervision":
        return self

    def gather(
        self, device: torch.device, distributed: bool, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> Comm:
        """The process group, once all ranks have arrived. See `Comm`.

        Raises TrainingError with the ranks that have not arrived, and UserError if the master cannot be
        reached or ranks share a GPU.
        """
        for note in self._topology.notes:
            log.info("%s", note)
        if not distributed or self._topology.world_size == 1:
            self._comm = Comm(self._topology, device, distributed=distributed, asked_to_stop=asked_to_stop)
            if distributed:
                publish(self._topology, device, self._comm.master)
            return self._comm
        roll = self._meet(asked_to_stop)
        places = roll.exchange("place", [socket.gethostname(), *_gpu(device)])
        hosts = {rank: host for rank, (host, *_) in places.items()}
        if len(hosts) < self._topology.world_size:
            raise TrainingError(_missing(hosts, self._topology.world_size))
        refuse_shared_gpus(places)
        self._comm = Comm(self._topology, device, store=roll.store, asked_to_stop=asked_to_stop)
        publish(self._topology, device, self._comm.master)
        self._hosts = [hosts[rank] for rank in range(len(hosts))]
        self._heartbeat = self._heart(roll, asked_to_stop)
        self._heartbeat.start()
        return self._comm

    def _heart(self, roll: RollCall, asked_to_stop: Callable[[], bool]) -> Heartbeat:
        spins = self._comm.device.type != "cpu"
        movement = Movement(self._comm.course, heart_interval(self._hang_timeout), spins, time.monotonic())
        return Heartbeat(
            roll.board(), self._topology.rank, self._hosts, self._hang_timeout, self._end,
            hurried=asked_to_stop, look=movement.look, patience=PATIENCE * self._topology.patience,
        )  # fmt: skip

    def _meet(self, asked_to_stop: Callable[[], bool]) -> RollCall:
        try:
            return RollCall(self._topology, max(START_TIMEOUT, self._hang_timeout or 0), asked_to_stop)
        except UserError as error:
            remedy = (
                "MASTER_ADDR must name rank 0's host in a network that all nodes share, "
                "and MASTER_PORT a free port there"
            )
            raise UserError(f"{error}; {remedy}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        agreed = error is None or (isinstance(error, Ending) and error.agreed)
        if self._heartbeat is not None:
            if not agreed:
                self._explain(error)
            self._heartbeat.stop()
        if agreed and self._comm is not None:
            self._comm.close()

    def _explain(self, error: BaseException) -> None:
        """Tells the other ranks why this one ends."""
        mistake = isinstance(error, UserError)
        why = None if is_broken_collective(error) else _one_line(error)
        if self._heartbeat.explain(why, USER_ERROR if mistake else 1) and mistake:
            error.agreed = True  # so that not every rank says it

    @contextlib.contextmanager
    def owning(self, lease: Lease | None) -> Iterator[None]:
        """A context in which this start owns the run directory. lease: on rank 0, else None."""
        self._lease = lease
        try:
            yield
        finally:
            if lease is not None:
                lease.release()

    @contextlib.contextmanager
    def telling(self, status: StatusFile) -> Iterator[None]:
        """A context in which rank 0 writes the course of the run into its status file.

        A start that is refused leaves no file in a new directory, and leaves that of a run that is done as it
        was. Any other outcome of the start before is replaced.
        """
        self._status = status
        if status.begun:
            self._record("running")
        try:
            yield
        except Preempted as error:
            self._record("preempted", str(error), requeue=True)
            # Launchers kill the other ranks soon after the first has ended: rank 0 must have written by then.
            self._comm.barrier()
            raise
        except BaseException as error:
            if self._ending.is_set():  # what breaks now is a consequence
                time.sleep(2 * EXIT_LIMIT)
            if isinstance(error, UserError) and status.outlasts_refusal:
                self._write_on_main(status.put_back)
            elif status.begun or self._is_of_one_rank(error):
                self._record("failed", _one_line(error), requeue=is_broken_collective(error))
            elif self._topology.rank == 0:
                status.release()
            raise
        self._record("done")

    def _is_of_one_rank(self, error: BaseException) -> bool:
        """Whether this is no refusal of a start, in which all ranks agree, but what went wrong on one."""
        if isinstance(error, Ending):
            return error.of_one_rank or not (error.agreed or self._topology.world_size == 1)
        return isinstance(error, Exception)

    def _record(self, state: State, message: str = "", requeue: bool = False) -> None:
        """Writes the status on rank 0."""
        self._write_on_main(lambda: self._status.write(state, message, requeue))

    def _write_on_main(self, write: Callable[[], None]) -> None:
        if self._topology.rank == 0:
            self._write(write)

    @staticmethod
    def _write(write: Callable[[], None]) -> None:
        try:
            write()
        except UserError:  # another start's, and this one ends because of that
            return
        except OSError as error:  # a full disk must not hide why the run ends
            log.error("the run's status cannot be written: %s", error)

    def _end(self, verdict: Verdict, alone: bool) -> None:
        """Ends this process from the heartbeat's thread. alone: rank 0 cannot be reached and cannot speak."""
        self._ending.set()
        # Writing may block, because the file system may be gone with the silent host.
        deadline = threading.Timer(EXIT_LIMIT, os._exit, [verdict.code])
        deadline.daemon = True
        deadline.start()
        try:
            self._report(verdict, alone)
        finally:
            os._exit(verdict.code)

    def _report(self, verdict: Verdict, alone: bool) -> None:
        """Logs the verdict and writes the status, on one rank: rank 0, or one on every host if `alone`."""
        rank, sentence = self._topology.rank, verdict.sentence
        if verdict.silent and self._logs is not None:
            self._write(self._write_stacks)
            sentence += f"; see {self._logs}/{STACKS.format('*')} for what each rank was doing"
        host = self._hosts[rank]
        speaks = rank == (1 + self._hosts[1:].index(host) if alone else 0)
        who = "distlora" if rank == 0 else f"distlora (rank {rank} on {host})"
        log.log(logging.ERROR if speaks else logging.INFO, "%s: %s", who, sentence)
        if speaks and self._status is not None and (rank == 0 or self._status.is_open()):
            self._write(lambda: self._status.write("failed", sentence, verdict.silent))
        if self._lease is not None:
            self._lease.release()
        time.sleep(self._heartbeat.reading_time if rank == 0 else EXIT_DELAY)

    def _write_stacks(self) -> None:
        """Appends what every thread of this process is doing to a file of this rank."""
        self._logs.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with (self._logs / STACKS.format(self._topology.rank)).open("a", encoding="utf-8") as file:
            file.write(f"{now}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _one_line(error: BaseException) -> str:
    """Why the run ended, in one line."""
    if isinstance(error, Ending):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def _gpu(device: torch.device) -> tuple[str | None, int]:
    """The unique id of this rank's GPU, None for a CPU; and the number of GPUs that the rank sees."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return uuid and str(uuid), torch.cuda.device_count()


def refuse_shared_gpus(places: Mapping[int, tuple[str, str | None, int]]) -> None:
    """Raises UserError if two ranks have the same GPU: NCCL's own error would not say so.

    places: rank -> its host, the id of its GPU, and the number of GPUs that it sees.
    """
    users: dict[tuple[str, str], list[int]] = {}
    for rank, (host, gpu, _) in sorted(places.items()):
        if gpu is not None:
            users.setdefault((host, gpu), []).append(rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1:
            raise UserError(
                f"{len(ranks)} ranks on {host} share the GPU {gpu}: {', '.join(map(str, ranks))}; "
                f"start one rank a GPU, here {places[ranks[0]][2]} "
                "(slots in the hostfile, torchrun --nproc-per-node, sbatch --gpus-per-node), "
                "each with its own LOCAL_RANK if the launcher sets none",
                agreed=True,
            )


def _missing(hosts: dict[int, str], world_size: int) -> str:
    absent = ", ".join(str(rank) for rank in range(world_size) if rank not in hosts)
    there = ", ".join(sorted(set(hosts.values())))
    return (
        f"{world_size - len(hosts)} of {world_size} ranks have not come ({absent}; those of {there} have): "
        "look at the output of the missing ones, or ask distlora doctor"
    )
