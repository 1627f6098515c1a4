"""Who this process is, from the environment of its launcher; and the variables that libraries read for the
same.
"""

import os

import torch

from distlora.cluster.rendezvous import DEFAULT_PORT, find_place, settle
from distlora.engine.comm import Topology
from distlora.errors import UserError


def topology_from_environment() -> Topology:
    """Also sets MASTER_ADDR, MASTER_PORT and the transports' interfaces where the launcher has left that to
    the program.

    With Open MPI on several nodes this is collective. Raises UserError where the variables are wrong, or not
    enough.
    """
    place = find_place(os.environ)
    notes = settle(os.environ, place)
    return Topology(
        place.rank,
        place.world_size,
        place.local_rank,
        place.launcher,
        notes,
        master=_master(place.world_size),
        rank_0_listens=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        patience=_patience(),
    )


def _master(world_size: int) -> tuple[str, int] | None:
    if world_size == 1 and not ("MASTER_ADDR" in os.environ and os.environ.get("MASTER_PORT")):
        return None
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT") or DEFAULT_PORT)


def _patience() -> float:
    text = os.environ.get("DEEPSPEED_TIMEOUT") or "30"
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"DEEPSPEED_TIMEOUT={text} is no number of minutes; set it to one, or unset it", agreed=True
        ) from None


def publish(topology: Topology, device: torch.device, master: str | None) -> None:
    """The variables that torch and DeepSpeed read; launchers that set others have been understood by now.

    DeepSpeed takes LOCAL_RANK for the number of the GPU, which it is not where each task sees one GPU only.
    master: where the ranks have met, as `Comm.master` says it.
    """
    local_rank = str(device.index if device.type == "cuda" else topology.local_rank)
    if master is not None:
        address, _, port = master.rpartition(":")
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", port)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(topology.rank), str(topology.world_size)
    os.environ["LOCAL_RANK"] = local_rank
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
