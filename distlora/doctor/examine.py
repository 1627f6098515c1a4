"""`distlora doctor`: who is asked what."""

import os
from dataclasses import replace
from pathlib import Path

from distlora.cluster.hostfile import read_hostfile
from distlora.cluster.rendezvous import DEFAULT_PORT
from distlora.doctor.allocation import examine_job
from distlora.doctor.hosts import examine_hosts
from distlora.doctor.subject import Report, subject_of
from distlora.engine.comm import Topology
from distlora.errors import UserError, before_ranks_meet


def examine(
    topology: Topology,
    hostfile: Path | None = None,
    recipe: Path | None = None,
    run_dir: Path | None = None,
    port: int | None = None,
    build: bool = True,
    limit: float = 30.0,
) -> Report:
    """Looks at the hosts of a hostfile, at the nodes of the job that this process is a rank of, or at this
    machine.

    port: of rank 0; default: MASTER_PORT, or 29500. build: whether DeepSpeed's operators are built. limit:
    seconds that a silent rank is waited for. Errors: UserError for a mistake in the hostfile, the recipe or a
    number.
    """
    with before_ranks_meet():
        port = _port(port)
        if not limit > 0:
            raise UserError(f"--limit {limit} is no time to wait; give seconds above 0")
    if hostfile is not None and topology.world_size > 1:
        raise UserError(
            f"{topology.world_size} ranks would each ask the hosts of {hostfile}; start one, or leave the hostfile out",
            agreed=True,
        )
    in_job = topology.world_size > 1
    if in_job and recipe and not recipe.exists():
        # On this node, but maybe not on rank 0's, which is to tell it with all the rest.
        subject = replace(subject_of(None, run_dir, build), paths={"recipe": str(recipe)})
    else:
        with before_ranks_meet():
            subject = subject_of(recipe, run_dir, build)
    if hostfile is not None:
        return examine_hosts(read_hostfile(hostfile), subject, port, limit)
    if in_job:
        return examine_job(topology, subject, limit)
    return examine_hosts([None], subject, port, limit)


def _port(given: int | None) -> int:
    text = os.environ.get("MASTER_PORT", str(DEFAULT_PORT)) if given is None else str(given)
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise UserError(
            f"{'MASTER_PORT=' if given is None else '--port '}{text} is no port; give a number from 1 to 65535"
        )
    return int(text)
