"""`python -m distlora.cli.as_rank MARK WORD`: runs the command line that is packed into WORD, as a rank.

DeepSpeed's pdsh launcher passes arguments unquoted to shells on other hosts, which split them at spaces and
run `$(…)`. The launch scripts find the processes of a job by MARK.
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
            f"distlora (on {socket.gethostname()}): {directory}: {error.strerror}; "
            "start from a directory that all hosts share\n"
        )
        return 2
    sys.argv = ["distlora", *arguments]  # for the environment report
    from distlora.cli.main import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
