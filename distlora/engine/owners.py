"""Which rank owns a layer: it alone factorises the layer, and keeps in its host memory what the others need
not have.
"""

from collections.abc import Iterator

import torch

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.ledger import Ledger, PretrainedWeights
from distlora.engine.protocol import Engine
from distlora.maths.low_rank import LowRank
from distlora.methods import Method


def assign_owners(layers: dict[str, AdapterLinear], method: Method, world_size: int) -> dict[str, int]:
    """The rank that factorises each layer: the one with the least work so far, at out·in·r a layer."""
    work = [0] * world_size
    owners = {}
    for name, layer in layers.items():
        owner = work.index(min(work))
        work[owner] += layer.elements * method.rank
        owners[name] = owner
    return owners


def open_ledger(
    engine: Engine,
    attached: Attached,
    seed: int,
    pretrained: PretrainedWeights | None = None,
    watched: bool = False,
) -> None:
    """An empty ledger for the attached layers. seed, pretrained, watched: see `Ledger`."""
    owners = assign_owners(attached.layers, attached.method, engine.comm.world_size)
    engine.ledger = Ledger(engine.comm, owners, seed, pretrained, watched)


def turns(layers: dict[str, AdapterLinear], owners: dict[str, int]) -> Iterator[dict[str, AdapterLinear]]:
    """At most one layer an owner at a time: all ranks factorise at once, none holds more than one whole
    weight.
    """
    queues: dict[int, list[str]] = {}
    for name in layers:
        queues.setdefault(owners[name], []).append(name)
    for turn in range(max(len(queue) for queue in queues.values())):
        yield {queue[turn]: layers[queue[turn]] for queue in queues.values() if turn < len(queue)}


def broadcast_pair(comm: Comm, shape: tuple[int, ...], owner: int, pair: LowRank | None) -> LowRank | None:
    """The owner's pair for a weight of this shape (out, in), or for a stack of them (E, out, in), on every
    rank in float32 on the device; None if it has none.
    """
    columns = torch.tensor(0 if pair is None else pair.right.shape[-2], device=comm.device)
    count = int(comm.broadcast(columns, owner))
    if count == 0:
        return None
    *stack, out, inner = shape
    left, right = (*stack, out, count), (*stack, count, inner)
    sides = torch.zeros(left, device=comm.device), torch.zeros(right, device=comm.device)
    if pair is not None:
        sides[0].copy_(pair.left)
        sides[1].copy_(pair.right)
    return LowRank(*(comm.broadcast(side, owner) for side in sides))
