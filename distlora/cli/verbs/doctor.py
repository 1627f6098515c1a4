"""`distlora doctor`."""

import argparse
import logging
import os
from pathlib import Path

from distlora.cli.arguments import Verbs, decimal, whole
from distlora.cli.shared import this_topology
from distlora.cluster.rendezvous import DEFAULT_PORT


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "doctor", help="look for what is wrong with the machines, before a run finds out"
    )
    parser.add_argument(
        "hostfile",
        nargs="?",
        type=Path,
        help="lines of `host slots=N`, asked through ssh; default: this machine, or the job",
    )
    parser.add_argument(
        "--recipe", type=Path, help="also look for what this run needs: files, model, operators, output_dir"
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="the directory that all nodes must share; default: the recipe's, or the current one",
    )
    parser.add_argument(
        "--port", type=whole, help=f"where rank 0 listens; default: MASTER_PORT, or {DEFAULT_PORT}"
    )
    parser.add_argument(
        "--build", action=argparse.BooleanOptionalAction, default=True, help="build DeepSpeed's operators now"
    )
    parser.add_argument(
        "--limit", type=decimal, default=30.0, metavar="SECONDS", help="how long a silent rank is waited for"
    )
    parser.add_argument("--local_rank", "--local-rank", type=whole, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Examines the machines, and prints the findings."""
    # Set before torch is imported: its stack traces say nothing that the table does not say.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    topology = this_topology()
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
