"""How the program ends: exit codes, and which rank says what is wrong."""

import os
import socket
import sys
import time
import traceback
from types import TracebackType

from distlora.cluster.rendezvous import own_local_rank, own_rank
from distlora.errors import Ending
from distlora.files.confidential import hidden

TRAINING_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130
#: Of a program that SIGPIPE has ended, as a shell tells it.
UNREAD = 141
#: Seconds that the other ranks wait before they end. Launchers end all ranks as soon as one has ended, and
#: rank 0 must have said by then what is wrong.
PATIENCE = 5.0


def end(error: Ending, code: int, wait: bool = True) -> int:
    """Says once what is wrong and returns the exit code.

    Rank 0 speaks at once. Another rank speaks only if rank 0 may not know of the error, and if it still runs
    after PATIENCE seconds. wait: False where the other ranks end without waiting.
    """
    rank, first_on_node = rank_and_first_on_node()
    if rank == 0:
        print(f"distlora: {hidden(str(error))}", file=sys.stderr, flush=True)
        if error.parting is not None:
            error.parting()
        return code
    said = error.parting is not None and error.parting()
    if wait:
        time.sleep(PATIENCE)
    if not (said or error.agreed or (error.early and not first_on_node)):
        who = f"rank {rank} on {socket.gethostname()}"
        print(f"distlora ({who}): {hidden(str(error))}", file=sys.stderr, flush=True)
    return code


def show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own last words of a program that breaks, without secrets. For `sys.excepthook`."""
    print(hidden("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def rank_and_first_on_node() -> tuple[int, bool]:
    """This process's rank, and whether it is the first of its node, from the environment alone."""
    return own_rank(os.environ), own_local_rank(os.environ) == 0
