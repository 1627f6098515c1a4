"""The process group: ranks and what they say to each other."""

import datetime
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlora.engine.comm.course import Course, meets
from distlora.errors import Ending, Preempted, UserError


@dataclass(frozen=True)
class Topology:
    """Who this process is among the ranks of a job, and where they meet; one process without any.

    launcher: whose variables said so, for the user; empty without a launcher. notes: what was derived of
    where the ranks meet, in sentences for the user. master: address and port where they meet; None for one
    process that was told none. rank_0_listens: there; torchrun listens itself, and all ranks are its guests.
    attempt: of the launcher, whose store outlives the ranks of an earlier one. patience: minutes that a
    collective waits for a silent rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = field(default="", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    master: tuple[str, int] | None = field(default=None, compare=False)
    rank_0_listens: bool = field(default=True, compare=False)
    attempt: str = field(default="0", compare=False)
    patience: float = field(default=30.0, compare=False)


#: For where nothing more is known.
STOPPED = (
    "asked to stop; started again, the run goes on from its newest checkpoint, or begins anew without one"
)


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
        store: dist.Store | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        """Joins the group. device: where this rank computes; gloo on a CPU, NCCL on an NVIDIA GPU.

        timeout_minutes: how long a collective waits for a silent rank; by default the topology's patience.
        store: of where the ranks have met already; without it they meet at the topology's master.
        asked_to_stop: whether this rank should end early, see `sum_or_stop`.
        """
        self.rank, self.world_size = topology.rank, topology.world_size
        self.local_rank, self.device = topology.local_rank, device
        self._asked_to_stop, self.course = asked_to_stop, Course()
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._mine = False
        if distributed and not dist.is_initialized():
            timeout = datetime.timedelta(
                minutes=topology.patience if timeout_minutes is None else timeout_minutes
            )
            store = store or _open_store(topology, timeout)
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

    @meets
    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @meets
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums in place over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @meets
    def reduce_to(self, tensor: Tensor, owner: int) -> Tensor:
        """Sums over ranks into the owner's `tensor`; what the others' then holds is undefined."""
        if self.world_size > 1:
            dist.reduce(tensor, owner)
        return tensor

    @meets
    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrites `tensor` with the one of rank `source`."""
        if self.world_size > 1:
            dist.broadcast(tensor, source)
        return tensor

    @meets
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Equal-sized tensors of all ranks, in rank order: (world_size, *shape), on every rank.

        Also for what one rank alone needs: a gather to that rank would open a connection from each of the
        others to it, and with other owners in the end between any two ranks.
        """
        if self.world_size == 1:
            return tensor[None]
        parts = tensor.new_empty(self.world_size, *tensor.shape)
        dist.all_gather_into_tensor(parts.view(-1), tensor.reshape(-1))
        return parts

    # ------------------------------------------------------------------ values

    @meets
    def gather(self, value: Any) -> list[Any]:
        """The JSON-able values of all ranks, in rank order, on every rank."""
        data = json.dumps(value).encode()
        sizes = self.all_gather(torch.tensor(len(data), device=self.device)).tolist()
        buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        buffer[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [
            json.loads(part[:size].numpy().tobytes())
            for size, part in zip(sizes, self.all_gather(buffer).cpu())
        ]

    @meets
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

    @meets
    def share(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        return value if self.world_size == 1 else self._share_from(0, value)

    @meets
    def agree(self, error: Exception | None) -> None:
        """Raises on every rank if any rank brings an error, so that none is left waiting in a later
        collective.

        The error of the lowest rank that has one is raised there as it is, and elsewhere as a UserError with
        its sentence; with the name of the rank, if the error is of a rank's own work and not all have one.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        mine = [self.world_size, 0] if error is None else [self.rank, 1]
        least = torch.tensor(mine, device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        first, all_failed = least.tolist()
        if first == self.world_size:
            return
        of_one_rank = not all_failed and isinstance(error, Ending) and error.of_own_work
        where = f"rank {first} on {socket.gethostname()}: " if of_one_rank else ""
        sentence, of_one_rank = self._share_from(first, [f"{where}{error}", of_one_rank])
        if first != self.rank:
            error = UserError(sentence)
        error.agreed = True
        error.of_one_rank = of_one_rank
        raise error

    def _share_from(self, source: int, value: Any) -> Any:
        """The JSON-able value of rank `source`, on every rank."""
        data = json.dumps(value).encode() if self.rank == source else b""
        size = self.broadcast(torch.tensor(len(data), device=self.device), source)
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return json.loads(bytes(self.broadcast(buffer, source).cpu().tolist()))


def _open_store(topology: Topology, timeout: datetime.timedelta) -> dist.TCPStore:
    """Where the ranks of a group meet that have not met before; one process takes a free port."""
    address, port = topology.master or ("127.0.0.1", 0)
    listens = topology.rank == 0 and topology.rank_0_listens
    return dist.TCPStore(address, port, topology.world_size, listens, timeout, wait_for_workers=False)


def is_broken_collective(error: BaseException) -> bool:
    """Whether torch.distributed says so when another rank is gone, or does not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
