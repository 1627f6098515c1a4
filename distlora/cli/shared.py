"""What several verbs need: the recipe, the topology, and the log on the terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from distlora.cli.ending import end
from distlora.cluster.status import START_AGAIN
from distlora.cluster.stopping import StopSignals
from distlora.errors import Preempted, before_ranks_meet


def read_recipe(path: str | Path, overrides: Sequence[str]):
    """The recipe with its overrides. Errors: UserError."""
    from distlora.recipe.load import load_recipe

    with before_ranks_meet():
        return load_recipe(path, overrides)


def this_topology(quiet: bool = False):
    """The topology of this process, with the terminal prepared for its rank. quiet: warnings only."""
    from distlora.cluster.topology import topology_from_environment

    topology = topology_from_environment()
    # DeepSpeed calls collectives by names that torch has replaced since, and every rank would warn of it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    log_to_terminal(topology.rank == 0, logging.WARNING if quiet else logging.INFO)
    return topology


def log_to_terminal(shown: bool, least: int = logging.INFO) -> None:
    """Shows the log on the terminal: from the level `least` on if `shown` (rank 0), else only errors (the
    other ranks).
    """
    handler = _Terminal()
    handler.setFormatter(logging.Formatter("%(message)s"))
    # The level is the handler's, not the logger's, because every rank has a log file as well.
    handler.setLevel(least if shown else logging.ERROR)
    logger = logging.getLogger("distlora")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Terminal(logging.StreamHandler):
    """Writes to what standard error is at the time: above the bars, while there are some."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, stream) -> None:
        pass


def add_quiet(parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show neither progress nor log, only warnings")


def until_asked_to_stop(action: Callable[[StopSignals], int]) -> int:
    """The exit code of what a signal may end early: its own, or that of a run to be started again."""
    # At lower levels torch prints stack traces about connections that a dead rank has closed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Signals are caught before the libraries are imported, which takes seconds in which one may come.
    with StopSignals() as signals:
        try:
            return action(signals)
        except Preempted as error:
            # Still within the block: once one rank has ended, a launcher may send signals to the others.
            return end(error, START_AGAIN, wait=False)
