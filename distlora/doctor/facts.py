"""What one node sees: versions, devices, memory and more. A collector that fails or hangs does not affect the
others.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distlora.cluster.environment import versions
from distlora.doctor import network, storage, toolchain

Facts = dict[str, Any]

#: Seconds for all collectors but the build of operators. The import of torch from a busy file server takes
#: longest.
LIMIT = 90.0


def collect(request: Mapping[str, Any], limit: float = LIMIT) -> dict[str, Facts]:
    """All facts of this node, by topic. A topic that failed, or took longer than `limit` seconds, has only
    the key "error".

    The keys of `request`, which are all optional:
    master, port: the address that must be reached. is_master: whether this node is the master.
    run_dir, mark: a directory, and the name of a file to leave there.
    paths: what must be visible, label -> path.
    model, hub: a model's name on the hub, or None; and whether the hub is needed.
    operators, build_limit: names of DeepSpeed's builders, maybe none; and the seconds to wait for the build.
    """
    build = toolchain.start_build(request.get("operators") or ())
    facts = gather(
        {
            "node": _node,
            "versions": versions,
            "accelerators": _accelerators,
            "network": lambda: network.facts(request.get("master"), request.get("port")),
            "port": lambda: network.port_facts(request["port"]) if request.get("is_master") else {},
            "run_dir": lambda: storage.leave_mark(request.get("run_dir"), request.get("mark")),
            "paths": lambda: storage.path_facts(request.get("paths") or {}),
            "disk": lambda: storage.disk_facts(request.get("run_dir")),
            "shm": storage.shm_facts,
            "hub": lambda: storage.hub_facts(request.get("model"), request.get("hub", True)),
            "compiler": toolchain.compiler_facts,
            "extensions": lambda: {"path": str(toolchain.extensions_root()), "locks": build.locks},
        },
        limit,
    )
    facts["operators"] = build.wait(request.get("build_limit", limit))
    return facts


def gather(collectors: Mapping[str, Callable[[], Facts]], limit: float) -> dict[str, Facts]:
    """Runs each collector in its own thread, and does not wait for a late one longer than `limit` seconds.

    A dead file server blocks a thread for ever.
    """
    results: dict[str, Facts] = {}

    def work(topic: str, collector: Callable[[], Facts]) -> None:
        try:
            results[topic] = collector()
        except Exception as error:  # any failure is a fact about this node
            results[topic] = {"error": f"{type(error).__name__}: {error}"}

    threads = {
        topic: threading.Thread(target=work, args=item, daemon=True) for topic, item in _items(collectors)
    }
    deadline = time.monotonic() + limit
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    return {topic: results.get(topic, {"error": f"no answer within {limit:.0f} s"}) for topic in threads}


def _items(collectors: Mapping[str, Callable[[], Facts]]):
    return [(topic, (topic, collector)) for topic, collector in collectors.items()]


def _node() -> Facts:
    """machine: equal for two names of the same machine, different for two machines.

    Containers with a network of their own count as machines.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = os.readlink("/proc/self/ns/net") if os.path.exists("/proc/self/ns/net") else ""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {
        "host": socket.gethostname(),
        "machine": f"{boot.read_text().strip() if boot.exists() else socket.gethostname()} {space}",
        "cores": len(os.sched_getaffinity(0)),
        "memory": {
            key: int(memory[name].split()[0]) * 1024
            for key, name in (("total", "MemTotal"), ("free", "MemAvailable"))
        },
    }


def _accelerators() -> Facts:
    """devices: those that torch sees, with their memory in bytes. hardware: the number of NVIDIA or AMD
    devices in the system. hidden: whether the user has hidden some of them.
    """
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        devices.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    nvidia = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None or os.environ.get("DS_ACCELERATOR") == "cpu"
    amd = list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else []
    return {"devices": devices, "hardware": len(nvidia) or len(amd), "hidden": hidden}
