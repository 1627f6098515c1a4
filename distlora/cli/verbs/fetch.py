"""`distlora fetch`."""

import argparse

from distlora.cli.progress import progress_shown
from distlora.cli.shared import add_quiet, log_to_terminal, read_recipe


def add(verbs) -> None:
    parser = verbs.add_parser(
        "fetch",
        help="bring a recipe's model and data into the caches",
        description="For a login node: afterwards the run needs no network, and HF_HUB_OFFLINE=1 may be set.",
    )
    parser.add_argument("recipe", help="a YAML file, or a name that `distlora recipes` lists")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Fetches, and prints where the model is and how many samples there are."""
    log_to_terminal(shown=not options.quiet)
    recipe = read_recipe(options.recipe, options.overrides)
    from distlora.data import download
    from distlora.models.hub import resolve_path
    from distlora.training.samples import splits_read

    with progress_shown(not options.quiet):
        print(f"model: {resolve_path(recipe.model.path)}")
        for section, split in splits_read(recipe):
            download(section, split)
            print(f"data: {section.path or section.task}, split {split}")
    print("on a node without a network: HF_HUB_OFFLINE=1")
