"""`distlora eval`."""

import argparse
from pathlib import Path

from distlora.cli import judge_predictions
from distlora.cli.arguments import Verbs, whole_number
from distlora.cli.progress import progress_shown
from distlora.cli.shared import add_quiet, this_topology, until_asked_to_stop
from distlora.cluster.stopping import StopSignals
from distlora.errors import UserError, before_ranks_meet


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "eval",
        help="evaluate a run's newest checkpoint, or another model",
        description="A run's newest checkpoint on its own evaluation split; with --tasks, a run or any other "
        "model on these.",
    )
    parser.add_argument("run_dir", nargs="?", type=Path, help="the run's output directory")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--model", metavar="PATH", help="in place of a run: a directory, or a hub name")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="of --model: a LoRA or DoRA of PEFT's")
    parser.add_argument("--tasks", metavar="T1,T2", help="names of tasks and suites, see README")
    parser.add_argument(
        "--data", action="append", default=[], metavar="TASK=PATH", help="a task's data; by default its own"
    )
    parser.add_argument("--limit", metavar="N", help="the first N questions of each task")
    parser.add_argument("--batch-size", metavar="N", help="rows of a batch at most")
    parser.add_argument("--by", choices=("generation", "likelihood"), help="default: generation")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights first")
    parser.add_argument("--fresh", action="store_true", help="remove earlier predictions of these tasks")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PLACE",
        help="a directory for the files, by default the run's; with --predictions: a file for the same lines "
        'with "right" added',
    )
    judge_predictions.add_options(parser)
    add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluates, or judges a file of answers, and prints one line a score."""
    if options.predictions is not None:
        for line in judge_predictions.scores(options):
            print(line)
        return 0
    if options.task is not None:
        raise UserError("--task goes with --predictions, which judges a file of answers; here it is --tasks")
    return until_asked_to_stop(lambda signals: _run(options, signals))


def _run(options: argparse.Namespace, signals: StopSignals) -> int:
    topology = this_topology(options.quiet)
    with progress_shown(topology.rank == 0 and not options.quiet):
        return _evaluate(options, topology, signals)


def _evaluate(options: argparse.Namespace, topology, signals: StopSignals) -> int:
    from distlora.cluster.early import failure_told

    with failure_told(topology):
        with before_ranks_meet():
            _check_words(options)
            asked, subject = _read(options)
        from distlora.training import evaluate

        evaluate.check(subject, topology, asked)
    for task, scores in evaluate.evaluate(subject, topology, asked, signals.asked).items():
        for name, value in scores.items():
            if topology.rank == 0:
                print(f"eval/{task}{'/' if task else ''}{name} {value:.6f}")
    return 0


def _check_words(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if options.model and options.run_dir is not None and "=" in str(options.run_dir):
        options.overrides, options.run_dir = [str(options.run_dir), *options.overrides], None
    if options.model and options.run_dir is not None:
        raise UserError(f"{options.run_dir} and --model were both given; give a run or a model")
    if not options.model and options.adapter is not None:
        raise UserError("--adapter is for --model, whose adapter it is; a run has its own")
    if not options.model and options.run_dir is None:
        raise UserError(
            "nothing to evaluate was given; name a run's output directory, --model, or --predictions"
        )
    if options.tasks is None:
        if options.model:
            raise UserError("--model needs --tasks; name one, such as --tasks gsm8k")
        given = {
            "--data": options.data, "--limit": options.limit, "--batch-size": options.batch_size,
            "--by": options.by, "--merge": options.merge, "--fresh": options.fresh, "--out": options.out,
        }  # fmt: skip
        for name, value in given.items():
            if value:
                raise UserError(f"{name} is for --tasks; name them, or leave it out")


def _read(options: argparse.Namespace):
    """What is asked for, and of what."""
    limit, batch_size = (
        whole_number(name, text) if text is not None else None
        for name, text in (("--limit", options.limit), ("--batch-size", options.batch_size))
    )
    data = []
    for word in options.data:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UserError(f"--data {word}: wanted TASK=PATH, as in gsm8k=data/gsm8k")
        data.append((name.strip(), path))
    tasks = tuple(filter(None, (name.strip() for name in (options.tasks or "").split(","))))
    if options.tasks is not None and not tasks:
        raise UserError("--tasks is empty; name one, such as --tasks gsm8k")
    from distlora.tasks import scored_tasks
    from distlora.training.evaluated import Asked, subject_of_model, subject_of_run

    asked = Asked(
        tasks, tuple(data), limit, batch_size, options.by, options.merge, options.fresh, options.out
    )
    if options.model:
        return asked, subject_of_model(
            options.model, options.adapter, scored_tasks(tasks)[0], options.overrides
        )
    return asked, subject_of_run(options.run_dir, options.overrides)
