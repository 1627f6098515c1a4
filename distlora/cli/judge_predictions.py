"""`distlora eval --predictions`: answers that were generated elsewhere. It needs no run, and no torch."""

import argparse
from pathlib import Path

from distlora.errors import UserError

#: Options for the answers of a model.
OF_MODELS = ("model", "adapter", "tasks", "data", "limit", "batch_size", "by", "merge", "fresh")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this mode, beside `--out`."""
    parser.add_argument("--task", help="with --predictions: the task whose rule judges the answers")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help='judge answers that were generated elsewhere: JSONL with "output" and "answer"',
    )


def scores(options: argparse.Namespace) -> list[str]:
    """Judges the file that the options name, and returns the lines to print. Errors: UserError."""
    for name in ("task", "out"):
        if getattr(options, name) is None:
            raise UserError(f"--predictions needs --{name} as well")
    if options.run_dir is not None or options.overrides:
        raise UserError("--predictions judges a file, leave out the run's directory and the overrides")
    for name in OF_MODELS:
        if getattr(options, name) not in (None, False, []):
            raise UserError(f"--predictions judges a file, leave out --{name.replace('_', '-')}")
    from distlora.evaluation.judge_file import judge_file

    right, total = judge_file(options.task, options.predictions, options.out)
    return [f"eval/exact_match {right / total:.6f}", f"eval/right {right} of {total}"]
