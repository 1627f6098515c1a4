"""An all-reduce between real ranks: does everybody come, is the sum right, how fast is it; and what a failure
means.
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

#: How far a rank has come, in this order.
STAGES = ("nowhere", "master", "group", "sum")
#: Bytes that are summed, on a CPU and on an accelerator.
CPU_BYTES, ACCELERATOR_BYTES = 8 << 20, 256 << 20
ROUNDS = 5
#: Bytes a second over the network below which something is usually wrong: with accelerators, without.
SLOW_ACCELERATOR, SLOW_CPU = 1e9, 5e7

Outcome = dict[str, Any]


def reduce_once(
    topology: Topology, device: torch.device, limit: float, tell: Callable[[Outcome], None]
) -> Outcome:
    """One rank's part. Calls `tell` with how far it has come, at every stage, and never raises for what the
    network does.

    The outcome: "rank", "host", "stage"; with "sum" also "wrong" (elements that are not the exact sum),
    "seconds" (the fastest of a few rounds) and "bytes"; "missing" where others did not come; "error" where it
    broke.
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
            comm = Comm(topology, device, timeout_minutes=limit / 60, roll=roll)
            tell(outcome | {"stage": "group"})
            outcome |= {"stage": "sum"} | _measure(comm)
            roll.exchange(
                "parting", True
            )  # else rank 0 takes the store along before the slowest has said that it is done
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
    # Small whole numbers: up to 4096 ranks the sum is exact in float32, whatever the order.
    wanted = pattern * sum(map(_share, range(comm.world_size)))
    wrong, seconds = 0, []
    for _ in range(ROUNDS):
        tensor = pattern * _share(comm.rank)
        comm.barrier()
        _finish(comm.device)
        began = time.perf_counter()
        comm.all_reduce(tensor)
        _finish(comm.device)
        seconds.append(time.perf_counter() - began)
        wrong = max(wrong, int((tensor != wanted).sum()))
    return {"wrong": wrong, "seconds": min(seconds), "bytes": size}


def _share(rank: int) -> int:
    """What tells a rank's contribution from its neighbours'."""
    return rank % 4 + 1


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------- ranks as processes


def run_ranks(request: Mapping[str, Any]) -> list[str]:
    """Starts `count` ranks on this node, from `first` on of `world`, and returns the last line that each has
    said.

    request: also "master", "port", "limit", and "local" (of the first, default 0). Each rank ends itself, or
    is ended.
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
        "MASTER_ADDR": request["master"], "MASTER_PORT": str(request["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    command = [sys.executable, "-m", "distlora.doctor.node", "rank", str(request["limit"])]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def be_a_rank(limit: float, tell: Callable[[Outcome], None]) -> None:
    """One process of `run_ranks`. A transport that hangs for good is ended from within, for nobody else may
    be left to do it.
    """
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
    """outcomes: one a rank, of those that said anything. ranks: rank -> the node that it belongs to. master:
    address and port.
    """
    by_rank = {outcome["rank"]: outcome for outcome in outcomes}
    silent = [rank for rank in ranks if by_rank.get(rank, {}).get("stage", "nowhere") == "nowhere"]
    if silent:
        return [_absent(silent, by_rank, ranks, master)]
    cut_off = [rank for rank in ranks if by_rank[rank]["stage"] != "sum"]
    nodes = sorted(set(ranks.values()))
    if cut_off:
        reason = next(
            (by_rank[rank]["error"] for rank in cut_off if "error" in by_rank[rank]), "without a word"
        )
        found = f"{_named(cut_off, ranks)} reached the master, but not the other ranks ({reason})"
        remedy = "open all ports between the nodes, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface they share"
        return [Finding("all-reduce", "failure", tuple(nodes), found, remedy)]
    wrong = [rank for rank in ranks if by_rank[rank]["wrong"]]
    if wrong:
        remedy = (
            "take the node out, or change the transport (for a trial: NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1)"
        )
        return [
            Finding(
                "all-reduce", "failure", tuple(nodes), f"the sum is wrong on {_named(wrong, ranks)}", remedy
            )
        ]
    return [_speed(by_rank, ranks)]


def _absent(
    silent: list[int], by_rank: Mapping[int, Outcome], ranks: Mapping[int, str], master: str
) -> Finding:
    reason = next(
        (f" ({by_rank[rank]['error']})" for rank in silent if by_rank.get(rank, {}).get("error")), ""
    )
    remedy = f"see that {master} can be reached from there (firewall, name resolution), and that nothing else listens on it"
    nodes = tuple(sorted({ranks[rank] for rank in silent}))
    return Finding(
        "all-reduce", "failure", nodes, f"{_named(silent, ranks)} did not come to {master}{reason}", remedy
    )


def _speed(by_rank: Mapping[int, Outcome], ranks: Mapping[int, str]) -> Finding:
    count, some = len(ranks), next(iter(by_rank.values()))
    seconds = max(by_rank[rank]["seconds"] for rank in ranks)
    # Bytes through the narrowest link of a ring, as the tests of NCCL define the bus bandwidth.
    rate = 2 * (count - 1) / count * some["bytes"] / seconds if count > 1 else 0.0
    nodes = tuple(sorted(set(ranks.values())))
    found = f"right on {count} ranks, {some['bytes'] / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms, bus bandwidth {rate / 1e9:.2f} GB/s"
    slow = SLOW_ACCELERATOR if some["device"] == "cuda" else SLOW_CPU
    if len(nodes) > 1 and rate < slow:
        remedy = "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the fast interface; NCCL_DEBUG=INFO says which transport is used"
        return Finding("all-reduce", "warning", nodes, f"{found}: slow between nodes", remedy)
    return Finding("all-reduce", "ok", nodes, found)


def _named(ranks: Sequence[int], nodes: Mapping[int, str]) -> str:
    """ "rank 1 on node1; ranks 2, 3 on node2" """
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(nodes[rank], []).append(rank)
    return "; ".join(
        f"rank{'s' * (len(some) > 1)} {', '.join(map(str, some))} on {node}" for node, some in groups.items()
    )
