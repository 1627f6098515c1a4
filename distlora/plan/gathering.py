"""What ZeRO-3 gathers in one pass: DeepSpeed's fetching, prefetching and releasing, replayed on sizes alone.

DeepSpeed records the order in which modules run in the first pass. From the second pass on it keeps a
gathered parameter if that is used again within `stage3_max_reuse_distance` elements, and fetches up to
`stage3_prefetch_bucket_size` elements ahead.

A checkpointed block gathers its frozen parameters to compute its activations again. They are released after
the block's last module and gathered once more for their own backward pass: three times a pass in all.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Piece:
    """One parameter that is partitioned and not persistent. elements: of the whole. frozen: not trained."""

    name: str
    elements: int
    frozen: bool = True


#: The parameters of one module, gathered together.
Module = tuple[Piece, ...]


@dataclass(frozen=True)
class Limits:
    """Limits of the DeepSpeed config, in elements."""

    reuse: int = 1_000_000_000
    live: int = 1_000_000_000
    prefetch: int = 50_000_000


@dataclass(frozen=True)
class Event:
    """A module is entered (then its parameters must be whole) or left.

    owner: in a recomputation, the module whose backward pass began it.
    """

    kind: Literal["enter", "leave", "enter backward", "leave backward"]
    module: int
    owner: int | None = None


@dataclass(frozen=True)
class Gathered:
    """What one pass gathers.

    times: how often each parameter is gathered. peak: the most elements that are whole at once. together: the
    most elements that one call gathers for several parameters; they lie in its buffer too for a moment.
    """

    times: dict[str, int]
    peak: int
    together: int


def training_order(
    forward: Sequence[Event], blocks: set[int], silent: set[int], holders: set[int]
) -> list[Event]:
    """The events of a forward and a backward pass.

    forward: the events of the forward pass, in which modules are entered and left, nested.
    blocks: modules that are checkpointed. silent: modules without a backward pass, because nothing in them or
    before them is trained. holders: modules that have parameters of their own.
    """
    events, opened = list(forward), None
    for position in reversed(range(len(forward))):
        event = forward[position]
        if event.kind == "enter":
            if event.module not in silent:
                events.append(Event("leave backward", event.module))
            continue
        if event.module not in silent:
            events.append(Event("enter backward", event.module))
        if event.module in blocks:
            opened = forward.index(Event("enter", event.module))
        if opened is not None and event.module in holders:
            # The backward pass asks for a saved tensor that is missing. Everything up to this tensor is
            # computed once more, so the recomputation stops inside this module.
            again = forward[opened : forward.index(Event("enter", event.module), opened) + 1]
            events += [Event(passed.kind, passed.module, event.module) for passed in again]
            opened = None
    return events


def gather(
    modules: Sequence[Module], events: Sequence[Event], limits: Limits, recorded: bool = True
) -> Gathered:
    """What one pass gathers. recorded: False for the first pass, whose order DeepSpeed does not know yet."""
    return _Coordinator(modules, events, limits, recorded).run()


class _Coordinator:
    """DeepSpeed's state during one pass. A step is one module that is entered."""

    def __init__(self, modules: Sequence[Module], events: Sequence[Event], limits: Limits, recorded: bool):
        self._modules, self._events, self._limits, self._recorded = modules, events, limits, recorded
        self._order = [event.module for event in events if event.kind.startswith("enter")]
        self._queue = deque(
            (piece, step) for step, module in enumerate(self._order) for piece in modules[module]
        )
        self._fetched_for: dict[str, int] = {}
        self._step, self._whole, self._peak = 0, 0, 0
        self._available: set[str] = set()
        self._users: dict[str, set[int]] = {}
        self._owned: dict[int, dict[str, Piece]] = {}
        self._times: Counter[str] = Counter()
        self._together = 0

    def run(self) -> Gathered:
        for event in self._events:
            if event.kind.startswith("enter"):
                self._enter(event)
            else:
                self._leave(event)
        return Gathered(dict(self._times), self._peak, self._together)

    def _enter(self, event: Event) -> None:
        pieces = self._modules[event.module]
        self._fetch(pieces)
        for piece in pieces:
            self._users.setdefault(piece.name, set()).add(event.module)
            if event.owner is not None and piece.frozen:
                self._owned.setdefault(event.owner, {})[piece.name] = piece
        if self._recorded:
            self._drop_from_queue(pieces)
            self._prefetch()
        self._step += 1

    def _fetch(self, pieces: Iterable[Piece]) -> None:
        missing = [piece for piece in pieces if piece.name not in self._available]
        together = sum(piece.elements for piece in missing)
        self._available.update(piece.name for piece in missing)
        self._times.update(piece.name for piece in missing)
        self._whole += together
        self._peak = max(self._peak, self._whole)
        if len(missing) > 1:
            self._together = max(self._together, together)

    def _drop_from_queue(self, pieces: Module) -> None:
        """Parameters that were fetched for this step need no prefetching for it."""
        wanted = {piece.name for piece in pieces if self._fetched_for.get(piece.name, -1) < self._step}
        while wanted:
            piece, step = self._queue.popleft()
            self._fetched_for[piece.name] = step
            wanted.discard(piece.name)

    def _prefetch(self) -> None:
        room = min(self._limits.live - self._whole, self._limits.prefetch)
        chosen, elements = {}, 0
        while self._queue and elements < room:
            piece, step = self._queue.popleft()
            self._fetched_for[piece.name] = max(self._fetched_for.get(piece.name, -1), step)
            if piece.name not in self._available and piece.name not in chosen:
                chosen[piece.name] = piece
                elements += piece.elements
        self._fetch(chosen.values())

    def _leave(self, event: Event) -> None:
        pieces = {piece.name: piece for piece in self._modules[event.module]}
        going = self._not_soon_again(pieces) if self._recorded else set(pieces)
        if event.kind == "leave backward":
            owned = self._owned.pop(event.module, {})
            going |= set(owned)
            pieces |= owned
        for name, piece in pieces.items():
            users = self._users.get(name, set())
            users.discard(event.module)
            if name in going and name in self._available and not users:
                self._available.discard(name)
                self._whole -= piece.elements

    def _not_soon_again(self, pieces: dict[str, Piece]) -> set[str]:
        going = {name for name in pieces if self._fetched_for.get(name, -1) <= self._step}
        passed = 0
        for module in self._order[self._step :]:
            if passed >= self._limits.reuse or not going:
                break
            for piece in self._modules[module]:
                going.discard(piece.name)
                passed += piece.elements
        return going
