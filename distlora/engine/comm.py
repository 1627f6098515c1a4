"""Ranks and what they say to each other: the only user of torch.distributed."""

import datetime
import functools
import json
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlora.errors import Preempted, TrainingError, UserError
from distlora.sentences import first_line


@dataclass(frozen=True)
class Topology:
    """Who this process is among the ranks of a job, and where they meet; one process without any."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    #: Whose variables said so, for the user; empty for one process without a launcher.
    launcher: str = field(default="", compare=False)
    #: What was derived of where the ranks meet and over which interface, in sentences for the user.
    notes: tuple[str, ...] = field(default=(), compare=False)
    #: Address and port at which the ranks meet; None for one process that was told none.
    master: tuple[str, int] | None = field(default=None, compare=False)
    #: Whether rank 0 listens there; torchrun listens itself, and all ranks are its guests.
    rank_0_listens: bool = field(default=True, compare=False)
    #: Which attempt of the launcher this is: its store outlives the ranks of an earlier one.
    attempt: str = field(default="0", compare=False)
    #: Minutes that a collective waits for a silent rank.
    patience: float = field(default=30.0, compare=False)


#: For where nothing more is known.
STOPPED = "asked to stop; started again, the run goes on from its newest checkpoint, or begins anew where it has none"


class Comm:
    """The process group, or a group of one without torch.distributed. All calls are collective unless said
    otherwise.
    """

    def __init__(
        self,
        topology: Topology,
        device: torch.device,
        timeout_minutes: float | None = None,
        distributed: bool = True,
        roll: "RollCall | None" = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        """Joins the group. device: where this rank computes; gloo on a CPU, NCCL on an NVIDIA GPU.

        timeout_minutes: how long a collective waits for a silent rank; by default the topology's patience.
        roll: where the ranks have met already; without it they meet at the topology's master.
        asked_to_stop: whether this rank should end early, see `sum_or_stop`.
        """
        self.rank, self.world_size = topology.rank, topology.world_size
        self.local_rank, self.device = topology.local_rank, device
        self._asked_to_stop = asked_to_stop
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._mine = False
        if distributed and not dist.is_initialized():
            timeout = datetime.timedelta(
                minutes=topology.patience if timeout_minutes is None else timeout_minutes
            )
            store = _open_store(topology, timeout) if roll is None else roll.store
            self._master = topology.master or ("127.0.0.1", store.port)
            dist.init_process_group(
                self.backend, timeout=timeout, store=store, rank=self.rank, world_size=self.world_size
            )
            self._mine = True
        if not distributed and self.world_size > 1:
            raise UserError(
                "several ranks need DeepSpeed; set deepspeed: to a ZeRO config, or start one process"
            )

    @classmethod
    def of_running_group(cls, device: torch.device) -> "Comm":
        """Joins the process group that the program around has made; a group of one where it has made none."""
        if not dist.is_initialized():
            return cls(Topology(), device, distributed=False)
        return cls(Topology(dist.get_rank(), dist.get_world_size()), device)

    @property
    def master(self) -> str | None:
        """Address and port where the ranks met; None without a process group of our own."""
        return f"{self._master[0]}:{self._master[1]}" if self._mine and dist.is_initialized() else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self._mine and dist.is_initialized():
            dist.destroy_process_group()

    # ------------------------------------------------------------------ tensors

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums in place over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_to(self, tensor: Tensor, owner: int) -> Tensor:
        """Sums over ranks into the owner's `tensor`; what the others' then holds is undefined."""
        if self.world_size > 1:
            dist.reduce(tensor, owner)
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrites `tensor` with the one of rank `source`."""
        if self.world_size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def gather_to(self, tensor: Tensor, owner: int) -> list[Tensor] | None:
        """Equal-sized tensors of all ranks, in rank order, on the owner; None elsewhere."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == owner else None
        dist.gather(tensor, parts, dst=owner)
        return parts

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Equal-sized tensors of all ranks, in rank order."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return parts

    # ------------------------------------------------------------------ values

    def gather(self, value: Any) -> list[Any]:
        """The JSON-able values of all ranks, in rank order, on every rank."""
        data = json.dumps(value).encode()
        sizes = [int(size) for size in self.all_gather(torch.tensor(len(data), device=self.device))]
        buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        buffer[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [
            json.loads(bytes(part[:size].cpu().tolist()))
            for size, part in zip(sizes, self.all_gather(buffer))
        ]

    def sum(self, *values: float) -> tuple[float, ...]:
        """Each value summed over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        return tuple(self.all_reduce(total).tolist())

    def sum_or_stop(self, *values: float) -> tuple[float, ...]:
        """`sum`, which also carries whether a rank was asked to stop. Raises Preempted on every rank if any
        was.

        Only for where nothing is half done that must be whole.
        """
        *sums, asked = self.sum(*values, float(self._asked_to_stop()))
        if asked:
            raise Preempted(STOPPED)
        return tuple(sums)

    def share(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        return value if self.world_size == 1 else self._share_from(0, value)

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank if any rank brings an error, so that none is left waiting in a later
        collective.

        The error of the lowest rank that has one is raised there as it is, and elsewhere as a UserError with
        its sentence.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        mine = torch.tensor(self.world_size if error is None else self.rank, device=self.device)
        dist.all_reduce(mine, op=dist.ReduceOp.MIN)
        first = int(mine)
        if first == self.world_size:
            return
        sentence = self._share_from(first, str(error) if first == self.rank else None)
        if first != self.rank:
            raise UserError(sentence, agreed=True)
        error.agreed = True
        raise error

    def _share_from(self, source: int, value: Any) -> Any:
        """The JSON-able value of rank `source`, on every rank."""
        data = json.dumps(value).encode() if self.rank == source else b""
        size = self.broadcast(torch.tensor(len(data), device=self.device), source)
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return json.loads(bytes(self.broadcast(buffer, source).cpu().tolist()))


class RollCall:
    """Every rank says something at the master before a group is made, so that those who do not come can be
    named.
    """

    def __init__(self, topology: Topology, seconds: float, asked_to_stop: Callable[[], bool] = lambda: False):
        """Meets at the topology's master. seconds: how long a silent rank is waited for. asked_to_stop:
        whether this rank should wait no longer, and raise Preempted.

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
            raise UserError(
                f"rank {topology.rank} on {socket.gethostname()} {what} the master {address}:{port} ({reason})"
            ) from error

    def exchange(self, topic: str, value: Any, seconds: float | None = None) -> dict[int, Any]:
        """The JSON-able values of all who came in time, by rank, on every rank that came. Each topic can be
        exchanged once. Who was missing once is not waited for again.

        seconds: how long a silent rank is waited for, where that is not the usual. Errors: TrainingError on a
        rank that has lost the master.
        """
        seconds = seconds or self._seconds
        try:
            self.store.set(f"{topic}/{self._rank}", json.dumps(value))
            if self._rank == 0:
                self._expected = self._await(topic, self._expected, seconds)
                self.store.set(f"{topic}/came", json.dumps(self._expected))
            # The master may have waited for somebody until its last second.
            self._wait(f"{topic}/came", 2 * seconds)
            values = {
                rank: json.loads(self.store.get(f"{topic}/{rank}"))
                for rank in json.loads(self.store.get(f"{topic}/came"))
            }
            self.store.set(f"{topic}/read/{self._rank}", "")
            if self._rank == 0:
                self._await(
                    f"{topic}/read", values, self._seconds
                )  # if this process ends next, the store ends with it
            return values
        except dist.DistError as error:
            raise self._lost("has lost the master") from error

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
                if self._asked_to_stop():
                    raise Preempted(STOPPED) from None
                if time.monotonic() > deadline:
                    raise

    def _await(self, topic: str, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those of the ranks that have spoken in time."""
        deadline = time.monotonic() + seconds
        missing, came = set(ranks), set()
        while missing and time.monotonic() < deadline:
            came |= {rank for rank in missing if self.store.check([f"{topic}/{rank}"])}
            missing -= came
            if missing:
                if self._asked_to_stop():
                    raise Preempted(STOPPED)
                time.sleep(0.02)
        return sorted(came)


def _open_store(topology: Topology, timeout: datetime.timedelta) -> dist.TCPStore:
    """Where the ranks of a group meet that have not met before; one process takes a free port."""
    address, port = topology.master or ("127.0.0.1", 0)
    listens = topology.rank == 0 and topology.rank_0_listens
    return dist.TCPStore(address, port, topology.world_size, listens, timeout, wait_for_workers=False)


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
    """Every rank has two connections to rank 0; many systems allow 1024 files unless a process asks for more."""
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


def is_broken_collective(error: BaseException) -> bool:
    """Whether the error is what torch.distributed says when another rank is gone, or does not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
