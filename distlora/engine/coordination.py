"""Work that can fail on one rank alone, and what rank 0 does with files while the others wait."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from distlora.engine.comm import Comm
from distlora.errors import UserError
from distlora.files.problems import file_errors_explained, sentence_on

Result = TypeVar("Result")


def on_main(comm: Comm, what: object, action: Callable[[], Any]) -> Any:
    """The action's result on rank 0, None elsewhere. Collective: its error is raised on every rank."""
    result = error = None
    if comm.is_main:
        try:
            with file_errors_explained(what):
                result = action()
        except Exception as raised:
            error = raised
    comm.agree(error)
    return result


def stream_to_main(comm: Comm, what: object, items: Iterator, action: Callable[[Iterable], Any]) -> Any:
    """Like `on_main`, for an action on rank 0 that consumes items whose production is collective.

    The other ranks produce along and throw away. If the action fails, rank 0 does the same to the end, and
    then all raise.
    """

    def consume():
        try:
            return action(items)
        finally:
            for _ in items:
                pass

    if not comm.is_main:
        for _ in items:
            pass
    return on_main(comm, what, consume)


def on_every_rank(comm: Comm, work: Callable[[], Result]) -> Result:
    """Work that every rank does for itself; an error of any ends all of them with its sentence."""
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        failure = error
    except OSError as error:
        failure = UserError(sentence_on(error))
    if failure is not None:
        failure.of_own_work = True
    comm.agree(failure)
    return result
