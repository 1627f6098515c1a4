"""The rank of this process and the address where the ranks meet, from the launcher's environment variables.

Every launcher sets other variables. torchrun and DeepSpeed's launcher set all that is needed, SLURM sets
ranks and nodes but no address, and MPI sets only ranks and sizes. What the user has set (MASTER_ADDR,
MASTER_PORT, interfaces) is never changed.
"""

import socket
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import islice

from distlora.cluster import nodelist
from distlora.cluster.addresses import (
    IN_USE,
    addresses,
    free_port,
    interface_of,
    interfaces,
    is_loopback,
    problem_with_port,
    source,
)
from distlora.cluster.mpi import agree_on_address
from distlora.errors import UserError

#: The variables of each launcher for the rank, the world size, and the number of ranks on this node. The most
#: explicit come first.
_LAUNCHERS = [
    ("RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALNRANKS",)),
    # The step's size comes first: in salloc's interactive shell SLURM_NTASKS is the size of the whole job.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ()),
    ("SLURM_PROCID", "SLURM_NTASKS", ()),
]
#: The variables for the rank within the node. They are apart from the rows above because SLURM's PMI sets the
#: rank under PMI's name, and the local rank under SLURM's.
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
#: The variables for the number of this node, and for the count of nodes.
_NODE_NUMBERS = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
_NODE_COUNTS = ("CROSS_SIZE", "SLURM_STEP_NUM_NODES", "SLURM_NNODES")

#: Digits of a number of ranks, nodes or jobs.
_DIGITS = 18
#: The port where ranks meet if nothing else is known: torch's default.
DEFAULT_PORT = 29500
#: The range of derived ports: below those that Linux assigns (32768 and above); the count is a prime number.
_FIRST_PORT, _PORTS = 10000, 19997
#: The variables that bind gloo and NCCL to an interface, and how each of them writes its name.
_TRANSPORTS = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """This process within its job.

    launcher: whose variables were read; empty for a single process without any. several_nodes: None if the
    variables do not say it. first_node: whether rank 0 is on this node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""
    several_nodes: bool | None = False
    first_node: bool = True


def own_rank(environment: Environment) -> int:
    """The rank, even if other variables are wrong; 0 if the rank itself is wrong or missing."""
    name, _, _ = _launcher_variables(environment)
    text = environment.get(name, "")
    return int(text) if _is_number(text) else 0


def own_local_rank(environment: Environment) -> int:
    """The rank within the node, even if other variables are wrong; 0 if it is wrong or missing."""
    text = next((environment[name] for name in _LOCAL_RANKS if environment.get(name)), "")
    return int(text) if _is_number(text) else 0


def find_place(environment: Environment) -> Place:
    """This process's place. Raises UserError for numbers that are missing, invalid or contradictory."""
    names = rank_name, size_name, _ = _launcher_variables(environment)
    if not rank_name:
        if environment.get("RANK") and "WORLD_SIZE" not in environment:
            raise UserError(
                "RANK is set and WORLD_SIZE is not; "
                "set both for a rank of several, or unset RANK for one process"
            )
        return Place()
    rank, world_size = _number(environment, rank_name), _number(environment, size_name)
    if world_size < 1 or rank >= world_size:
        raise UserError(
            f"{rank_name}={rank} and {size_name}={world_size} contradict each other: "
            f"ranks are numbered from 0 to {size_name} - 1; set both alike on all nodes"
        )
    local_rank = next((_number(environment, name) for name in _LOCAL_RANKS if environment.get(name)), 0)
    node = next(
        (_number(environment, name) for name in _NODE_NUMBERS if environment.get(name)), rank - local_rank
    )
    return Place(
        rank,
        world_size,
        local_rank,
        _launcher_name(environment, rank_name),
        _several_nodes(environment, names, world_size),
        node == 0,
    )


def _launcher_variables(environment: Environment) -> tuple[str, str, tuple[str, ...]]:
    """The row of _LAUNCHERS whose variables are set; empty names for a single process without a launcher."""
    for rank, world_size, local_sizes in _LAUNCHERS:
        # An interactive SLURM shell has SLURM_PROCID=0 without being a step of several tasks. A program that
        # is started there is a single process.
        if rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in environment:
            continue
        if rank in environment and world_size in environment:
            return rank, world_size, local_sizes
    return "", "", ()


def _is_number(text: str) -> bool:
    """Whether it is a whole number such as launchers count with."""
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS


def _number(environment: Environment, name: str) -> int:
    text = environment[name]
    if not _is_number(text):
        raise UserError(
            f"{name}='{text}' is no whole number; it comes from the launcher, or set it to one from 0 upwards"
        )
    return int(text)


def _several_nodes(
    environment: Environment, names: tuple[str, str, tuple[str, ...]], world_size: int
) -> bool | None:
    """Whether the ranks are on several nodes; None if the variables do not say it."""
    _, _, local_sizes = names
    for name in local_sizes:
        if environment.get(name):
            return _number(environment, name) < world_size
    counts = [_number(environment, name) for name in _NODE_COUNTS if environment.get(name)]
    return counts[0] > 1 if counts else None


def _launcher_name(environment: Environment, rank_name: str) -> str:
    """The launcher that has set this variable. Several launchers set RANK, each with other variables."""
    if rank_name != "RANK":
        return {"OMPI_COMM_WORLD_RANK": "Open MPI", "PMI_RANK": "PMI", "SLURM_PROCID": "SLURM"}[rank_name]
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "DeepSpeed's launcher" if "CROSS_RANK" in environment else "the variables RANK and WORLD_SIZE"


# ---------------------------------------------------------------------- where the ranks meet


def complete_environment(
    environment: MutableMapping[str, str],
    place: Place,
    agree: Callable[[str, Callable[[list[str]], tuple[str, int]], int], tuple[str, int]] = agree_on_address,
) -> tuple[str, ...]:
    """Adds what is missing: MASTER_ADDR and MASTER_PORT for several ranks, and interfaces for transports.

    Returns sentences that tell the user what was added. Collective if the ranks must ask each other, which
    they do through `agree`. Raises UserError; its `agreed` is set if every rank finds the same problem.
    """
    if environment.get("MASTER_PORT"):
        _port(environment["MASTER_PORT"])
    if place.world_size == 1:
        return ()
    notes: list[str] = []
    derived = not environment.get("MASTER_PORT")
    if not environment.get("MASTER_ADDR"):
        address, port, origin = _meeting_point(environment, place, agree)
        environment["MASTER_ADDR"] = address
        if not environment.get("MASTER_PORT"):
            environment["MASTER_PORT"] = str(port)
        notes.append(f"the ranks meet at {address}:{environment['MASTER_PORT']}, {origin}")
    elif not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(_job_port(environment))
    master = environment["MASTER_ADDR"]
    _check_master(master, place)
    if derived and place.rank == 0:
        _check_derived_port(int(environment["MASTER_PORT"]))
    return (*notes, *_choose_interfaces(environment, place, master))


def _port(text: str) -> int:
    if not _is_number(text) or not 1 <= int(text) <= 65535:
        raise UserError(f"MASTER_PORT={text} is no port; give a number from 1 to 65535", agreed=True)
    return int(text)


def _meeting_point(environment: Environment, place: Place, agree) -> tuple[str, int, str]:
    """Address, port, and the words that tell where they come from."""
    if _is_slurm_task(environment, place):
        name = "SLURM_STEP_NODELIST" if environment.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
        first = next(nodelist.hosts(environment.get(name, "")), None)
        if first is None:
            raise UserError(
                "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST name no host, "
                "so where the ranks meet is not known; start them with srun, "
                "or export MASTER_ADDR (the host of rank 0) and MASTER_PORT",
                agreed=True,
            )
        return first, _job_port(environment), f"the first host of {name}"
    if place.several_nodes is False:
        return "127.0.0.1", _job_port(environment), "for all are on this node"
    if place.launcher in ("Open MPI", "PMI"):
        address, port = agree(socket.gethostname(), _rank_0_address, place.world_size)
        return address, port, "as rank 0 told the others through MPI"
    raise UserError(
        f"{place.world_size} processes were started through {place.launcher}, but MASTER_ADDR is not set; "
        "export MASTER_ADDR (the host of rank 0) and MASTER_PORT",
        agreed=True,
    )


def _is_slurm_task(environment: Environment, place: Place) -> bool:
    """Whether the ranks are the tasks of a SLURM step.

    Those of mpirun are not: it numbers its ranks itself, from a list of its own.
    """
    as_task = str(place.rank), str(place.world_size)
    from_slurm = (
        environment.get("SLURM_PROCID"),
        environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"),
    )
    return "SLURM_STEP_ID" in environment and from_slurm == as_task and place.launcher != "Open MPI"


def _job_port(environment: Environment) -> int:
    """A port that is the same for all ranks of a job, and hardly ever the same for two jobs on one node."""
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if _is_number(job) and "OMPI_COMM_WORLD_SIZE" not in environment:
        # The first 101 steps of jobs whose numbers are less than 197 apart get different ports. Others may
        # get the same one.
        return _FIRST_PORT + (101 * int(job) + (int(step) if _is_number(step) else 0)) % _PORTS
    # Two calls of mpirun within one SLURM job have different names.
    name = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    return _FIRST_PORT + zlib.crc32(name.encode()) % _PORTS if name else DEFAULT_PORT


def _check_derived_port(port: int) -> None:
    """Refuses a port that is in use. Called on rank 0, which will listen there."""
    if problem_with_port(port) == IN_USE:
        raise UserError(
            f"the port {port} is in use on {socket.gethostname()}; it was derived, "
            "because MASTER_PORT is not set: "
            "export MASTER_PORT to choose another, the same for all ranks"
        )


def _rank_0_address(hosts: list[str]) -> tuple[str, int]:
    """An address of this host by which the others reach it, and a free port here. hosts: of all ranks."""
    others = [host for host in dict.fromkeys(hosts) if host != socket.gethostname()]
    return _own_address_towards(others) or socket.gethostname(), free_port()


def _own_address_towards(others: list[str]) -> str | None:
    """This host's address on the way to the first of these hosts that can be resolved; no loopback."""
    for host in others:
        for address in addresses(host)[:1]:
            own = source(address)
            if own and not is_loopback(own):
                return own
    return None


# ---------------------------------------------------------------------- the network between nodes


def _check_master(master: str, place: Place) -> None:
    """Refuses a master that other nodes cannot reach. They would wait for it until the launcher's timeout."""
    if not place.several_nodes:
        return
    remedy = "set MASTER_ADDR to an address of rank 0's host in the network that all nodes share"
    if is_loopback(master):
        raise UserError(
            f"the master {master} is a loopback address, and the job has several nodes; {remedy}", agreed=True
        )
    found = addresses(master)
    if not found:
        raise UserError(
            f"the master's name {master} means nothing on {socket.gethostname()}; "
            f"{remedy}, or mend its names (/etc/hosts)"
        )
    # On the master itself its name may mean 127.0.1.1, as on Debian. That does no harm.
    if is_loopback(found[0]) and not place.first_node:
        raise UserError(
            f"the master's name {master} means the loopback address {found[0]} "
            f"on {socket.gethostname()}, which is not its host; {remedy}"
        )


def _choose_interfaces(environment: MutableMapping[str, str], place: Place, master: str) -> tuple[str, ...]:
    """Sets the transports' interfaces where gloo would choose a loopback address. Returns notes for the user.

    gloo listens on the address of this host's name. If that is a loopback address, no other node reaches it.
    """
    own = addresses(socket.gethostname())
    if place.several_nodes is False or is_loopback(master) or (own and not is_loopback(own[0])):
        return ()
    unset = [name for name in _TRANSPORTS if not environment.get(name)]
    if "GLOO_SOCKET_IFNAME" not in unset:
        return ()
    interface = _interface_towards_others(environment, addresses(master))
    meaning = f"the address {own[0]}" if own else "nothing"
    problem = f"this host's name, {socket.gethostname()}, means {meaning} here"
    if interface is None:
        return (
            f"{problem}, and the way to the other nodes is not clear: "
            "if the run hangs, set GLOO_SOCKET_IFNAME to the interface",
        )
    for name in unset:
        environment[name] = _TRANSPORTS[name].format(interface)
    return (f"{problem}: {' and '.join(unset)} set to {interface}, which leads to the other nodes",)


def _interface_towards_others(environment: Environment, master: list[str]) -> str | None:
    """The interface that leads to the other nodes; None if it is not clear. master: the master's addresses.

    It is the one towards the master. On the master's host it is the one towards another node, or the only one
    that is not a loopback.
    """
    if master and not is_loopback(master[0]):
        return interface_of(source(master[0]))
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    own = _own_address_towards(list(islice(nodelist.hosts(listed), 1, 3)))
    candidates = [name for name, address in interfaces().items() if not is_loopback(address)]
    return interface_of(own) or (candidates[0] if len(candidates) == 1 else None)
