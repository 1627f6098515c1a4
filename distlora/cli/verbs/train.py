"""`distlora train`."""

import argparse
import logging
import sys

from distlora.cli import dry_run
from distlora.cli.arguments import Verbs, whole
from distlora.cli.progress import progress_shown
from distlora.cli.shared import add_quiet, read_recipe, this_topology, until_asked_to_stop
from distlora.cli.summary import summary_table
from distlora.cluster.stopping import StopSignals
from distlora.errors import before_ranks_meet

#: Samples of a dry run.
SHOWN = 2


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser("train", help="run a recipe")
    parser.add_argument("recipe", help="a YAML file, or a name that `distlora recipes` lists")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="changes to the recipe, such as train.lr=1e-3",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="demand a checkpoint to continue from, or begin anew; by default continue if there is one",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="continue the run of another host, which is known to be down, without waiting for its silence",
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="continue although the samples are not those that the run was begun with",
    )
    add_quiet(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the complete recipe, the plan and the first two samples with their loss mask; "
        "load no weights, write nothing",
    )
    parser.add_argument("--local_rank", "--local-rank", type=whole, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Runs a recipe, and prints a table of its outcome; or shows what it would do."""
    if options.dry_run:
        return _show(options)
    return until_asked_to_stop(lambda signals: _run(options, signals))


def _run(options: argparse.Namespace, signals: StopSignals) -> int:
    topology = this_topology(options.quiet)
    with progress_shown(topology.rank == 0 and not options.quiet):
        return _train(options, topology, signals)


def _train(options: argparse.Namespace, topology, signals: StopSignals) -> int:
    from distlora.cluster.early import failure_told

    with failure_told(topology):
        recipe = read_recipe(options.recipe, options.overrides)
        from distlora.training import train as training

        for note in recipe.notes:
            logging.getLogger("distlora").info("%s", note)
        training.check(recipe, topology, options.resume)
    summary = training.train(
        recipe, topology, options.resume, signals.asked, options.take_over, options.allow_changed_data
    )
    if topology.rank == 0:
        print(summary_table(summary))
    return 0


def _show(options: argparse.Namespace) -> int:
    topology = this_topology(options.quiet)
    if topology.rank > 0:
        return 0
    with progress_shown(not options.quiet):
        return _look(options, topology)


def _look(options: argparse.Namespace, topology) -> int:
    with before_ranks_meet():
        recipe = read_recipe(options.recipe, options.overrides)
        from distlora.training import train as training
        from distlora.training.preview import preview

        recipe, _ = training.check_run(recipe, topology.world_size, options.resume)
    coloured, encoding = dry_run.in_colour(sys.stdout), sys.stdout.encoding
    for note in recipe.notes:
        print(note)
    print(dry_run.title("recipe", coloured), dry_run.recipe_text(recipe, topology.world_size), sep="\n")
    print("", dry_run.title("plan", coloured), dry_run.plan_text(recipe, topology.world_size), sep="\n")
    print("", dry_run.title("first samples", coloured), sep="\n")
    samples = preview(recipe, SHOWN)
    if any(sample.label is None for sample in samples):
        print(dry_run.legend(coloured, encoding))
    for number, sample in enumerate(samples, 1):
        print("", dry_run.sample_text(number, sample, coloured, encoding), sep="\n")
    print("\nno weights were read, nothing was written; the same command without --dry-run trains")
    return 0
