"""What the facts of all nodes mean together. Pure functions from nodes to findings; a node that cannot be
reached has no facts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from distlora.cluster.addresses import is_loopback
from distlora.doctor.findings import Finding, Node, gib, known

#: Seconds by which clocks differ, from which on this is a warning or a failure.
SKEW_WARNING, SKEW_FAILURE = 2.0, 60.0
#: Versions that must be equal on all nodes. A difference in any other version is a warning.
MUST_BE_EQUAL = ("python", "torch", "deepspeed", "distlora", "transformers", "cuda", "nccl")


def names(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def check_reachable(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        if node.problem:
            place = f"{node.place}: " if node.place else ""
            remedy = f"make `ssh {node.name} true` work without a password (BatchMode), or remove the host"
            if not node.problem.startswith(("cannot be reached", "no answer")):
                remedy = (
                    "the same Python environment and working directory must be there on every node, "
                    "at the same paths"
                )
            yield Finding("node", "failure", (node.name,), f"{place}{node.problem}", remedy)
    reached = [node for node in nodes if not node.problem]
    if reached:
        sizes = {
            f"{facts['cores']} cores, {gib(facts['memory']['total'])}" for _, facts in known(reached, "node")
        }
        yield Finding("node", "ok", names(reached), f"answers: {'; '.join(sorted(sizes))}")


def check_unknown(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Topics whose facts a node could not collect."""
    for node in nodes:
        for topic, found in node.facts.items():
            if "error" in found:
                remedy = (
                    "look at that node by hand: "
                    "a collector that hangs usually waits for a dead file server or a device"
                )
                yield Finding(
                    topic, "failure", (node.name,), f"could not be found out: {found['error']}", remedy
                )


def check_machines(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether two names of the hostfile mean the same machine."""
    for machine in _groups((facts["machine"], node) for node, facts in known(nodes, "node")).values():
        if len(machine) > 1:
            places = ", ".join(filter(None, (node.place for node in machine)))
            remedy = "write each machine once, with all its slots" + (f" ({places})" if places else "")
            yield Finding(
                "hosts", "failure", names(machine), "these names mean one and the same machine", remedy
            )


def check_slots(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether a node has enough devices or cores for its slots, and whether all nodes have the same slots."""
    for node, facts in known(nodes, "accelerators"):
        devices = len(facts["devices"])
        cores = (node.fact("node") or {}).get("cores")
        place = f"{node.place}: " if node.place else ""
        if node.slots is None:
            continue
        if devices and node.slots > devices:
            found = f"{place}slots={node.slots}, and {devices} accelerators are there"
            yield Finding("slots", "failure", (node.name,), found, f"set slots={devices}")
        elif not devices and cores and node.slots > cores:
            found = f"{place}slots={node.slots}, and {cores} cores are there"
            yield Finding(
                "slots",
                "warning",
                (node.name,),
                found,
                f"set slots={cores} or fewer: ranks that share a core wait for each other",
            )
    slots = {node.slots for node in nodes if node.slots is not None}
    if len(slots) > 1:
        found = "uneven: " + ", ".join(
            f"{node.name} has {node.slots}" for node in nodes if node.slots is not None
        )
        yield Finding(
            "slots",
            "warning",
            names(nodes),
            found,
            "give every node the same slots: the slowest link and the fullest node set the pace",
        )


def check_versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    by_node = dict(known(nodes, "versions"))
    differing = False
    for package in dict.fromkeys(key for facts in by_node.values() for key in facts):
        groups = _groups((facts.get(package), node) for node, facts in by_node.items())
        if len(groups) > 1:
            differing = True
            said = ", ".join(
                f"{version or 'none'} on {_list(names(some))}" for version, some in groups.items()
            )
            level = "failure" if package in MUST_BE_EQUAL else "warning"
            yield Finding(
                "versions",
                level,
                names(by_node),
                f"{package} differs: {said}",
                f"install the same {package} on every node",
            )
    if by_node and not differing:
        facts = next(iter(by_node.values()))
        shown = ", ".join(f"{package} {facts[package]}" for package in MUST_BE_EQUAL if facts.get(package))
        yield Finding("versions", "ok", names(by_node), shown)


def check_alike(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether the nodes' accelerators are of one kind."""
    groups = _groups(
        (", ".join(sorted({device["name"] for device in facts["devices"]})) or "none", node)
        for node, facts in known(nodes, "accelerators")
    )
    if len(groups) > 1:
        said = "; ".join(f"{kind} on {_list(names(some))}" for kind, some in groups.items())
        level = "failure" if "none" in groups else "warning"
        remedy = "take nodes of one kind: " + (
            "some ranks would compute on a CPU, over another transport"
            if level == "failure"
            else "the slowest sets the pace, the smallest memory the size"
        )
        yield Finding(
            "accelerators",
            level,
            tuple(name for some in groups.values() for name in names(some)),
            f"differ: {said}",
            remedy,
        )


def check_route(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether every node reaches the master, and through which interface."""
    several = len(nodes) > 1
    fine: dict[str, list[Node]] = defaultdict(list)
    for node, facts in known(nodes, "network"):
        problem = _route_problem(facts, several)
        if problem:
            yield Finding("route", problem[0], (node.name,), *problem[1:])
        elif "master" in facts:
            fine[f"to {facts['master']} through {facts['interface'] or 'an unnamed interface'}"].append(node)
    for found, some in fine.items():
        yield Finding("route", "ok", names(some), found)


def _route_problem(facts, several: bool) -> tuple[str, str, str] | None:
    """Level, finding and remedy; None if nothing is wrong. several: whether there are several nodes."""
    for variable, asked in facts["asked"].items():
        chosen = [name.strip().lstrip("=^") for name in asked.split(",")]
        if not asked.startswith("^") and not any(
            interface.startswith(name) for name in chosen for interface in facts["interfaces"]
        ):
            have = ", ".join(facts["interfaces"])
            return (
                "failure",
                f"{variable}={asked}, but the interfaces are {have}",
                f"set {variable} to one of them, or unset it",
            )
    master = facts.get("master")
    if master is None:
        return None
    if not facts["master_addresses"]:
        return (
            "failure",
            f"the name {master} of the master means nothing here",
            "name the master so that every node can resolve it, or by its address",
        )
    loop = [address for address in [master, *facts["master_addresses"][:1]] if is_loopback(address)]
    if several and loop:
        found = (
            f"the master {master} is the loopback address ({loop[-1]}) here: every node would wait for itself"
        )
        return (
            "failure",
            found,
            "give the first host by a name or an address that means it on every node (see /etc/hosts)",
        )
    if facts.get("source") is None:
        return (
            "failure",
            f"there is no route to {facts['master_addresses'][0]}",
            "give the master an address in a network that all nodes share",
        )
    if facts.get("answer") in ("silent", "unreachable"):
        found = f"{master} does not answer from {facts['source']} ({facts['interface']})"
        return (
            "failure",
            found,
            "open the port in the firewall between the nodes, or use the interface that they share",
        )
    if (
        several
        and not facts["asked"].get("GLOO_SOCKET_IFNAME")
        and (not facts["own"] or is_loopback(facts["own"][0]))
    ):
        own = facts["own"][0] if facts["own"] else "nothing"
        found = f"this host's own name resolves to {own}, which gloo would offer to the others"
        remedy = (
            "put the host's address into /etc/hosts, "
            f"or set GLOO_SOCKET_IFNAME={facts['interface'] or 'the interface'}"
        )
        if facts["interface"] is None:
            return "failure", found, remedy
        # A run chooses this interface by itself.
        return "warning", f"{found}; a run takes {facts['interface']}", remedy
    return None


def check_port(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node, facts in known(nodes, "port"):
        if facts["problem"]:
            remedy = f"take another one: MASTER_PORT or --port {facts['another']}"
            yield Finding("port", "failure", (node.name,), f"{facts['port']} is {facts['problem']}", remedy)
        else:
            yield Finding("port", "ok", (node.name,), f"{facts['port']} is free")


def check_run_dir(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether every node can write into the run directory, and sees there what the others have written."""
    wrote = {}
    for node, facts in known(nodes, "run_dir"):
        if facts["problem"]:
            yield Finding(
                "run directory",
                "failure",
                (node.name,),
                f"{facts['path']}: {facts['problem']}",
                "name a directory that every node can write",
            )
        else:
            wrote[node.name] = facts["path"]
    asked = [node for node in nodes if node.marks is not None and node.name in wrote]
    written = {f"{nodes.index(node)}" for node in asked}
    blind = [node for node in asked if not written <= {mark.rpartition("-")[2] for mark in node.marks}]
    if blind:
        found = f"{wrote[blind[0].name]} is not one and the same directory: not all see what the others write"
        yield Finding(
            "run directory",
            "failure",
            names(blind),
            found,
            "put output_dir on a file system that all nodes share",
        )
    elif asked:
        yield Finding(
            "run directory",
            "ok",
            names(asked),
            f"{wrote[asked[0].name]} is writable" + (", and shared" if len(asked) > 1 else ""),
        )


def check_paths(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether recipe, local model and local data exist and are the same on every node."""
    by_node = list(known(nodes, "paths"))
    for label in dict.fromkeys(label for _, facts in by_node for label in facts):
        asked = [(node, facts[label]) for node, facts in by_node if label in facts]
        path = asked[0][1]["path"]
        lacking = [node for node, fact in asked if not fact["exists"]]
        kinds = _groups((fact["sha256"], node) for node, fact in asked if fact["exists"])
        everybody = names(node for node, _ in asked)
        if lacking:
            remedy = "put it on a file system that all nodes share, or copy it there"
            yield Finding(label, "failure", names(lacking), f"{path} cannot be seen", remedy)
        elif len(kinds) > 1:
            said = " and ".join(_list(names(some)) for some in kinds.values())
            yield Finding(
                label, "failure", everybody, f"{path} differs between {said}", "copy one of them to all nodes"
            )
        else:
            yield Finding(label, "ok", everybody, path)


def check_clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    timed = [node for node in nodes if node.skew is not None]
    if len(timed) < 2:
        return
    first, last = min(timed, key=lambda node: node.skew), max(timed, key=lambda node: node.skew)
    apart = max(0.0, last.skew - first.skew - last.doubt - first.doubt)
    if apart <= SKEW_WARNING:
        yield Finding(
            "clock",
            "ok",
            names(timed),
            f"apart by less than {max(SKEW_WARNING, last.doubt + first.doubt):.0f} s",
        )
        return
    found = f"{last.name} is at least {apart:.0f} s ahead of {first.name}"
    remedy = (
        "let all nodes take the time from one server (chrony, ntpd): builds and job authentication go wrong"
    )
    yield Finding(
        "clock", "failure" if apart > SKEW_FAILURE else "warning", (first.name, last.name), found, remedy
    )


def _groups(pairs: Iterable[tuple]) -> dict:
    """Key -> its values, in order."""
    found = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return found


def _list(words: Sequence[str]) -> str:
    return ", ".join(words)
