"""Progress of what takes long, told to whoever shows it, as the command line does. The library itself shows
nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Task(Protocol):
    """A phase that goes on."""

    def advance(self, count: int = 1, told: str = "") -> None:
        """So much more is done. told: what else there is to say, such as a loss; "" keeps what was said."""

    def expect(self, total: int) -> None:
        """It is known by now how much there is to do."""

    def close(self) -> None:
        """It is over, whether all was done or not."""


class Audience(Protocol):
    """Who shows it."""

    def begin(self, name: str, unit: str, total: int | None, done: int) -> Task:
        """A phase begins. Phases may lie within others."""


class _Untold:
    def advance(self, count: int = 1, told: str = "") -> None:
        pass

    def expect(self, total: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Nobody:
    def begin(self, name: str, unit: str, total: int | None, done: int) -> Task:
        return _Untold()


_audience: Audience = _Nobody()


@contextmanager
def told_to(audience: Audience) -> Iterator[None]:
    """A context whose phases are told to `audience`; of all threads."""
    global _audience
    before, _audience = _audience, audience
    try:
        yield
    finally:
        _audience = before


def begin(name: str, unit: str = "", total: int | None = None, done: int = 0) -> Task:
    """A phase that the caller closes. unit: what is counted, in the plural. total: None where nobody knows.
    done: of `total`, before it begins."""
    return _audience.begin(name, unit, total, done)


@contextmanager
def phase(name: str, unit: str = "", total: int | None = None, done: int = 0) -> Iterator[Task]:
    """A context that is a phase; arguments as for `begin`."""
    task = begin(name, unit, total, done)
    try:
        yield task
    finally:
        task.close()


def each(
    items: Iterable[Item],
    name: str,
    unit: str,
    total: int | None = None,
    size: Callable[[Any], int] = lambda item: 1,
) -> Iterator[Item]:
    """The items; the phase lasts until the last one is done with. size: what an item counts for."""
    with phase(name, unit, total) as task:
        for item in items:
            yield item
            task.advance(size(item))
