"""`distlora eval`."""

import argparse
from pathlib import Path

from distlora.cli import judge_predictions
from distlora.cli.shared import read_recipe, this_topology
from distlora.errors import UserError, before_ranks_meet


def add(verbs) -> None:
    parser = verbs.add_parser("eval", help="evaluate a run's newest checkpoint on its evaluation split")
    parser.add_argument("run_dir", type=Path, nargs="?", help="the run's output directory")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    judge_predictions.add_options(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluates a run's newest checkpoint, or judges a file of answers, and prints one line a score."""
    if options.predictions is not None:
        for line in judge_predictions.scores(options):
            print(line)
        return
    for name in ("task", "out"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} goes with --predictions, which judges a file of answers")
    if options.run_dir is None:
        raise UserError("eval needs a run's output directory, or --predictions with a file of answers")
    topology = this_topology()
    from distlora.training.run_directory import RECIPE

    with before_ranks_meet():
        if not (options.run_dir / RECIPE).exists():
            raise UserError(f"{options.run_dir} holds no run: it has no {RECIPE}")
    own_name = str(options.run_dir).replace("'", "''")  # quoted, so that YAML reads it as a text
    recipe = read_recipe(options.run_dir / RECIPE, [*options.overrides, f"output_dir='{own_name}'"])
    from distlora.training import train as training

    training.check(recipe, topology, resume=True)
    for name, value in training.evaluate(recipe, topology).items():
        if topology.rank == 0:
            print(f"eval/{name} {value:.6f}")
