"""`distlora sweep`."""

import argparse
import shlex
from pathlib import Path

from distlora.cli.arguments import Verbs, whole, whole_number
from distlora.cli.ending import end
from distlora.cli.shared import log_to_terminal
from distlora.cluster.status import START_AGAIN
from distlora.errors import Preempted, TrainingError, UserError
from distlora.files.confidential import refuse_secrets, shown_word


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "sweep",
        help="run every point of a sweep that is not done yet",
        description="A YAML file describes a sweep: a recipe, and a grid or a list of overrides. Its points "
        "are trained and evaluated one after the other. Exit code: 0 all done; 75 to be started again, also "
        "where another sweep runs some of the points; 1 points have failed; 2 a mistake, told before "
        "anything starts. Of a text file, with a line of overrides for each run and the recipe behind it, "
        "the lines are checked and shown.",
    )
    parser.add_argument(
        "file", help="YAML, see configs/sweeps; or lines of dotted.key=value …, quoted as in a shell"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[RECIPE] dotted.key=value",
        help="those that come before every point's own; before them, for a text file, the recipe",
    )
    parser.add_argument("--check", action="store_true", help="show the points; run nothing")
    parser.add_argument("--point", type=whole, metavar="N", help="only point N, counted from 0")
    parser.add_argument(
        "--launcher",
        metavar="WORDS",
        help="start each run with these words, not the file's; not with --slurm",
    )
    parser.add_argument("--slurm", action="store_true", help="submit what is not done as a job array")
    parser.add_argument("--sbatch", metavar="OPTIONS", help="with --slurm: sbatch's own, --sbatch='-N 2 …'")
    parser.add_argument("--jobs", metavar="N", help="with --slurm: at most N points at once")
    parser.add_argument(
        "--line",
        type=whole,
        metavar="N",
        help="only show line or point N, counted from 0: each word with a zero byte behind it",
    )


def run(options: argparse.Namespace) -> int:
    """Runs, submits, checks or shows a sweep."""
    if not options.slurm and (options.sbatch or options.jobs):
        raise UserError("--sbatch and --jobs are for --slurm; points are run one after the other here")
    if Path(options.file).suffix in (".yaml", ".yml"):
        return _run_file(options)
    return _show_lines(options)


def _show_lines(options: argparse.Namespace) -> int:
    """Checks a sweep of lines. Prints them, or only the words of one line for a script."""
    from distlora.sweeps.lines import check_directories, line_of, read_sweep

    if options.slurm or options.launcher or options.point is not None:
        raise UserError(
            f"{options.file} has lines, which launch/slurm.sbatch --sweep runs; "
            "a sweep that is run here is a .yaml file"
        )
    recipe, *common = options.overrides or [""]
    if not recipe or ("=" in recipe and not Path(recipe).exists()):
        raise UserError(f"which recipe do the lines of {options.file} change? distlora sweep FILE RECIPE")
    lines = read_sweep(options.file)
    for words in (common, *lines):
        refuse_secrets(words)
    chosen = None if options.line is None else line_of(options.file, options.line, lines)
    check_directories(options.file, lines, recipe, common)
    if chosen is not None:
        _print_words(chosen)
        return 0
    for number, words in enumerate(lines):
        print(number, shlex.join(words))
    return 0


def _run_file(options: argparse.Namespace) -> int:
    log_to_terminal(shown=True)
    jobs = None if options.jobs is None else whole_number("--jobs", options.jobs)
    from distlora.sweeps.check import check_sweep
    from distlora.sweeps.file import read_sweep_file
    from distlora.sweeps.states import states_of, table_of

    stray = next((word for word in options.overrides if "=" not in word), None)
    if stray is not None:
        raise UserError(
            f"{shown_word(stray)}: wanted dotted.key=value; {options.file} names its recipe itself"
        )
    sweep = read_sweep_file(options.file, options.overrides, options.launcher)
    for point in sweep.points:
        refuse_secrets(point.overrides)
    points = [_numbered(sweep, number) for number in (options.point, options.line) if number is not None]
    if options.line is not None:
        _print_words(points[-1].overrides)
        return 0
    points = points or sweep.points
    check_sweep(sweep)
    if options.check:
        for point in points:
            print(point.number, shlex.join(point.overrides))
        return 0
    try:
        if options.slurm:
            _submit(sweep, points, options, jobs)
        else:
            _conduct(sweep, points)
    except Preempted as error:
        print(table_of(states_of(sweep)), flush=True)
        return end(error, START_AGAIN, wait=False)
    except TrainingError:
        print(table_of(states_of(sweep)), flush=True)
        raise
    print(table_of(states_of(sweep)))
    return 0


def _conduct(sweep, points) -> None:
    from distlora.sweeps.conductor import conduct

    conduct(sweep, points)


def _submit(sweep, points, options: argparse.Namespace, jobs: int | None) -> None:
    from distlora.sweeps.job_array import missing, submit

    left = missing(sweep, points)
    if left:
        print(f"job {submit(sweep, left, options.overrides, options.sbatch or '', jobs)}: {len(left)} points")


def _numbered(sweep, number: int):
    if not 0 <= number < len(sweep.points):
        raise UserError(
            f"{sweep.path} has no point {number}, only {len(sweep.points)}, counted from 0; "
            "--check shows them"
        )
    return sweep.points[number]


def _print_words(words) -> None:
    print("".join(f"{word}\0" for word in words), end="")
