"""`distlora monitor`."""

import argparse
import time
from pathlib import Path

from distlora.cli.arguments import whole_number
from distlora.errors import UserError

#: Seconds between two looks for runs that have begun meanwhile.
PAUSE = 10.0
HIGHEST_PORT = 65535


def add(verbs) -> None:
    parser = verbs.add_parser(
        "monitor",
        help="look at runs in TensorBoard",
        description="Starts TensorBoard over runs, which may still be running, and prints the address of a "
        "page with loss, learning rate, gradient norm and speed at its top. Runs that begin later in the "
        "same directories appear by themselves. Ctrl-C ends it.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or one of several, as a sweep's"
    )
    parser.add_argument(
        "--port", metavar="N", help="of this machine; default: 6006, or the next one that is free"
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help="on which it listens, for instance 0.0.0.0, on which everyone reaches it who reaches this "
        "machine; default: only this machine does",
    )


def run(options: argparse.Namespace) -> None:
    """Serves until it is interrupted. Errors: UserError."""
    port = None if options.port is None else whole_number("--port", options.port)
    if port is not None and port > HIGHEST_PORT:
        raise UserError(f"--port {options.port}: ports end at {HIGHEST_PORT}")
    from distlora.doctor.termination import exit_on_sigterm
    from distlora.report.board import first_screen, serving

    with exit_on_sigterm(), serving(options.runs, options.host, port) as (address, look_again):
        print(f"TensorBoard: {first_screen(address)}", flush=True)
        try:
            while True:
                time.sleep(PAUSE)
                look_again()
        except KeyboardInterrupt:
            return
