"""One process: who it is, and collectives that need no group."""

import os

import pytest
import torch
import torch.distributed

from distlora.cluster.topology import publish, topology_from_environment
from distlora.engine.comm import Comm, Topology
from distlora.errors import UserError

LAUNCHER_VARIABLES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("TORCHELASTIC_RUN_ID", "GROUP_RANK", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"),
    *(
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_NODEID",
        "SLURM_NNODES",
        "SLURM_JOB_ID",
    ),
    *("SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """No launcher's variables, and none left behind."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the end of the test restores what was, absence included
        monkeypatch.delenv(name)


def _environment(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def _comm(**fields):
    return Comm(Topology(**fields), torch.device("cpu"), distributed=False)


# ---------------------------------------------------------------------- who this process is


def test_without_a_launcher_there_is_one_process():
    assert topology_from_environment() == Topology(0, 1, 0)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1},
        {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_RANK": 1},
        {"PMI_RANK": 3, "PMI_SIZE": 4, "MPI_LOCALRANKID": 1},
        {"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1, "SLURM_STEP_ID": 0},
        # SLURM's PMI plugin speaks PMI's names, but keeps the local rank under its own.
        {
            "PMI_SIZE": 4,
            "PMI_RANK": 3,
            "SLURM_PROCID": 3,
            "SLURM_NTASKS": 4,
            "SLURM_LOCALID": 1,
            "SLURM_STEP_ID": 0,
        },
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_each_launcher_is_understood(monkeypatch, variables):
    _environment(monkeypatch, MASTER_ADDR="node0", **variables)
    assert topology_from_environment() == Topology(rank=3, world_size=4, local_rank=1)


def test_the_most_explicit_launcher_wins(monkeypatch):
    """torchrun inside a SLURM job step: SLURM counts nodes there, torchrun ranks."""
    _environment(
        monkeypatch,
        MASTER_ADDR="node0",
        SLURM_PROCID=1,
        SLURM_NTASKS=2,
        SLURM_STEP_ID=0,
        RANK=5,
        WORLD_SIZE=8,
    )
    assert topology_from_environment() == Topology(rank=5, world_size=8)


def test_an_interactive_slurm_shell_is_one_process(monkeypatch):
    _environment(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=8)
    assert topology_from_environment() == Topology()


def test_several_processes_without_an_address_are_refused(monkeypatch):
    _environment(monkeypatch, RANK=0, WORLD_SIZE=4)
    with pytest.raises(UserError, match="MASTER_ADDR") as refused:
        topology_from_environment()
    assert refused.value.agreed, "every rank sees it, so rank 0 alone says it"
    _environment(monkeypatch, WORLD_SIZE=1)  # a single one needs none
    assert topology_from_environment() == Topology()


def test_what_was_derived_is_in_the_environment_and_told(monkeypatch):
    node = {"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}
    _environment(monkeypatch, **node)
    (note,) = topology_from_environment().notes
    assert note == f"the ranks meet at 127.0.0.1:{os.environ['MASTER_PORT']}, for all are on this node"
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert topology_from_environment().notes == (), "what is set by now is as if the user had set it"


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, ""),
        ({"RANK": 0, "WORLD_SIZE": 1}, "the variables RANK and WORLD_SIZE"),
        ({"RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"RANK": 0, "WORLD_SIZE": 1, "CROSS_RANK": 0}, "DeepSpeed's launcher"),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1}, "Open MPI"),
        ({"PMI_RANK": 0, "PMI_SIZE": 1}, "PMI"),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_STEP_ID": 0}, "SLURM"),
    ],
)
def test_who_said_so(monkeypatch, variables, launcher):
    _environment(monkeypatch, **variables)
    assert topology_from_environment().launcher == launcher


# ---------------------------------------------------------------------- a group of one


def test_several_ranks_without_a_group_are_refused():
    with pytest.raises(UserError, match="deepspeed"):
        _comm(rank=1, world_size=2)


def test_no_group_is_made_unless_asked_for():
    comm = _comm()
    assert not torch.distributed.is_initialized()
    assert Comm.of_running_group(torch.device("cpu")).world_size == 1, "where the program has made none"
    assert (comm.rank, comm.world_size, comm.local_rank, comm.is_main) == (0, 1, 0, True)
    assert not _comm(rank=0).rank and comm.device == torch.device("cpu")
    comm.barrier()
    comm.close()


def test_tensors_of_a_group_of_one_come_back_as_they_are():
    comm, tensor = _comm(), torch.tensor([1.0, 2.0])
    for result in (comm.all_reduce(tensor), comm.reduce_to(tensor, 0), comm.broadcast(tensor, 0)):
        assert result is tensor and tensor.tolist() == [1.0, 2.0]
    assert comm.all_gather(tensor).tolist() == [[1.0, 2.0]]


def test_sums_are_exact_in_float64():
    assert _comm().sum(1.0, 2**53 - 1, 0.1) == (1.0, 2**53 - 1, 0.1)


def test_values_are_shared():
    value = {"path": "run/ü", "steps": [1, 2], "loss": None}
    assert _comm().share(value) == value
    assert _comm().gather(value) == [value]


def test_agreement_raises_the_error_itself_or_nothing():
    comm, error = _comm(), UserError("no such file")
    comm.agree(None)
    with pytest.raises(UserError) as raised:
        comm.agree(error)
    assert raised.value is error


def test_one_process_can_be_a_real_group_and_leaves_none_behind():
    """What DeepSpeed needs on one process; a free port is found, and the variables that it reads are set."""
    comm = Comm(Topology(), torch.device("cpu"))
    try:
        assert torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1
        publish(Topology(), comm.device, comm.master)
        assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 0
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
        assert comm.sum(2.0) == (2.0,)
        assert comm.master == f"127.0.0.1:{os.environ['MASTER_PORT']}"
        borrowed = Comm.of_running_group(torch.device("cpu"))
        assert (borrowed.rank, borrowed.world_size, borrowed.sum(2.0)) == (0, 1, (2.0,))
        borrowed.close()
        assert torch.distributed.is_initialized()
    finally:
        comm.close()
    assert not torch.distributed.is_initialized()
