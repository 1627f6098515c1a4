"""What several verbs need: the recipe, the topology, and the log on the terminal."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from distlora.errors import before_ranks_meet


def read_recipe(path: str | Path, overrides: Sequence[str]):
    """The recipe with its overrides. Errors: UserError."""
    from distlora.recipe.load import load_recipe

    with before_ranks_meet():
        return load_recipe(path, overrides)


def this_topology():
    """The topology of this process, with the terminal prepared for its rank."""
    from distlora.cluster.topology import topology_from_environment

    topology = topology_from_environment()
    # DeepSpeed calls collectives by names that torch has replaced since, and every rank would warn of it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    log_to_terminal(shown=topology.rank == 0)
    return topology


def log_to_terminal(shown: bool) -> None:
    """Shows the log on the terminal: all of it if `shown` (rank 0), else only errors (the other ranks)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    # The level is the handler's, not the logger's, because every rank has a log file as well.
    handler.setLevel(logging.INFO if shown else logging.ERROR)
    logger = logging.getLogger("distlora")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
