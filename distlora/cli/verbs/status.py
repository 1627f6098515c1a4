"""`distlora status`."""

import argparse
from pathlib import Path

from distlora.cli.arguments import Verbs, decimal
from distlora.cli.ending import TRAINING_ERROR
from distlora.cli.shared import read_recipe
from distlora.cluster.lease import living_owner
from distlora.cluster.status import read_status


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "status",
        help="what became of a run",
        description="One line about the newest start of a run. Exit code: 0 done; "
        "75 to be started again (it was asked to stop, or a rank went silent); "
        "1 failed, still running (then it says where) or killed, or nothing to tell.",
    )
    parser.add_argument("recipe", help="a recipe, or a run's output directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="those that the run was started with"
    )
    parser.add_argument(
        "--since",
        type=decimal,
        metavar="SECONDS",
        help="nothing that was written before this time since the epoch",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the status of a run. The exit code is `Status.code`."""
    run_dir = Path(options.recipe)
    if not run_dir.is_dir():
        run_dir = Path(read_recipe(options.recipe, options.overrides).output_dir)
    found = read_status(run_dir)
    if found is None or (options.since is not None and found.seconds < options.since):
        print(f"{run_dir}: no status" + (" since then" if found else ""))
        return TRAINING_ERROR
    owner = living_owner(run_dir)
    print(f"{run_dir}: {found.line(owner and owner.where)}")
    return found.code
