"""The ways a run ends early on purpose."""

from collections.abc import Iterator
from contextlib import contextmanager


class Ending(Exception):
    """Base of all. agreed: every rank ends with this sentence, so rank 0 alone says it. early: it comes
    before the ranks have met, so the first rank of each node says it: files, packages and what was typed are
    a node's."""

    agreed: bool = False
    early: bool = False

    def __init__(self, sentence: str, agreed: bool | None = None):
        """agreed: where it is otherwise than usual for the class."""
        super().__init__(sentence)
        if agreed is not None:
            self.agreed = agreed


class UserError(Ending):
    """A mistake of the user's, in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence once and exits with code 2. No traceback is shown.
    """


class TrainingError(Ending):
    """A run that must not go on (a NaN loss, a tensor that does not train), in one sentence.

    Raised from numbers that are reduced over ranks, so all ranks raise it alike. The command line prints the
    sentence once and exits with code 1.
    """

    agreed = True


class Preempted(Ending):
    """A run that was asked to stop (SIGTERM, SIGUSR1) and has stopped, in one sentence; started again it goes
    on.

    All ranks raise it alike. The command line prints the sentence once and exits with code 75, EX_TEMPFAIL in
    sysexits.h.
    """

    agreed = True


@contextmanager
def before_ranks_meet() -> Iterator[None]:
    """Marks the mistakes that are found in it; see `Ending.early`."""
    try:
        yield
    except UserError as error:
        error.early = True
        raise
