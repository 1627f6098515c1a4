"""An examination of the hosts of a hostfile through ssh, or of this machine."""

import secrets
import socket
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from distlora.cluster.addresses import free_port
from distlora.cluster.hostfile import Host, this_machine_alone
from distlora.doctor import facts, reduction
from distlora.doctor.findings import Finding, Node
from distlora.doctor.remote import Answer, ask_all
from distlora.doctor.subject import BUILD_LIMIT, SHORT, Report, Subject, judge_nodes

#: Ranks of the all-reduce on a machine without an accelerator, where nothing says how many.
CPU_RANKS = 2


def examine_hosts(hosts: Sequence[Host | None], subject: Subject, port: int, limit: float) -> Report:
    """hosts: [None] means this machine, of which no slots are known."""
    token = secrets.token_hex(4)
    here = hosts[0] is None or this_machine_alone(hosts)
    doors = [None] if here else [host.name for host in hosts]
    master = "127.0.0.1" if here else hosts[0].address
    requests = [
        subject.request(token, index) | {"master": master, "port": port, "is_master": index == 0}
        for index in range(len(hosts))
    ]
    try:
        heard = ask_all(doors, requests, facts.LIMIT + (BUILD_LIMIT if subject.operators else 0) + SHORT)
        looked = ask_all(
            doors, [{"do": "look", "run_dir": subject.run_dir, "mark": token}] * len(hosts), SHORT
        )
    finally:
        ask_all(doors, [{"do": "forget", "run_dir": subject.run_dir, "mark": token}] * len(hosts), SHORT)
    nodes = [_node(host, answer, look) for host, answer, look in zip(hosts, heard, looked)]
    there = [(node, door) for node, door in zip(nodes, doors) if not node.problem]
    findings = judge_nodes(nodes)
    if there:
        findings += _reduce(there, master if not nodes[0].problem else None, port, limit)
    return Report(findings, [node.name for node in nodes])


def _node(host: Host | None, heard: Answer, looked: Answer) -> Node:
    node = Node(host.name, slots=host.slots, place=host.place) if host else Node(socket.gethostname())
    if heard.problem or not heard.values:
        return replace(node, problem=heard.problem or "said nothing")
    node = replace(node, facts=heard.values[-1])
    if looked.problem or not looked.values:
        return node
    look = looked.values[-1]
    middle, doubt = (looked.asked + looked.answered) / 2, (looked.answered - looked.asked) / 2
    marks = None if look["marks"] is None else tuple(look["marks"])
    return replace(node, skew=look["time"] - middle, doubt=doubt, marks=marks)


def _reduce(
    there: Sequence[tuple[Node, str | None]], master: str | None, port: int, limit: float
) -> list[Finding]:
    """The all-reduce between the nodes that answer. master: None if the first host is not among them."""
    first = there[0][0]
    taken = first.fact("port") or {}
    if master is None:
        master = first.name.rpartition("@")[2]
    if taken.get("problem"):
        port = taken["another"]  # what holds the other one has been told
    elif not taken and there[0][1] is None:
        port = free_port()
    counts = [_rank_count(node) for node, _ in there]
    starts = [end - count for end, count in zip(accumulate(counts), counts)]
    shared = {"do": "ranks", "world": sum(counts), "master": master, "port": port, "limit": limit}
    requests = [shared | {"first": start, "count": count} for start, count in zip(starts, counts)]
    heard = ask_all([door for _, door in there], requests, 3 * limit + 60 + SHORT)
    ranks = {
        start + i: node.name for start, count, (node, _) in zip(starts, counts, there) for i in range(count)
    }
    outcomes = [outcome for answer in heard for outcome in answer.values]
    return reduction.judge(outcomes, ranks, f"{master}:{port}")


def _rank_count(node: Node) -> int:
    """A rank for each slot that is really there."""
    devices = len((node.fact("accelerators") or {}).get("devices", ()))
    if node.slots is None:
        return devices or CPU_RANKS
    # Where no device is seen, a login node's 8 slots must not become 8 interpreters of half a gigabyte.
    return min(node.slots, devices or CPU_RANKS)
