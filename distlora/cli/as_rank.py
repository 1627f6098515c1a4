"""`python -m distlora.cli.as_rank MARK WORD`: the program as a rank, with its command line packed into one
word.

DeepSpeed's pdsh launcher hands arguments to shells on other hosts as they are: spaces split them, and `$(…)`
is run. MARK is for who looks for the processes of one job.
"""

import os
import socket
import sys
from collections.abc import Sequence

from distlora.cluster.packed_command import unpack


def main(words: Sequence[str]) -> int:
    directory, arguments = unpack(words[-1])
    try:
        os.chdir(directory)
    except OSError as error:
        sys.stderr.write(
            f"distlora (on {socket.gethostname()}): {directory}: {error.strerror}; start from a directory that all hosts share\n"
        )
        return 2
    sys.argv = ["distlora", *arguments]  # what the environment report shows
    from distlora.cli.main import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
