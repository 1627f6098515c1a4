"""An examination from outside: of the hosts of a hostfile through ssh, or of this machine."""

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

#: Ranks of the all-reduce on a node without an accelerator.
CPU_RANKS = 2


def examine_hosts(hosts: Sequence[Host | None], subject: Subject, port: int, limit: float) -> Report:
    """Examines these hosts; [None] means this machine. port: rank 0's. limit: seconds to wait for a rank."""
    token = secrets.token_hex(4)
    here = hosts[0] is None or this_machine_alone(hosts)
    targets = [None] if here else [host.name for host in hosts]  # as `ask_all` takes them
    master = "127.0.0.1" if here else hosts[0].address
    requests = [
        subject.request(token, index) | {"master": master, "port": port, "is_master": index == 0}
        for index in range(len(hosts))
    ]
    try:
        told = ask_all(targets, requests, facts.LIMIT + (BUILD_LIMIT if subject.operators else 0) + SHORT)
        # The marks are read once all nodes have left theirs.
        looked = ask_all(
            targets, [{"do": "look", "run_dir": subject.run_dir, "mark": token}] * len(hosts), SHORT
        )
    finally:
        ask_all(targets, [{"do": "forget", "run_dir": subject.run_dir, "mark": token}] * len(hosts), SHORT)
    nodes = [_node(host, answer, look) for host, answer, look in zip(hosts, told, looked)]
    answering = [(node, target) for node, target in zip(nodes, targets) if not node.problem]
    findings = judge_nodes(nodes)
    if answering:
        findings += _reduce(answering, master if not nodes[0].problem else None, port, limit)
    return Report(findings, [node.name for node in nodes])


def _node(host: Host | None, told: Answer, looked: Answer) -> Node:
    """told: the answer to "facts". looked: the answer to "look"."""
    node = Node(host.name, slots=host.slots, place=host.place) if host else Node(socket.gethostname())
    if told.problem or not told.values:
        return replace(node, problem=told.problem or "said nothing")
    node = replace(node, facts=told.values[-1])
    if looked.problem or not looked.values:
        return node
    look = looked.values[-1]
    middle, doubt = (looked.asked + looked.answered) / 2, (looked.answered - looked.asked) / 2
    marks = None if look["marks"] is None else tuple(look["marks"])
    return replace(node, skew=look["time"] - middle, doubt=doubt, marks=marks)


def _reduce(
    answering: Sequence[tuple[Node, str | None]], master: str | None, port: int, limit: float
) -> list[Finding]:
    """The all-reduce between the nodes that answer. master: None if the first host is not among them."""
    first, target = answering[0]
    port_facts = first.fact("port") or {}
    if master is None:
        master = first.name.rpartition("@")[2]
    if port_facts.get("problem"):
        port = port_facts["another"]  # a finding about the first port exists already
    elif not port_facts and target is None:
        port = free_port()
    counts = [_rank_count(node) for node, _ in answering]
    starts = [end - count for end, count in zip(accumulate(counts), counts)]
    shared = {"do": "ranks", "world": sum(counts), "master": master, "port": port, "limit": limit}
    requests = [shared | {"first": start, "count": count} for start, count in zip(starts, counts)]
    told = ask_all([target for _, target in answering], requests, 3 * limit + 60 + SHORT)
    ranks = {
        start + i: node.name
        for start, count, (node, _) in zip(starts, counts, answering)
        for i in range(count)
    }
    outcomes = [outcome for answer in told for outcome in answer.values]
    return reduction.judge(outcomes, ranks, f"{master}:{port}")


def _rank_count(node: Node) -> int:
    """One rank for each slot that has a device."""
    devices = len((node.fact("accelerators") or {}).get("devices", ()))
    if node.slots is None:
        return devices or CPU_RANKS
    # Without a device there are only a few ranks: each is an interpreter of half a gigabyte, and a login node
    # may have many slots.
    return min(node.slots, devices or CPU_RANKS)
