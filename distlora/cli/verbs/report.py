"""`distlora report`."""

import argparse
import shlex
from pathlib import Path

from distlora.cli.arguments import Verbs, whole_number
from distlora.files.confidential import shown_word


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "report",
        help="compare runs: tables and pictures on a page",
        description="Writes report.md, report.html (one file with everything in it) and PNG pictures: "
        "scores, losses, the cost of initialisation, speed, memory and inference of all runs, and how to "
        "repeat them. Runs may still be running.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or one of several"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="new, or with an earlier report, which is replaced",
    )
    parser.add_argument(
        "--smooth", metavar="N", help="steps that are averaged in training curves; default: a 30th of the run"
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="only scores of this task; may be repeated",
    )


def run(options: argparse.Namespace) -> None:
    """Writes a report, and prints where it is."""
    smooth = None if options.smooth is None else whole_number("--smooth", options.smooth)
    from distlora.report.build import write_report

    print(write_report(options.runs, options.out, _command(options), smooth, options.task))


def _command(options: argparse.Namespace) -> str:
    """The command that makes the same report."""
    words = ["distlora", "report", *map(str, options.runs), "--out", str(options.out)]
    if options.smooth is not None:
        words += ["--smooth", options.smooth]
    for task in options.task:
        words += ["--task", task]
    return shlex.join(map(shown_word, words))
