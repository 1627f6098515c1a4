"""What the facts of one node mean by themselves. Pure functions from nodes to findings."""

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath

from distlora.doctor.findings import Finding, Node, gib, known

#: Free bytes of a disk and of shared memory, below which this is a warning or a failure.
DISK_WARNING, DISK_FAILURE = 20 << 30, 1 << 30
SHM_WARNING, SHM_FAILURE = 1 << 30, 128 << 20
#: Share of an accelerator's memory that must be free.
FREE_SHARE = 0.9
#: Seconds after which a lock that no process of its node holds cannot belong to a build on another node.
OLD_LOCK = 1800
#: Seconds up to which a lock may belong to a build that has just begun on another node: in general, and if
#: this examination has started builds, which may have begun earlier.
YOUNG_LOCK, YOUNG_LOCK_OF_OURS = 60, 180


def check_accelerators(nodes: Sequence[Node]) -> Iterator[Finding]:
    alike: dict[str, list[str]] = defaultdict(list)
    for node, facts in known(nodes, "accelerators"):
        devices = facts["devices"]
        if facts["hardware"] > len(devices) and not facts["hidden"]:
            found = f"{facts['hardware']} devices are there, and torch sees {len(devices)}"
            remedy = (
                "install a torch built for this driver "
                "(python -c 'import torch; torch.cuda.init()' says what is wrong)"
            )
            yield Finding("accelerators", "failure", (node.name,), found, remedy)
            continue
        for index, device in enumerate(devices):
            if device["free"] < FREE_SHARE * device["total"]:
                free = f"{gib(device['free'])} of {gib(device['total'])}"
                found = f"of device {index}, {device['name']}, {free} are free"
                yield Finding(
                    "accelerators",
                    "warning",
                    (node.name,),
                    found,
                    "end the other process that uses it (nvidia-smi)",
                )
        kinds = ", ".join(f"{device['name']} ({gib(device['total'])})" for device in devices[:1])
        alike[f"{len(devices)} × {kinds}" if devices else "none: the CPU computes"].append(node.name)
    for found, some in alike.items():
        yield Finding("accelerators", "ok", tuple(some), found)


def check_disks(nodes: Sequence[Node]) -> Iterator[Finding]:
    fine = []
    for node, facts in known(nodes, "disk"):
        short = [(label, place) for label, place in facts.items() if place["free"] < DISK_WARNING]
        for label, place in short:
            level = "failure" if place["free"] < DISK_FAILURE else "warning"
            found = f"{gib(place['free'])} of {gib(place['total'])} are free in {place['path']} ({label})"
            yield Finding(
                "disk", level, (node.name,), found, "make room: a checkpoint, a model or a build may not fit"
            )
        if not short:
            fine.append((min(place["free"] for place in facts.values()), node.name))
    if fine:
        yield Finding("disk", "ok", tuple(name for _, name in fine), f"at least {gib(min(fine)[0])} free")


def check_shm(nodes: Sequence[Node]) -> Iterator[Finding]:
    fine = []
    for node, facts in known(nodes, "shm"):
        if facts["free"] < SHM_WARNING:
            level = "failure" if facts["free"] < SHM_FAILURE else "warning"
            found = f"{gib(facts['free'])} of {gib(facts['total'])} are free in /dev/shm"
            remedy = "give containers more (--shm-size=8g or --ipc=host), or remove what lies there"
            yield Finding("shared memory", level, (node.name,), found, remedy)
        else:
            fine.append((facts["free"], node.name))
    if fine:
        yield Finding(
            "shared memory", "ok", tuple(name for _, name in fine), f"at least {gib(min(fine)[0])} free"
        )


def check_hub(nodes: Sequence[Node]) -> Iterator[Finding]:
    alike: dict[tuple, list[str]] = defaultdict(list)
    for node, facts in known(nodes, "hub"):
        if not facts["needed"]:
            key = ("ok", "not needed: model and data are local", "")
        elif facts["cached"]:
            key = ("ok", f"{facts['model']} is in {facts['cache']}", "")
        elif facts["problem"] is None:
            key = ("ok", "answers", "")
        elif facts["model"]:
            found = (
                f"{facts['model']} is not in {facts['cache']}, "
                f"and the hub gives no access ({facts['problem']})"
            )
            key = (
                "failure",
                found,
                "download it where there is access, and set HF_HOME to that cache, or give a local directory",
            )
        else:
            key = (
                "warning",
                f"no access ({facts['problem']})",
                "models and data must be local, packaged, or in the cache",
            )
        alike[key].append(node.name)
    for (level, found, remedy), some in alike.items():
        yield Finding("hub", level, tuple(some), found, remedy)


def check_compiler(nodes: Sequence[Node]) -> Iterator[Finding]:
    alike: dict[str, list[str]] = defaultdict(list)
    for node, facts in known(nodes, "compiler"):
        problem = _compiler_problem(facts)
        if problem:
            yield Finding("compiler", problem[0], (node.name,), *problem[1:])
        else:
            alike[f"{facts['version']}; ninja {next(iter(facts['ninjas'].values()))}"].append(node.name)
    for found, some in alike.items():
        yield Finding("compiler", "ok", tuple(some), found)


def _compiler_problem(facts) -> tuple[str, str, str] | None:
    """Level, finding and remedy; None if nothing is wrong."""
    if not facts["compiler"]:
        return (
            "failure",
            f"no C++ compiler is there ({facts['asked']})",
            "install one (Debian and Ubuntu: g++), or set CXX",
        )
    if not facts["ninjas"]:
        return (
            "failure",
            "ninja is not on PATH",
            "pip install ninja, and put the environment's bin on PATH on every node",
        )
    if not facts["header"]:
        return (
            "failure",
            "the C header Python.h is missing",
            "install Python's headers (Debian and Ubuntu: python3-dev)",
        )
    if len(set(facts["ninjas"].values())) > 1:
        said = ", ".join(f"{path} ({version})" for path, version in facts["ninjas"].items())
        return (
            "warning",
            f"several ninjas are on PATH: {said}",
            "leave one: each version builds the operators anew",
        )
    return None


#: The states of a build that this examination has started.
_STARTED = ("built", "failed", "running")


def check_locks(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Locks of builds that were killed. Every later start waits for such a lock, silently and for ever."""
    held = {
        lock["path"]
        for _, facts in known(nodes, "extensions")
        for lock in facts["locks"]
        if lock["holder"] is not None
    }
    built_in = {
        facts["path"]
        for node, facts in known(nodes, "extensions")
        if (node.fact("operators") or {}).get("state") in _STARTED
    }
    free = []
    for node, facts in known(nodes, "extensions"):
        for lock in facts["locks"]:
            path, age = lock["path"], _age(lock["age"])
            if path in held:
                found = f"{path}: a build is running, since {age}"
                yield Finding(
                    "build lock",
                    "warning",
                    (node.name,),
                    found,
                    "wait for it; do not end it, or the lock stays",
                )
            elif len(nodes) > 1 and lock["age"] < (
                YOUNG_LOCK_OF_OURS if facts["path"] in built_in else YOUNG_LOCK
            ):
                found = (
                    f"{path}, {age} old: another node that shares this cache has just begun to build, "
                    "or a build was killed"
                )
                yield Finding(
                    "build lock",
                    "warning",
                    (node.name,),
                    found,
                    "ask again in a few minutes, when a build is over",
                )
            else:
                sure = (
                    ""
                    if lock["age"] > OLD_LOCK
                    else " (unless a node that was not asked is building just now)"
                )
                found = (
                    f"{path}, {age} old, is held by no process{sure}: every start would wait for it, silently"
                )
                yield Finding("build lock", "failure", (node.name,), found, f"rm -f {shlex.quote(path)}")
        if not facts["locks"]:
            free.append((node.name, facts["path"]))
    if free:
        yield Finding("build lock", "ok", tuple(name for name, _ in free), f"none in {free[0][1]}")


def _age(seconds: float) -> str:
    """In words, such as "3 min"."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def check_operators(nodes: Sequence[Node]) -> Iterator[Finding]:
    built = []
    for node, facts in known(nodes, "operators"):
        if facts["state"] == "built":
            built.append((facts["seconds"], node.name))
        elif facts["state"] == "failed":
            found = f"the build of DeepSpeed's operators failed: {facts['said']}"
            remedy = "run `python -m distlora.engine.zero.operators` with their names there to see all of it"
            yield Finding("operators", "failure", (node.name,), found, remedy)
        elif facts["state"] == "running":
            found = (
                f"the build of DeepSpeed's operators goes on as process {facts['pid']}; "
                f"its log: {PurePath(facts['log'])}"
            )
            yield Finding(
                "operators",
                "warning",
                (node.name,),
                found,
                "wait for it and ask again; do not end it, or its lock stays",
            )
        elif facts["why"] == "a lock is in the way":
            yield Finding(
                "operators", "warning", (node.name,), "not built: a lock is in the way", "see build lock"
            )
    if built:
        yield Finding(
            "operators",
            "ok",
            tuple(name for _, name in built),
            f"built and loaded, in {max(built)[0]:.0f} s at most",
        )


NODE_CHECKS: tuple[Callable[[Sequence[Node]], Iterator[Finding]], ...] = (
    check_accelerators, check_disks, check_shm, check_hub, check_compiler, check_locks, check_operators,
)  # fmt: skip
