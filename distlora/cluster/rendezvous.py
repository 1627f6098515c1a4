"""Where this process belongs and where the ranks meet, from what the launcher's environment says.

Every road leaves other variables: torchrun and DeepSpeed's launcher say everything, SLURM says ranks and
nodes but no address, MPI says ranks and sizes only. What the user has set himself (MASTER_ADDR, MASTER_PORT,
interfaces) always wins.
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
from distlora.cluster.mpi import agree_on_place
from distlora.errors import UserError

#: Where each launcher puts rank and world size, most explicit first, and how many of the ranks are on this
#: node.
_LAUNCHERS = [
    ("RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALNRANKS",)),
    # The step's number first: in the step that is salloc's interactive shell, SLURM_NTASKS is the whole
    # job's.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ()),
    ("SLURM_PROCID", "SLURM_NTASKS", ()),
]
#: Where the rank within the node is. Apart from the above: SLURM's PMI gives ranks under PMI's names, the
#: local one under its own.
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
#: The number of the node, and of the nodes.
_NODE_NUMBERS = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
_NODE_COUNTS = ("CROSS_SIZE", "SLURM_STEP_NUM_NODES", "SLURM_NNODES")

#: Where ranks meet if nothing else is known: torch's own default.
DEFAULT_PORT = 29500
#: Derived ports: below those that Linux hands out (32768 and above), and a prime number of them.
_FIRST_PORT, _PORTS = 10000, 19997
#: The variables that tie gloo and NCCL to an interface, and how each writes a name.
_TRANSPORTS = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """This process within its job.

    launcher: whose variables say so, empty for one process without any. several_nodes: None where they do not
    say it. first_node: whether rank 0 is on this node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""
    several_nodes: bool | None = False
    first_node: bool = True


def own_rank(environment: Environment) -> int:
    """The rank, even where the environment is wrong otherwise; 0 if that is wrong itself."""
    name, _, _ = _launcher_variables(environment)
    text = environment.get(name, "")
    return int(text) if _is_number(text) else 0


def own_local_rank(environment: Environment) -> int:
    """The rank within the node, likewise; 0 where nobody says it."""
    text = next((environment[name] for name in _LOCAL_RANKS if environment.get(name)), "")
    return int(text) if _is_number(text) else 0


def find_place(environment: Environment) -> Place:
    """Errors: UserError where numbers are missing, are none, or contradict each other."""
    names = rank_name, size_name, _ = _launcher_variables(environment)
    if not rank_name:
        if environment.get("RANK") and "WORLD_SIZE" not in environment:
            raise UserError(
                "RANK is set and WORLD_SIZE is not; set both for a rank of several, or unset RANK for one process"
            )
        return Place()
    rank, world_size = _number(environment, rank_name), _number(environment, size_name)
    if world_size < 1 or rank >= world_size:
        raise UserError(
            f"{rank_name}={rank} and {size_name}={world_size} contradict each other: ranks are numbered from 0 to {size_name} - 1; "
            "set both alike on all nodes"
        )
    local_rank = next((_number(environment, name) for name in _LOCAL_RANKS if environment.get(name)), 0)
    node = next(
        (_number(environment, name) for name in _NODE_NUMBERS if environment.get(name)), rank - local_rank
    )
    return Place(
        rank,
        world_size,
        local_rank,
        _who(environment, rank_name),
        _several_nodes(environment, names, world_size),
        node == 0,
    )


def _launcher_variables(environment: Environment) -> tuple[str, str, tuple[str, ...]]:
    """The row of _LAUNCHERS that holds; of empty names for one process without a launcher."""
    for rank, world_size, local_sizes in _LAUNCHERS:
        # An interactive SLURM shell sets SLURM_PROCID=0 without being a step of several tasks: then one
        # process is right.
        if rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in environment:
            continue
        if rank in environment and world_size in environment:
            return rank, world_size, local_sizes
    return "", "", ()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


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
    _, _, local_sizes = names
    for name in local_sizes:
        if environment.get(name):
            return _number(environment, name) < world_size
    counts = [_number(environment, name) for name in _NODE_COUNTS if environment.get(name)]
    return counts[0] > 1 if counts else None


def _who(environment: Environment, rank_name: str) -> str:
    """Who sets this variable for the rank. Several set RANK, each with others of its own."""
    if rank_name != "RANK":
        return {"OMPI_COMM_WORLD_RANK": "Open MPI", "PMI_RANK": "PMI", "SLURM_PROCID": "SLURM"}[rank_name]
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "DeepSpeed's launcher" if "CROSS_RANK" in environment else "the variables RANK and WORLD_SIZE"


# ---------------------------------------------------------------------- where the ranks meet


def settle(
    environment: MutableMapping[str, str],
    place: Place,
    agree: Callable[[str, Callable[[list[str]], tuple[str, int]], int], tuple[str, int]] = agree_on_place,
) -> tuple[str, ...]:
    """Adds MASTER_ADDR and MASTER_PORT where there are several ranks, and interfaces where they must be
    chosen. Collective where the ranks have to ask each other. Returns what the user should know about it, in
    sentences.

    Errors: UserError, agreed if every rank finds the same.
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
    """Address, port, and where they come from."""
    if _is_slurm_task(environment, place):
        name = "SLURM_STEP_NODELIST" if environment.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
        first = next(nodelist.hosts(environment.get(name, "")), None)
        if first is None:
            raise UserError(
                "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST name no host, so where the ranks meet is not known; "
                "start them with srun, or export MASTER_ADDR (the host of rank 0) and MASTER_PORT",
                agreed=True,
            )
        return first, _job_port(environment), f"the first host of {name}"
    if place.several_nodes is False:
        return "127.0.0.1", _job_port(environment), "for all are on this node"
    if place.launcher in ("Open MPI", "PMI"):
        address, port = agree(socket.gethostname(), _rank_0_place, place.world_size)
        return address, port, "as rank 0 told the others through MPI"
    raise UserError(
        f"{place.world_size} processes were started through {place.launcher}, but MASTER_ADDR is not set; "
        "export MASTER_ADDR (the host of rank 0) and MASTER_PORT",
        agreed=True,
    )


def _is_slurm_task(environment: Environment, place: Place) -> bool:
    """Whether the ranks are the tasks of a job step. (mpirun's are not: it numbers them itself, from a list
    of its own.)
    """
    as_task = str(place.rank), str(place.world_size)
    said = (
        environment.get("SLURM_PROCID"),
        environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"),
    )
    return "SLURM_STEP_ID" in environment and said == as_task and place.launcher != "Open MPI"


def _job_port(environment: Environment) -> int:
    """A port that all ranks of a job share, and two jobs on one node hardly ever."""
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if job.isdigit() and "OMPI_COMM_WORLD_SIZE" not in environment:
        # Different for the first 101 steps of jobs whose numbers are less than 197 apart; others can
        # coincide.
        return _FIRST_PORT + (101 * int(job) + (int(step) if step.isdigit() else 0)) % _PORTS
    # Two calls of mpirun in one job of SLURM have names of their own.
    name = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    return _FIRST_PORT + zlib.crc32(name.encode()) % _PORTS if name else DEFAULT_PORT


def _check_derived_port(port: int) -> None:
    """On rank 0, which is to listen there."""
    if problem_with_port(port) == IN_USE:
        raise UserError(
            f"the port {port} is in use on {socket.gethostname()}; it was derived, because MASTER_PORT is not set: "
            "export MASTER_PORT to choose another, the same for all ranks"
        )


def _rank_0_place(hosts: list[str]) -> tuple[str, int]:
    """An address of this host by which the others reach it, and a free port here."""
    others = [host for host in dict.fromkeys(hosts) if host != socket.gethostname()]
    return _reached_from(others) or socket.gethostname(), free_port()


def _reached_from(others: list[str]) -> str | None:
    """The own address on the way to the first of these hosts that has an address here; no loopback."""
    for host in others:
        for address in addresses(host)[:1]:
            own = source(address)
            if own and not is_loopback(own):
                return own
    return None


# ---------------------------------------------------------------------- the network between nodes


def _check_master(master: str, place: Place) -> None:
    """Refuses what cannot be reached from other nodes: waiting for it would take the launcher's whole
    patience.
    """
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
            f"the master's name {master} means nothing on {socket.gethostname()}; {remedy}, or mend its names (/etc/hosts)"
        )
    # On its own host a name may mean 127.0.1.1, as Debian sets it up: there it does no harm.
    if is_loopback(found[0]) and not place.first_node:
        raise UserError(
            f"the master's name {master} means the loopback address {found[0]} on {socket.gethostname()}, which is not its host; "
            + remedy
        )


def _choose_interfaces(environment: MutableMapping[str, str], place: Place, master: str) -> tuple[str, ...]:
    """gloo listens where the own host name leads to; where that is a loopback address no other node would
    find it.
    """
    own = addresses(socket.gethostname())
    if place.several_nodes is False or is_loopback(master) or (own and not is_loopback(own[0])):
        return ()
    unset = [name for name in _TRANSPORTS if not environment.get(name)]
    if "GLOO_SOCKET_IFNAME" not in unset:
        return ()
    interface = _way_to_the_others(environment, addresses(master))
    meaning = f"the address {own[0]}" if own else "nothing"
    problem = f"this host's name, {socket.gethostname()}, means {meaning} here"
    if interface is None:
        return (
            f"{problem}, and the way to the other nodes is not clear: if the run hangs, set GLOO_SOCKET_IFNAME to the interface",
        )
    for name in unset:
        environment[name] = _TRANSPORTS[name].format(interface)
    return (f"{problem}: {' and '.join(unset)} set to {interface}, which leads to the other nodes",)


def _way_to_the_others(environment: Environment, master: list[str]) -> str | None:
    """The interface towards the master; on its own host towards another node, or the only one that there is."""
    if master and not is_loopback(master[0]):
        return interface_of(source(master[0]))
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    towards = _reached_from(list(islice(nodelist.hosts(listed), 1, 3)))
    candidates = [name for name, address in interfaces().items() if not is_loopback(address)]
    return interface_of(towards) or (candidates[0] if len(candidates) == 1 else None)
