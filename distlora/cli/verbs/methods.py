"""`distlora methods`."""

import argparse
import logging

from distlora.cli.arguments import Verbs, whole
from distlora.cli.shared import log_to_terminal


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "methods",
        help="compare the methods",
        description="Every method in a line: what it trains, how much that is, what it needs, "
        "and what its result can become. With a recipe or a model the numbers are those of the model, "
        "from its config alone; no weight is loaded.",
    )
    parser.add_argument("recipe", nargs="?", help="whose model, targets, rank and optimizer are taken")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the recipe")
    parser.add_argument("--rank", type=whole, metavar="R", help="of all methods; default: the recipe's, or 8")
    parser.add_argument(
        "--model", metavar="PATH", help="in place of the recipe's: a directory, a hub name, or pypi:<package>"
    )


def run(options: argparse.Namespace) -> None:
    """Prints a table of all methods."""
    log_to_terminal(shown=True, least=logging.WARNING)
    from distlora.report.methods_table import methods_table

    print(methods_table(options.recipe, options.overrides, options.rank, options.model))
