"""`distlora verify`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from distlora.cli.arguments import Verbs
from distlora.errors import UserError
from distlora.sentences import counted


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "verify",
        help="whether a run's checkpoints and exports are whole",
        description="Compares all checksums, and says in a line for each what can be done with it. "
        "Exit code: 0 if all is whole, 2 if something is not.",
    )
    parser.add_argument("path", type=Path, help="a run's output directory, a checkpoint, or an export")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(options: argparse.Namespace) -> None:
    """Prints what is whole. Raises UserError where something is not."""
    from distlora.training.verified import verify

    found = verify(options.path)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        for finding in found:
            print(finding.line())
    broken = [finding for finding in found if finding.problem]
    if broken:
        raise UserError(
            f"{options.path}: {len(broken)} of {counted(len(found), 'part')} cannot be used, such as "
            f"{broken[0].line()}"
        )
