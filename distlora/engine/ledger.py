"""The ledger: every low-rank update of a frozen weight, as the very numbers that the arithmetic used.

W is a function of W0 and the ledger, so a checkpoint needs no W: a resumed run replays the entries in order,
with the same rounding at each (rounding the sum once would differ in many elements). An export needs the sum
alone, in float32.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.maths.low_rank import LowRank
from distlora.maths.rounding import Rounding, rounding_key


class PretrainedWeights(Protocol):
    """The weights of packed layers as they were before that."""

    def read(self, layer: str) -> Tensor:
        """(out, in) in float32 on the CPU."""


@dataclass(frozen=True)
class Entry:
    """One update of one layer. number: 0 for the initialisation, j for the j-th recomposition. columns: k of
    left (out, k) and right (k, in). dtype: in which the two are kept; lower than float32 only where that
    loses nothing. beside: the stored weight is left alone, and the forward pass adds the pair."""

    number: int
    rounding: Rounding
    columns: int
    dtype: str
    beside: bool = False


class Ledger:
    """entries: of every layer, the same on every rank. The numbers lie in the host memory of the layer's
    owner alone.

    owners: the rank of each layer. seed: of the recipe, which stochastic rounding draws from. pretrained: of
    packed layers; without, an update of the start is made on what was packed. watched: others write the
    weights too, such as an engine's own checkpoint, so checksums are kept by which `replay` knows what is
    there.
    """

    def __init__(
        self,
        comm: Comm,
        owners: dict[str, int],
        seed: int,
        pretrained: PretrainedWeights | None = None,
        watched: bool = False,
    ):
        self.entries: dict[str, list[Entry]] = {}
        self._watched, self._pretrained_sums = watched, dict[str, int]()
        self._comm, self._owners, self.seed, self.pretrained = comm, owners, seed, pretrained
        self._pairs: dict[tuple[str, int], LowRank] = {}
        self._shapes: dict[str, tuple[torch.Size, int]] = {}

    def columns(self, layer: str) -> int:
        """Of all updates of a layer, side by side."""
        return sum(entry.columns for entry in self.entries.get(layer, ()))

    def apply(
        self,
        engine: Engine,
        layer: AdapterLinear,
        number: int,
        rounding: Rounding,
        update: LowRank,
        beside: bool = False,
    ) -> float:
        """Adds the update to the live weight, or puts it beside, and writes it down. Collective; every rank
        brings the same update.

        Returns this rank's share of the squared rounding error.
        """
        dtype = _lossless(update, engine.dtype)
        entry = Entry(number, rounding, update.right.shape[-2], str(dtype).removeprefix("torch."), beside)
        self._write_down(layer.name, entry, update)
        return self._change(engine, layer, entry, update)

    def _change(self, engine: Engine, layer: AdapterLinear, entry: Entry, update: LowRank) -> float:
        if entry.beside:
            error = layer.put_beside(update)
            return error if self._comm.is_main else 0.0
        if layer.packing is None:
            if self._watched and layer.name not in self._pretrained_sums:
                self._pretrained_sums[layer.name] = engine.weight_checksum(layer)
            return engine.add_low_rank(
                layer, update, entry.rounding, rounding_key(self.seed, layer.name, entry.number)
            )
        owner = self._owners[layer.name]
        weight = self._before(engine, layer, owner, entry.number)
        if weight is not None:
            weight = torch.addmm(weight, update.left.to(weight), update.right.to(weight))
        return engine.weight_from_owner(layer, owner, weight)

    def _before(self, engine: Engine, layer: AdapterLinear, owner: int, number: int) -> Tensor | None:
        """What a packed weight is before an entry, on its owner: at the start the pretrained one, with all
        its bits.
        """
        if number == 0 and self.pretrained is not None:
            return pretrained_at_owner(self._comm, self.pretrained, layer.name, owner)
        return engine.weight_at_owner(layer, owner)

    def _write_down(self, layer: str, entry: Entry, update: LowRank) -> None:
        entries = self.entries.setdefault(layer, [])
        self._shapes[layer] = update.left.shape[:-1], update.right.shape[-1]
        if self._owners[layer] == self._comm.rank:
            dtype = getattr(torch, entry.dtype)
            kept = (side.detach().to("cpu", dtype, copy=True) for side in (update.left, update.right))
            self._pairs[layer, len(entries)] = LowRank(*kept)
        entries.append(entry)

    def pair(self, layer: str, index: int) -> LowRank:
        """The update of an entry as it is kept. Only on the layer's owner."""
        return self._pairs[layer, index]

    def pairs(self, layer: str) -> Iterator[LowRank]:
        """All updates of a layer in their order. Only on the layer's owner."""
        for index in range(len(self.entries.get(layer, ()))):
            yield self._pairs[layer, index]

    # ------------------------------------------------------------------ to files and back

    def checksums(self, engine: Engine, layers: dict[str, AdapterLinear]) -> dict[str, list[int]]:
        """Of every weight that was changed: before its first update, and now; {} unless watched. As JSON.
        Collective."""
        return {
            name: [before, engine.weight_checksum(layers[name])]
            for name, before in self._pretrained_sums.items()
        }

    def already_updated(
        self, engine: Engine, layers: dict[str, AdapterLinear], checksums: dict[str, list[int]]
    ) -> set[str]:
        """The layers whose weights hold all updates already. checksums: as they were given. Collective.

        Errors: UserError for a weight that is neither the pretrained one nor the updated one.
        """
        updated = set()
        for name, (before, after) in checksums.items():
            found = engine.weight_checksum(layers[name])
            if found == after:
                updated.add(name)
            elif found != before:
                raise UserError(
                    f"the weight of {name} is neither the pretrained one nor that of the checkpoint: load "
                    "the pretrained weights, or the engine's own checkpoint of the same step first",
                    agreed=True,
                )
        self._pretrained_sums = {name: before for name, (before, _) in checksums.items()}
        return updated

    def describe(self) -> dict[str, list[dict]]:
        """The entries without their numbers, as JSON."""
        return {layer: [asdict(entry) for entry in entries] for layer, entries in self.entries.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`<layer>/<index>/left` and `/right` of every entry, on rank 0's CPU only. Collective."""
        for layer, entries in self.entries.items():
            for index in range(len(entries)):
                pair = self._brought(layer, index)
                yield f"{layer}/{index}/left", pair and pair.left
                yield f"{layer}/{index}/right", pair and pair.right

    def replay(
        self,
        engine: Engine,
        layers: dict[str, AdapterLinear],
        described: dict,
        read: Callable[[str], Tensor | None],
        updated: Collection[str] = (),
    ) -> None:
        """Applies what `describe` and `tensors` gave to the weights W0 of an engine that has started.
        Collective.

        read: the tensor of a name, on rank 0; collective. updated: layers whose weights hold it all already.
        """
        for name, entries in described.items():
            for index, fields in enumerate(entries):
                entry, layer = Entry(**fields), layers[name]
                shapes = dict(zip(("left", "right"), layer.pair_shapes(entry.columns)))
                sides = {
                    side: self._read(f"{name}/{index}/{side}", entry, shape, read)
                    for side, shape in shapes.items()
                }
                update = LowRank(**sides)
                self._write_down(name, entry, update)
                if entry.beside or name not in updated:
                    self._change(engine, layer, entry, update)

    def _read(
        self, name: str, entry: Entry, shape: tuple[int, int], read: Callable[[str], Tensor | None]
    ) -> Tensor:
        """A side of an entry, from rank 0 to all."""
        value = torch.zeros(shape, dtype=getattr(torch, entry.dtype), device=self._comm.device)
        found = read(name)
        if self._comm.is_main:
            value.copy_(found)
        return self._comm.broadcast(value, 0)

    def stacked(self, layer: str, pair: LowRank | None) -> LowRank | None:
        """The exact update of W0: `pair`, what the live factors add, beside every entry; float32. On rank 0.
        Collective.
        """
        updates = [self._brought(layer, index) for index in range(len(self.entries.get(layer, ())))]
        if not self._comm.is_main:
            return None
        updates.insert(0, pair)
        return LowRank(
            torch.cat([update.left.float().cpu() for update in updates], -1),
            torch.cat([update.right.float().cpu() for update in updates], -2),
        )

    def _brought(self, layer: str, index: int) -> LowRank | None:
        """An entry's numbers from the layer's owner to rank 0."""
        owner, entry = self._owners[layer], self.entries[layer][index]
        (*stack, out_features), in_features = self._shapes[layer]
        dtype, device = getattr(torch, entry.dtype), self._comm.device
        pair = self._pairs.get((layer, index))
        if pair is None:
            left, right = (*stack, out_features, entry.columns), (*stack, entry.columns, in_features)
            pair = LowRank(
                torch.empty(left, dtype=dtype, device=device), torch.empty(right, dtype=dtype, device=device)
            )
        # A broadcast, though only rank 0 needs it: sending from rank to rank would open a communicator for
        # every pair of them.
        moved = [self._comm.broadcast(side.to(device), owner) for side in (pair.left, pair.right)]
        return LowRank(*(side.cpu() for side in moved)) if self._comm.is_main else None


def pretrained_at_owner(comm: Comm, pretrained: PretrainedWeights, layer: str, owner: int) -> Tensor | None:
    """The layer's weight on the device of rank `owner`, None elsewhere. Collective: what cannot be read is
    everyone's error.
    """
    weight, failure = None, None
    if comm.rank == owner:
        try:
            weight = pretrained.read(layer).to(comm.device)
        except Exception as error:  # safetensors has errors of its own; the others wait
            failure = UserError(f"the pretrained weight of {layer} cannot be read again: {error}")
    comm.agree(failure)
    return weight


def _lossless(update: LowRank, dtype: torch.dtype) -> torch.dtype:
    """`dtype` if it holds both sides exactly, else float32."""
    exact = all(torch.equal(side.to(dtype).float(), side.float()) for side in (update.left, update.right))
    return dtype if exact else torch.float32
