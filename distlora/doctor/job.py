"""An examination within a job: every rank takes part, one rank a node collects facts, rank 0 reports."""

import os
import socket
import time

from distlora.cluster.addresses import free_port
from distlora.doctor import facts, reduction, storage
from distlora.doctor.findings import Finding, Node
from distlora.doctor.node import answers
from distlora.doctor.subject import BUILD_LIMIT, SHORT, Report, Subject, judge_nodes
from distlora.engine.comm import RollCall, Topology
from distlora.errors import Ending, UserError

#: Seconds between the first and the last rank that leaves an exchange, at most.
_DOUBT = 0.5


def examine_job(topology: Topology, subject: Subject, limit: float) -> Report:
    """Examines the nodes of this job. Collective over all ranks that arrive.

    limit: seconds that ranks wait for each other. Rank 0 gets all findings and shows them. The other ranks
    get one finding that only gives them rank 0's exit code. A rank that cannot reach the master shows that
    itself.
    """
    host = socket.gethostname()
    try:
        roll = RollCall(topology, limit)
        present = roll.exchange(
            "presence", {"host": host, "token": f"{os.getpid()}-{time.time_ns()}", "port": free_port()}
        )
        if topology.rank not in present:
            raise UserError(
                f"rank {topology.rank} came after the {limit:g} s that ranks are waited for; raise --limit"
            )
        nodes = _collect(topology, subject, roll, present)
        findings = judge_nodes(nodes)
        findings += _absent_ranks(topology, present, nodes) or _reduce(topology, roll, present, limit)
        failed = roll.exchange("verdict", any(finding.level == "failure" for finding in findings))[0]
    except Ending as error:
        remedy = (
            "see that MASTER_ADDR names the host of rank 0, in a network that all nodes share, "
            "and MASTER_PORT is open"
        )
        return Report([Finding("rendezvous", "failure", (host,), str(error), remedy)], [host])
    if topology.rank:
        findings = [Finding("verdict", "failure" if failed else "ok", (host,), "is rank 0's")]
    return Report(findings, [node.name for node in nodes], told=topology.rank == 0)


def _collect(topology: Topology, subject: Subject, roll: RollCall, present: dict[int, dict]) -> list[Node]:
    """The nodes with their facts, on every rank. present: rank -> what it has told of itself."""
    speakers = _speakers(present)
    index = list(speakers).index(socket.gethostname())
    token = present[min(present)]["token"].replace("-", "_")
    speaks = topology.rank in speakers.values()
    master = {"master": topology.master[0], "port": None, "is_master": False}
    try:
        found = facts.collect(subject.request(token, index) | master) if speaks else None
        heard = roll.exchange("facts", found, facts.LIMIT + BUILD_LIMIT + SHORT)
        now = time.time()  # every rank leaves the exchange at nearly the same time
        seen = roll.exchange(
            "look", {"time": now, "marks": _marks(subject.run_dir, token) if speaks else None}, SHORT
        )
    finally:
        if speaks:
            storage.remove_marks(subject.run_dir, token)
    return [
        Node(
            host, heard.get(rank) or {}, slots=sum(other["host"] == host for other in present.values()),
            problem=None if heard.get(rank) else f"rank {rank} said nothing",
            skew=seen[rank]["time"] - seen[min(seen)]["time"] if rank in seen else None, doubt=_DOUBT,
            marks=tuple(seen[rank]["marks"] or ()) if rank in seen else None,
        )
        for host, rank in speakers.items()
    ]  # fmt: skip


def _marks(run_dir: str, token: str) -> list[str] | None:
    try:
        return storage.marks(run_dir, token)
    except OSError:
        return None


def _speakers(present: dict[int, dict]) -> dict[str, int]:
    """Host -> its lowest rank, which speaks for it."""
    found: dict[str, int] = {}
    for rank, other in sorted(present.items()):
        found.setdefault(other["host"], rank)
    return found


def _absent_ranks(topology: Topology, present: dict[int, dict], nodes: list[Node]) -> list[Finding]:
    """A finding about the ranks that have not arrived; empty if all have."""
    missing = [rank for rank in range(topology.world_size) if rank not in present]
    if not missing:
        return []
    whom = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    address = "{}:{}".format(*topology.master)
    found = f"{whom} of {topology.world_size} did not come to {address}"
    remedy = (
        "look at the logs of these ranks: they were not started, "
        "or do not find that address (firewall, name, interface)"
    )
    return [Finding("rendezvous", "failure", tuple(node.name for node in nodes), found, remedy)]


def _reduce(topology: Topology, roll: RollCall, present: dict[int, dict], limit: float) -> list[Finding]:
    """The all-reduce. Each rank starts a process for it, on another port.

    A transport that hangs or aborts then ends only that process.
    """
    port = present[0]["port"]
    request = {
        "first": topology.rank, "count": 1, "local": topology.local_rank, "world": topology.world_size,
        "master": topology.master[0], "port": port, "limit": limit,
    }  # fmt: skip
    said = [value for line in reduction.run_ranks(request) for value in answers(line)]
    outcomes = [
        outcome for some in roll.exchange("outcomes", said, 3 * limit + 60).values() for outcome in some
    ]
    ranks = {rank: other["host"] for rank, other in present.items()}
    return reduction.judge(outcomes, ranks, f"{request['master']}:{port}")
