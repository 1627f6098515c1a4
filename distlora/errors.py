"""The exceptions with which a run ends early on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Characters of a sentence. Names and values within can be of any length.
_LONGEST, _BEGINNING = 2000, 1500


class Ending(Exception):
    """The base of all. Its message is one sentence for the user.

    agreed: every rank ends with this sentence, so only rank 0 says it. early: it was raised before the ranks
    have met, so the first rank of each node says it, because files, packages and the command line can differ
    between nodes. of_own_work: of what every rank does for itself. of_one_rank: such an error of some ranks,
    while others could have gone on. parting: to be called once the sentence was said; returns whether rank 0
    says it.
    """

    agreed: bool = False
    early: bool = False
    of_own_work: bool = False
    of_one_rank: bool = False
    parting: Callable[[], bool] | None = None

    def __init__(self, sentence: str, agreed: bool | None = None):
        """agreed: replaces the value of the class."""
        super().__init__(_readable(sentence))
        if agreed is not None:
            self.agreed = agreed


def _readable(sentence: str) -> str:
    """One line that terminals and files take, whatever names stand in it: line breaks, control characters and
    half characters as escapes, and of a very long one both ends.
    """
    if len(sentence) > _LONGEST:
        sentence = f"{sentence[:_BEGINNING]} … {sentence[_BEGINNING + 3 - _LONGEST :]}"
    if not sentence.isprintable():
        sentence = "".join(sign if sign.isprintable() else _escaped(sign) for sign in sentence)
    return sentence if len(sentence) <= _LONGEST else _readable(sentence)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


class UserError(Ending):
    """A mistake of the user, in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence once and exits with code 2. No traceback is shown.
    """


class TrainingError(Ending):
    """A run must not continue (a NaN loss, a tensor that does not train). The message is one sentence.

    It follows from numbers that are reduced over ranks, so all ranks raise it. The command line prints the
    sentence once and exits with code 1.
    """

    agreed = True


class Preempted(Ending):
    """A run was asked to stop (SIGTERM, SIGUSR1) and has stopped. The same command continues it.

    All ranks raise it. The command line prints the sentence once and exits with code 75, which is EX_TEMPFAIL
    in sysexits.h.
    """

    agreed = True


@contextmanager
def before_ranks_meet() -> Iterator[None]:
    """A context that marks every UserError raised in it as early; see `Ending.early`."""
    try:
        yield
    except UserError as error:
        error.early = True
        raise
