"""How the program ends: exit codes, and which rank says what is wrong."""

import os
import socket
import sys
import time

from distlora.cluster.rendezvous import own_local_rank, own_rank
from distlora.errors import Ending

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
        print(f"distlora: {error}", file=sys.stderr, flush=True)
        if error.parting is not None:
            error.parting()
        return code
    said = error.parting is not None and error.parting()
    if wait:
        time.sleep(PATIENCE)
    if not (said or error.agreed or (error.early and not first_on_node)):
        print(f"distlora (rank {rank} on {socket.gethostname()}): {error}", file=sys.stderr, flush=True)
    return code


def rank_and_first_on_node() -> tuple[int, bool]:
    """This process's rank, and whether it is the first of its node, from the environment alone."""
    return own_rank(os.environ), own_local_rank(os.environ) == 0
