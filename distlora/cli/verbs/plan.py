"""`distlora plan`."""

import argparse
import logging
from pathlib import Path

from distlora.cli.arguments import Verbs, size, whole_number, whole_numbers
from distlora.cli.shared import log_to_terminal, read_recipe


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "plan", help="memory and traffic of a recipe on a cluster, before anything is loaded or started"
    )
    parser.add_argument("recipe", help="a YAML file, or a name that `distlora recipes` lists")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--nodes", default="1,2,4,8,16,32,64,128", metavar="N[,N…]", help="default: 1 to 128")
    parser.add_argument("--gpus-per-node", default="8", metavar="G", help="default: 8")
    parser.add_argument("--gpu-memory", default="80", metavar="GIB", help="of one GPU; default: 80")
    parser.add_argument(
        "--samples", metavar="N", help="of the training set, where data.split does not say it"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw a picture (needs matplotlib)"
    )


def run(options: argparse.Namespace) -> None:
    """Prints memory and traffic of a recipe on clusters of several sizes."""
    log_to_terminal(shown=True, least=logging.WARNING)
    nodes = whole_numbers("--nodes", options.nodes)
    gpus = whole_number("--gpus-per-node", options.gpus_per_node)
    gpu_memory = size("--gpu-memory", options.gpu_memory)
    samples = None if options.samples is None else whole_number("--samples", options.samples)
    recipe = read_recipe(options.recipe, options.overrides)
    from distlora.plan import Plan, side_by_side
    from distlora.plan.picture import check_picture, draw
    from distlora.plan.table import table

    if options.plot:
        check_picture(options.plot)
    columns = side_by_side(recipe, nodes, gpus, samples)
    print(table(columns, gpus, gpu_memory))
    if options.plot:
        draw([column for _, column in columns if isinstance(column, Plan)], gpu_memory, options.plot)
        print(options.plot)
