"""`distlora recipes`."""

import argparse

from distlora.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "recipes", help="list the recipes and other files that come with distlora, or show one"
    )
    parser.add_argument("name", nargs="?", help="of a recipe, a sweep or another file")


def run(options: argparse.Namespace) -> None:
    """Prints a line for each file, or a whole file."""
    from distlora.cli.listings import recipes_text
    from distlora.recipe.shipped import shipped_file

    if options.name is None:
        print(recipes_text())
    else:
        print(shipped_file(options.name).read_text(encoding="utf-8"), end="")
