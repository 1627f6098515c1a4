"""`distlora doctor`: decides which nodes are examined, and for what."""

import os
import re
from dataclasses import replace
from pathlib import Path

from distlora.cluster.hostfile import read_hostfile
from distlora.cluster.rendezvous import DEFAULT_PORT
from distlora.doctor.hosts import examine_hosts
from distlora.doctor.job import examine_job
from distlora.doctor.subject import Report, subject_of
from distlora.engine.comm import Topology
from distlora.errors import UserError, before_ranks_meet

#: Seconds.
_LONGEST_WAIT = 24 * 60 * 60


def examine(
    topology: Topology,
    hostfile: Path | None = None,
    recipe: Path | None = None,
    run_dir: Path | None = None,
    port: int | None = None,
    build: bool = True,
    limit: float = 30.0,
) -> Report:
    """Examines the hosts of a hostfile, the nodes of the job that this process belongs to, or this machine.

    port: rank 0's; the default is MASTER_PORT, or else `DEFAULT_PORT`. build: whether DeepSpeed's operators
    are built. limit: seconds to wait for a silent rank. Raises UserError for a mistake in the hostfile, the
    recipe or a number.
    """
    with before_ranks_meet():
        port = _port(port)
        if not 0 < limit <= _LONGEST_WAIT:
            raise UserError(f"--limit {limit} is no time to wait; give seconds above 0, up to a day")
    if hostfile is not None and topology.world_size > 1:
        raise UserError(
            f"{topology.world_size} ranks would each ask the hosts of {hostfile}; "
            "start one, or leave the hostfile out",
            agreed=True,
        )
    in_job = topology.world_size > 1
    if in_job and recipe and not recipe.exists():
        # The recipe may be missing on this node only. Rank 0 reports it, with all other findings.
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
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or not 1 <= int(text) <= 65535:
        raise UserError(
            f"{'MASTER_PORT=' if given is None else '--port '}{text} is no port; "
            "give a number from 1 to 65535"
        )
    return int(text)
