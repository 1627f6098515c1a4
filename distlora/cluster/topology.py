"""The topology of this process, read from the launcher's environment, and written for torch and DeepSpeed."""

import os
import re

import torch

from distlora.cluster.rendezvous import DEFAULT_PORT, complete_environment, find_place
from distlora.engine.comm import Topology
from distlora.errors import UserError

#: Up to two years.
_MINUTES = re.compile(r"\d{1,6}(\.\d{0,9})?", re.ASCII)


def topology_from_environment() -> Topology:
    """This process's topology. Also sets MASTER_ADDR, MASTER_PORT and the transports' interfaces where the
    launcher has not set them.

    With Open MPI on several nodes this is collective. Raises UserError for variables that are wrong or
    missing.
    """
    place = find_place(os.environ)
    notes = complete_environment(os.environ, place)
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
    """Address and port where the ranks meet; None for a single process that was given none."""
    if world_size == 1 and not ("MASTER_ADDR" in os.environ and os.environ.get("MASTER_PORT")):
        return None
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT") or DEFAULT_PORT)


def _patience() -> float:
    """Minutes after which a collective fails."""
    text = os.environ.get("DEEPSPEED_TIMEOUT") or "30"
    if not _MINUTES.fullmatch(text) or not float(text):
        raise UserError(
            f"DEEPSPEED_TIMEOUT={text} is no number of minutes; set it to one, or unset it", agreed=True
        )
    return float(text)


def publish(topology: Topology, device: torch.device, master: str | None) -> None:
    """Sets the variables that torch and DeepSpeed read. Some launchers have set only others.

    LOCAL_RANK becomes the number of the GPU, because DeepSpeed uses it as such. The launcher's value is
    another one where each task sees only one GPU. master: where the ranks have met, from `Comm.master`.
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
