"""What ranks of an MPI job tell each other before they have a process group: the only user of mpi4py."""

import json
from collections.abc import Callable

from distlora.errors import UserError

_REMEDY = "pip install 'distlora[mpi]', or export MASTER_ADDR (the host of rank 0) and MASTER_PORT"
#: Bytes in which a host says its name, and rank 0 the place.
_NAME, _PLACE = 256, 1024


def agree_on_place(
    own_name: str, choose: Callable[[list[str]], tuple[str, int]], world_size: int
) -> tuple[str, int]:
    """Rank 0's address and port, on every rank. Collective over all `world_size` ranks of the job; MPI is
    left again afterwards.

    choose: called on rank 0 with the host names of all ranks. Errors: UserError without mpi4py, or where it
    knows another MPI than the one that started this process.
    """
    try:
        import mpi4py
    except ImportError:
        raise UserError(
            f"{world_size} MPI ranks on several nodes cannot tell each other where to meet: there is no mpi4py; {_REMEDY}"
        ) from None
    # Nothing but these two collectives is done through MPI: a rank that dies later is the launcher's
    # business, not its barrier's.
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI

        MPI.Init()
    except (ImportError, RuntimeError) as error:  # no MPI library, or one that does not start
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"mpi4py cannot use the MPI that is installed ({reason}); export MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        return _agree(MPI, own_name, choose, world_size)
    finally:
        MPI.Finalize()


def _agree(
    MPI, own_name: str, choose: Callable[[list[str]], tuple[str, int]], world_size: int
) -> tuple[str, int]:
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise UserError(
            f"mpi4py sees {world.size} of {world_size} ranks: it uses another MPI ({MPI.Get_library_version().split(',')[0]}) than "
            "the one that started them; install one for both, or export MASTER_ADDR and MASTER_PORT"
        )
    names = bytearray(_NAME * world.size)
    world.Allgather([bytearray(own_name.encode()[:_NAME].ljust(_NAME, b"\0")), MPI.BYTE], [names, MPI.BYTE])
    place = bytearray(_PLACE)
    if world.rank == 0:
        there = [bytes(names[at : at + _NAME]).rstrip(b"\0").decode() for at in range(0, len(names), _NAME)]
        place[:] = json.dumps(choose(there)).encode().ljust(_PLACE, b"\0")
    world.Bcast([place, MPI.BYTE], root=0)
    address, port = json.loads(bytes(place).rstrip(b"\0"))
    return address, port
