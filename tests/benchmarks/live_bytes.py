"""How many bytes of tensors are alive: the instrument of the memory benchmark.

The result of every operation passes by here. A storage counts from the moment it is first seen until it is
freed, whole and once, however many views share it. What a kernel allocates inside itself (the workspace of an
SVD or a matrix product) is not seen, nor is what an allocator keeps in its cache.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE, HOST = "device", "host"


@dataclass(frozen=True)
class _Alive:
    """One storage. what: operation, shape and type of the tensor by which it was first seen. watch: tells
    when it is freed.
    """

    size: int
    account: str
    what: str
    watch: weakref.ref


class LiveBytes(TorchDispatchMode):
    """A context that counts; works on real tensors and on fake ones (enter `FakeTensorMode` first).

    There are two accounts: "device", and "host" for what is made inside `on_host()`: on a CPU, and on a
    simulated device, both lie in the same memory. now, peak: bytes by account; each account has its own peak.
    """

    def __init__(self):
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._alive: dict[int, _Alive] = {}
        self._at_peak: list[_Alive] = []
        self._account = DEVICE

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(operation, leaf)
        return result

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made elsewhere, such as a loaded model's."""
        for tensor in tensors:
            self._count("watched", tensor)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Books what is made inside as host memory."""
        before, self._account = self._account, HOST
        try:
            yield
        finally:
            self._account = before

    def reset_peak(self) -> None:
        """The peak becomes what is alive now."""
        self.peak, self._at_peak = Counter(self.now), list(self._alive.values())

    def largest_at_peak(self, count: int) -> list[tuple[str, int, int]]:
        """(what, how many, bytes together) of what was alive on the device at its peak, largest first."""
        sizes, numbers = Counter(), Counter()
        for entry in self._at_peak:
            if entry.account == DEVICE:
                sizes[entry.what] += entry.size
                numbers[entry.what] += 1
        return [(what, numbers[what], size) for what, size in sizes.most_common(count)]

    # ------------------------------------------------------------------ bookkeeping

    def _count(self, operation, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is not None and known.size == size:
            return
        if known is not None:  # resized in place
            self._forget(key)
        what = f"{operation} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        watch = weakref.ref(storage, lambda _: self._forget(key))
        self._alive[key] = _Alive(size, known.account if known else self._account, what, watch)
        self._change(self._alive[key].account, size)

    def _forget(self, key: int) -> None:
        gone = self._alive.pop(key)
        self._change(gone.account, -gone.size)

    def _change(self, account: str, by: int) -> None:
        self.now[account] += by
        if self.now[account] > self.peak[account]:
            self.peak[account] = self.now[account]
            if account == DEVICE:
                self._at_peak = list(self._alive.values())
