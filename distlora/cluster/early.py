"""A rank that fails before the ranks have met tells those that wait for it."""

import contextlib
from collections.abc import Iterator

from distlora.engine.comm import RollCall, Topology
from distlora.errors import UserError
from distlora.sentences import first_line

#: Seconds for which such a rank waits for the others to come and read why it ends, at most. They may still be
#: importing their libraries.
LINGER = 20.0


@contextlib.contextmanager
def failure_told(topology: Topology) -> Iterator[None]:
    """A context before the ranks meet, whose errors end the other ranks as well, once they come to meet.

    A UserError is told by its `parting`, once this rank has said it on its own terminal.
    """
    try:
        yield
    except UserError as error:
        if _has_others(topology):
            sentence = str(error)
            error.parting = lambda: tell(topology, sentence, True)
        raise
    except Exception as error:
        if _has_others(topology):
            tell(topology, f"{type(error).__name__}: {first_line(error)}", False)
        raise


def tell(topology: Topology, sentence: str, mistake: bool) -> bool:
    """Tells why this rank does not come. mistake: of the user. Returns whether rank 0 has heard of it."""
    try:
        return RollCall(topology, LINGER).refuse(sentence, mistake)
    except UserError:  # there is no master whom one could tell
        return False


def _has_others(topology: Topology) -> bool:
    return topology.world_size > 1 and topology.master is not None
