"""What each verb of the command line does: one function a verb.

Every function takes the verb's options, prints its result, and returns an exit code or None. torch and the
libraries are imported within the functions: a signal must be caught before that, and a mistake in the command
line needs none of them.
"""

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from distlora.cli.arguments import size, whole_number, whole_numbers
from distlora.cli.ending import TRAINING_ERROR, end
from distlora.cli.summary import summary_table
from distlora.cluster.status import START_AGAIN, read_status
from distlora.cluster.stopping import StopSignals
from distlora.errors import Preempted, UserError, before_ranks_meet


def train(options: argparse.Namespace) -> int:
    """Runs a recipe, and prints a table of its outcome."""
    # At lower levels torch prints stack traces about connections that a dead rank has closed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Signals are caught before the libraries are imported, which takes seconds in which one may come.
    with StopSignals() as signals:
        try:
            return _train(options, signals)
        except Preempted as error:
            # Still within the block: once one rank has ended, a launcher may send signals to the others.
            return end(error, START_AGAIN, wait=False)


def _train(options: argparse.Namespace, signals: StopSignals) -> int:
    topology = _topology()
    recipe = _recipe(options.recipe, options.overrides)
    from distlora.training import train as training

    for note in recipe.notes:
        logging.getLogger("distlora").info("%s", note)
    training.check(recipe, topology, options.resume)
    summary = training.train(recipe, topology, options.resume, signals.asked)
    if topology.rank == 0:
        print(summary_table(summary))
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Evaluates a run's newest checkpoint, and prints one line a score."""
    topology = _topology()
    from distlora.training.run_directory import RECIPE

    with before_ranks_meet():
        if not (options.run_dir / RECIPE).exists():
            raise UserError(f"{options.run_dir} holds no run: it has no {RECIPE}")
    own_name = str(options.run_dir).replace("'", "''")  # quoted, so that YAML reads it as a text
    recipe = _recipe(options.run_dir / RECIPE, [*options.overrides, f"output_dir='{own_name}'"])
    from distlora.training import train as training

    training.check(recipe, topology, resume=True)
    for name, value in training.evaluate(recipe, topology).items():
        if topology.rank == 0:
            print(f"eval/{name} {value:.6f}")


def export(options: argparse.Namespace) -> None:
    """Exports a run's result, and prints where it is."""
    _log_to_terminal(shown=True)
    import torch

    from distlora.training.export_run import export_run

    done = export_run(
        options.run_dir,
        options.format,
        options.out,
        options.step,
        options.dtype and getattr(torch, options.dtype),
        options.compress_rank,
        options.max_error,
    )
    print(done.path)
    if done.compression:
        print(done.compression)


def status(options: argparse.Namespace) -> int:
    """Prints the status of a run. The exit code is `Status.code`."""
    run_dir = Path(options.recipe)
    if not run_dir.is_dir():
        run_dir = Path(_recipe(options.recipe, options.overrides).output_dir)
    found = read_status(run_dir)
    if found is None or (options.since is not None and found.seconds < options.since):
        print(f"{run_dir}: no status" + (" since then" if found else ""))
        return TRAINING_ERROR
    print(f"{run_dir}: {found.line}")
    return found.code


def plan(options: argparse.Namespace) -> None:
    """Prints memory and traffic of a recipe on clusters of several sizes."""
    _log_to_terminal(shown=False)
    nodes = whole_numbers("--nodes", options.nodes)
    gpus = whole_number("--gpus-per-node", options.gpus_per_node)
    gpu_memory = size("--gpu-memory", options.gpu_memory)
    samples = None if options.samples is None else whole_number("--samples", options.samples)
    recipe = _recipe(options.recipe, options.overrides)
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


def doctor(options: argparse.Namespace) -> int:
    """Examines the machines, and prints the findings."""
    # Set before torch is imported: its stack traces say nothing that the table does not say.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    topology = _topology()
    for note in topology.notes:
        logging.getLogger("distlora").info("%s", note)
    from distlora.doctor import examine, table
    from distlora.doctor.termination import exit_on_sigterm

    with exit_on_sigterm():
        result = examine.examine(
            topology,
            options.hostfile,
            options.recipe,
            options.run_dir,
            options.port,
            options.build,
            options.limit,
        )
    if result.told:
        print(table.table(result.findings, result.nodes))
    return result.code


def methods(options: argparse.Namespace) -> None:
    """Prints a table of all methods."""
    from distlora.report.methods_table import methods_table

    print(methods_table(options.recipe, options.overrides, options.rank, options.model))


def sweep(options: argparse.Namespace) -> None:
    """Checks a sweep. Prints its lines, or only the words of one line for a script."""
    from distlora.recipe.sweep import check_directories, line_of, read_sweep

    lines = read_sweep(options.file)
    chosen = None if options.line is None else line_of(options.file, options.line, lines)
    check_directories(options.file, lines, options.recipe, options.overrides)
    if chosen is not None:
        print("".join(f"{word}\0" for word in chosen), end="")
        return
    for number, words in enumerate(lines):
        print(number, shlex.join(words))


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": train,
    "eval": evaluate,
    "export": export,
    "status": status,
    "plan": plan,
    "doctor": doctor,
    "methods": methods,
    "sweep": sweep,
}


# ---------------------------------------------------------------------- what several verbs need


def _recipe(path: str | Path, overrides: Sequence[str]):
    from distlora.recipe.load import load_recipe

    with before_ranks_meet():
        return load_recipe(path, overrides)


def _topology():
    """The topology of this process, with the terminal prepared for its rank."""
    from distlora.cluster.topology import topology_from_environment

    topology = topology_from_environment()
    # DeepSpeed calls collectives by names that torch has replaced since, and every rank would warn of it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _log_to_terminal(shown=topology.rank == 0)
    return topology


def _log_to_terminal(shown: bool) -> None:
    """Shows the log on the terminal: all of it if `shown` (rank 0), else only errors (the other ranks)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    # The level is the handler's, not the logger's, because every rank has a log file as well.
    handler.setLevel(logging.INFO if shown else logging.ERROR)
    logger = logging.getLogger("distlora")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
