"""An all-reduce between real ranks: whether all arrive, whether the sum is right, how fast it is, and what a
failure means.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distlora.cluster.topology import topology_from_environment
from distlora.doctor.findings import Finding
from distlora.engine.comm import Comm, RollCall, Topology
from distlora.engine.device import device_of
from distlora.errors import Ending
from distlora.sentences import ranks_on_hosts

#: The stages that a rank passes, in order: nothing reached, the master, the process group, the sum.
STAGES = ("nowhere", "master", "group", "sum")
#: Bytes that are summed, on a CPU and on an accelerator.
CPU_BYTES, ACCELERATOR_BYTES = 8 << 20, 256 << 20
ROUNDS = 5
#: Bytes a second over the network, with and without accelerators. Below them something is usually wrong.
SLOW_ACCELERATOR, SLOW_CPU = 1e9, 5e7

Outcome = dict[str, Any]


def reduce_once(
    topology: Topology, device: torch.device, limit: float, tell: Callable[[Outcome], None]
) -> Outcome:
    """One rank's part. Calls `tell` with the outcome so far at every stage. Never raises for a network error.

    The outcome has "rank", "host", "device" and "stage". At the stage "sum" it has also "wrong" (the number
    of elements that are not the exact sum), "seconds" (of the fastest round) and "bytes". "missing" lists the
    ranks that have not arrived, and "error" says what failed.
    """
    outcome: Outcome = {
        "rank": topology.rank,
        "host": socket.gethostname(),
        "stage": "nowhere",
        "device": device.type,
    }
    tell(outcome)
    try:
        roll = RollCall(topology, limit)
        came = roll.exchange("reduction", socket.gethostname())
        outcome |= {
            "stage": "master",
            "missing": [rank for rank in range(topology.world_size) if rank not in came],
        }
        tell(outcome)
        if not outcome["missing"]:
            comm = Comm(topology, device, timeout_minutes=limit / 60, store=roll.store)
            tell(outcome | {"stage": "group"})
            outcome |= {"stage": "sum"} | _measure(comm)
            # The store ends with rank 0's process, so rank 0 waits until the slowest rank is done.
            roll.exchange("parting", True)
            comm.close()
    except Ending as error:
        outcome["error"] = str(error)
    except RuntimeError as error:  # every failure of torch.distributed
        outcome["error"] = " ".join(str(error).split())[:300]
    tell(outcome)
    return outcome


def _measure(comm: Comm) -> Outcome:
    size = ACCELERATOR_BYTES if comm.device.type == "cuda" else CPU_BYTES
    pattern = torch.arange(size // 4, dtype=torch.float32, device=comm.device) % 1021
    # Small whole numbers: for up to 4096 ranks their sum is exact in float32 in any order.
    wanted = pattern * sum(map(_factor, range(comm.world_size)))
    wrong, seconds = 0, []
    for _ in range(ROUNDS):
        tensor = pattern * _factor(comm.rank)
        comm.barrier()
        _finish(comm.device)
        began = time.perf_counter()
        comm.all_reduce(tensor)
        _finish(comm.device)
        seconds.append(time.perf_counter() - began)
        wrong = max(wrong, int((tensor != wanted).sum()))
    return {"wrong": wrong, "seconds": min(seconds), "bytes": size}


def _factor(rank: int) -> int:
    """The factor of a rank's contribution, which differs from those of its neighbours."""
    return rank % 4 + 1


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------- ranks as processes


def run_ranks(request: Mapping[str, Any]) -> list[str]:
    """Starts ranks on this node, and returns the last line that each has written.

    The keys of `request`: "first" and "count" (the ranks to start), "world" (the number of all ranks),
    "local" (the local rank of the first; default 0), "master", "port", and "limit" in seconds. A rank that
    does not end by itself is killed.
    """
    processes = [_start(request, local) for local in range(request["count"])]
    deadline = time.monotonic() + 3 * request["limit"] + 30
    lines = []
    for process in processes:
        try:
            said, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        lines += said.strip().splitlines()[-1:]
    return lines


def _start(request: Mapping[str, Any], local: int) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(request["first"] + local), "WORLD_SIZE": str(request["world"]),
        "LOCAL_RANK": str(request.get("local", 0) + local),
        "MASTER_ADDR": request["master"], "MASTER_PORT": str(request["port"]),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    command = [sys.executable, "-m", "distlora.doctor.node", "rank", str(request["limit"])]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def be_a_rank(limit: float, tell: Callable[[Outcome], None]) -> None:
    """One process of `run_ranks`. It ends itself if a transport hangs, because its parent may be gone."""
    logging.disable(logging.WARNING)
    last: Outcome = {}

    def remember(outcome: Outcome) -> None:
        last.update(outcome)
        tell(outcome)

    def give_up() -> None:
        tell(last | {"error": f"no answer within {3 * limit:.0f} s"})
        os._exit(1)

    watchdog = threading.Timer(3 * limit, give_up)
    watchdog.daemon = True
    watchdog.start()
    topology = topology_from_environment()
    reduce_once(topology, device_of(topology.local_rank), limit, remember)


# ---------------------------------------------------------------------- what it means


def judge(outcomes: Sequence[Outcome], ranks: Mapping[int, str], master: str) -> list[Finding]:
    """The findings about an all-reduce.

    outcomes: one for each rank that has told any. ranks: rank -> its node. master: address and port.
    """
    by_rank = {outcome["rank"]: outcome for outcome in outcomes}
    silent = [rank for rank in ranks if by_rank.get(rank, {}).get("stage", "nowhere") == "nowhere"]
    if silent:
        return [_absent(silent, by_rank, ranks, master)]
    cut_off = [rank for rank in ranks if by_rank[rank]["stage"] != "sum"]
    nodes = sorted(set(ranks.values()))
    if cut_off:
        reason = next(
            (by_rank[rank]["error"] for rank in cut_off if "error" in by_rank[rank]), "without saying why"
        )
        found = f"{_ranks(cut_off, ranks)} reached the master, but not the other ranks ({reason})"
        remedy = (
            "open all ports between the nodes, "
            "and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface they share"
        )
        return [Finding("all-reduce", "failure", tuple(nodes), found, remedy)]
    wrong = [rank for rank in ranks if by_rank[rank]["wrong"]]
    if wrong:
        remedy = (
            "take the node out, or change the transport (for a trial: NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1)"
        )
        return [
            Finding(
                "all-reduce", "failure", tuple(nodes), f"the sum is wrong on {_ranks(wrong, ranks)}", remedy
            )
        ]
    return [_speed(by_rank, ranks)]


def _absent(
    silent: list[int], by_rank: Mapping[int, Outcome], ranks: Mapping[int, str], master: str
) -> Finding:
    reason = next(
        (f" ({by_rank[rank]['error']})" for rank in silent if by_rank.get(rank, {}).get("error")), ""
    )
    remedy = (
        f"see that {master} can be reached from there (firewall, name resolution), "
        "and that nothing else listens on it"
    )
    nodes = tuple(sorted({ranks[rank] for rank in silent}))
    return Finding(
        "all-reduce", "failure", nodes, f"{_ranks(silent, ranks)} did not come to {master}{reason}", remedy
    )


def _speed(by_rank: Mapping[int, Outcome], ranks: Mapping[int, str]) -> Finding:
    count, some = len(ranks), next(iter(by_rank.values()))
    seconds = max(by_rank[rank]["seconds"] for rank in ranks)
    # The bytes over one link of a ring: the bus bandwidth as NCCL's tests define it.
    rate = 2 * (count - 1) / count * some["bytes"] / seconds if count > 1 else 0.0
    nodes = tuple(sorted(set(ranks.values())))
    found = (
        f"right on {count} ranks, {some['bytes'] / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms, "
        f"bus bandwidth {rate / 1e9:.2f} GB/s"
    )
    slow = SLOW_ACCELERATOR if some["device"] == "cuda" else SLOW_CPU
    if len(nodes) > 1 and rate < slow:
        remedy = (
            "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the fast interface; "
            "NCCL_DEBUG=INFO says which transport is used"
        )
        return Finding("all-reduce", "warning", nodes, f"{found}: slow between nodes", remedy)
    return Finding("all-reduce", "ok", nodes, found)


def _ranks(some: Sequence[int], nodes: Mapping[int, str]) -> str:
    return ranks_on_hosts(some, nodes, "; ")
