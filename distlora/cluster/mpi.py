"""The ranks of an MPI job agree on where to meet, before they have a process group. Needs mpi4py."""

import json
from collections.abc import Callable

from distlora.errors import UserError

_REMEDY = "pip install 'distlora[mpi]', or export MASTER_ADDR (the host of rank 0) and MASTER_PORT"
#: Bytes for the name of a host, and for the address that rank 0 chooses.
_NAME, _ADDRESS = 256, 1024


def agree_on_address(
    own_name: str, choose: Callable[[list[str]], tuple[str, int]], world_size: int
) -> tuple[str, int]:
    """Rank 0's address and port, on every rank. Collective over all `world_size` ranks of the job.

    MPI is initialised for this only and finalised afterwards. own_name: the name of this host. choose: called
    on rank 0 with the host names of all ranks; returns address and port. Raises UserError without mpi4py, or
    if mpi4py uses another MPI than the one that started this process.
    """
    try:
        import mpi4py
    except ImportError:
        raise UserError(
            f"{world_size} MPI ranks on several nodes cannot tell each other where to meet: "
            f"there is no mpi4py; {_REMEDY}"
        ) from None
    # MPI does nothing but the two collectives below. A rank that dies later is noticed by the launcher, and
    # must not block in a barrier of MPI.
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
            f"mpi4py sees {world.size} of {world_size} ranks: it uses another MPI "
            f"({MPI.Get_library_version().split(',')[0]}) than the one that started them; "
            "install one for both, or export MASTER_ADDR and MASTER_PORT"
        )
    names = bytearray(_NAME * world.size)
    world.Allgather([bytearray(own_name.encode()[:_NAME].ljust(_NAME, b"\0")), MPI.BYTE], [names, MPI.BYTE])
    chosen = bytearray(_ADDRESS)
    if world.rank == 0:
        hosts = [bytes(names[at : at + _NAME]).rstrip(b"\0").decode() for at in range(0, len(names), _NAME)]
        chosen[:] = json.dumps(choose(hosts)).encode().ljust(_ADDRESS, b"\0")
    world.Bcast([chosen, MPI.BYTE], root=0)
    address, port = json.loads(bytes(chosen).rstrip(b"\0"))
    return address, port
