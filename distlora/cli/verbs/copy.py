"""`distlora copy`."""

import argparse
import shlex
from pathlib import Path

from distlora.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "copy", help="write a recipe, or another file that comes with distlora, to a file"
    )
    parser.add_argument("name", help="as `distlora recipes` lists it")
    parser.add_argument("target", nargs="?", type=Path, default=Path(), metavar="FILE",
                        help="a file that does not exist yet, or a folder; default: here")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Copies a file, and prints where it is."""
    from distlora.recipe.shipped import copy_shipped, shipped_recipes

    written = copy_shipped(options.name, options.target.expanduser())
    for path in written:
        print(path)
    if options.name in shipped_recipes():
        print(f"next: distlora train {shlex.quote(str(written[0]))} --dry-run")
