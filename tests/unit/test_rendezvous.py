"""Who this process is and where the ranks meet, from the environments that launchers really leave."""

import socket
import sys

import pytest

from distlora.cluster import mpi, nodelist, rendezvous
from distlora.cluster.addresses import IN_USE
from distlora.cluster.rendezvous import Place, complete_environment, find_place, own_local_rank, own_rank
from distlora.errors import UserError

SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_NODELIST": "node[1-4]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "764149761",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """What host names mean; own ones mean an address in the network unless a test says otherwise."""
    known = {"node1": "10.0.0.1", "node2": "10.0.0.2", "node3": "10.0.0.3"}
    own = {"eth0": "10.0.0.2", "lo": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    monkeypatch.setattr(
        rendezvous,
        "addresses",
        lambda name: [known.get(name, name)] if name in known or name[0].isdigit() else [],
    )
    monkeypatch.setattr(
        rendezvous, "source", lambda address: address if address.startswith("127.") else "10.0.0.2"
    )
    monkeypatch.setattr(rendezvous, "interfaces", lambda: own)
    monkeypatch.setattr(rendezvous, "problem_with_port", lambda port: None)
    monkeypatch.setattr(
        rendezvous, "interface_of", lambda address: {"10.0.0.2": "eth0", "127.0.0.1": "lo"}.get(address)
    )
    return known


def settled(variables: dict, **more: str) -> dict:
    """What is added to the environment."""
    environment = {**variables, **more}
    before = dict(environment)
    complete_environment(environment, find_place(environment))
    return {name: value for name, value in environment.items() if before.get(name) != value}


# ---------------------------------------------------------------------- who this is


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [(SLURM, "SLURM"), (OPEN_MPI, "Open MPI"), (DEEPSPEED, "DeepSpeed's launcher"), (TORCHRUN, "torchrun")],
)
def test_every_road_says_the_place_on_two_nodes(variables, launcher):
    assert find_place(variables) == Place(3, 4, 1, launcher, several_nodes=True, first_node=False)


def test_one_node_is_seen_as_one():
    assert find_place({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).several_nodes is False
    assert find_place({**SLURM, "SLURM_STEP_NUM_NODES": "1"}).several_nodes is False
    assert find_place({"RANK": "0", "WORLD_SIZE": "2"}).several_nodes is None, "nobody says it"


def test_the_step_counts_its_own_tasks():
    """salloc's interactive shell is a step of one task, in which SLURM_NTASKS is the job's."""
    shell = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_ID": "4294967290",
        "SLURM_STEP_NUM_TASKS": "1",
    }
    assert find_place(shell) == Place(0, 1, 0, "SLURM", several_nodes=None)
    assert settled({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}) == settled(SLURM)


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK='two' is no whole number"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK='' is no whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1' is no whole number"),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "is no whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4 contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 contradict"),
        ({"RANK": "1"}, "WORLD_SIZE is not; set both"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x'"),
    ],
)
def test_numbers_that_cannot_be(variables, part):
    with pytest.raises(UserError, match="set") as refused:
        find_place(variables)
    assert part in str(refused.value)
    assert isinstance(own_rank(variables), int) and isinstance(own_local_rank(variables), int), (
        "whoever speaks needs a number"
    )


def test_the_rank_is_known_without_an_address():
    variables = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    assert (own_rank(variables), own_local_rank(variables)) == (3, 0)
    assert own_local_rank({**variables, "OMPI_COMM_WORLD_LOCAL_RANK": "1", "SLURM_LOCALID": "0"}) == 1


# ---------------------------------------------------------------------- where ranks meet


def test_slurm_says_it_by_the_steps_nodes_and_numbers():
    found = settled(SLURM)
    assert found["MASTER_ADDR"] == "node1" and set(found) == {"MASTER_ADDR", "MASTER_PORT"}
    assert settled({**SLURM, "SLURM_STEP_NODELIST": ""})["MASTER_ADDR"] == "node1"
    everyone = [settled({**SLURM, "SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert everyone == [found] * 4


def test_slurms_ranks_under_other_names():
    pmi = {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}
    by_hand = {**SLURM, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert settled(pmi) == settled(by_hand) == settled(SLURM)


def test_two_jobs_on_a_node_meet_at_two_ports():
    ports = {
        settled({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(4_000_000, 4_000_050)
        for step in range(20)
    }
    assert len(ports) == 50 * 20 and all(10000 <= int(port) < 30000 for port in ports)


def test_a_derived_port_that_is_in_use_says_who_chose_it(monkeypatch):
    first = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    port = int(settled(first)["MASTER_PORT"])
    monkeypatch.setattr(rendezvous, "problem_with_port", {port: IN_USE}.get)
    with pytest.raises(
        UserError, match=f"the port {port} is in use on node2; it was derived, .* export MASTER_PORT"
    ):
        settled(first)
    assert "MASTER_PORT" in settled(SLURM), "another rank does not listen there"
    assert settled(first, MASTER_PORT=str(port)) == {"MASTER_ADDR": "node1"}, (
        "the user's choice is tried as it is"
    )


def test_what_the_user_set_wins():
    assert settled(SLURM, MASTER_ADDR="node2", MASTER_PORT="1234") == {}
    assert set(settled(SLURM, MASTER_ADDR="node2")) == {"MASTER_PORT"}
    assert settled(SLURM, MASTER_PORT="1234") == {"MASTER_ADDR": "node1"}


def test_mpi_on_one_node_meets_at_home():
    one = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert settled(one)["MASTER_ADDR"] == "127.0.0.1"
    assert settled(one) != settled({**one, "PMIX_NAMESPACE": "764149762"}), "another job has another port"
    in_slurm = {**one, "SLURM_JOB_ID": "812"}
    assert settled(in_slurm) == settled(one), "as two calls of mpirun within a job of SLURM have"


def test_mpi_on_several_nodes_asks_rank_0():
    def agree(own_name, choose, world_size):
        assert (own_name, world_size) == ("node2", 4)
        return choose(["node2", "node2", "node3", "node3"])

    environment = dict(OPEN_MPI)
    (note,) = complete_environment(environment, find_place(environment), agree)
    assert environment["MASTER_ADDR"] == "10.0.0.2", "rank 0's own address on the way to the others"
    assert int(environment["MASTER_PORT"]) > 0 and "through MPI" in note


def test_one_process_needs_no_place():
    assert settled({}) == settled({"RANK": "0", "WORLD_SIZE": "1"}) == {}


@pytest.mark.parametrize(
    ("variables", "part", "agreed"),
    [
        ({**SLURM, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "name no host", True),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[1-"}, "'node[1-' is no list of hosts", False),
        ({**DEEPSPEED, "MASTER_PORT": "http"}, "MASTER_PORT=http is no port", True),
        ({**DEEPSPEED, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port", True),
        ({**DEEPSPEED, "MASTER_ADDR": "127.0.0.1"}, "127.0.0.1 is a loopback address", True),
        ({**TORCHRUN, "MASTER_ADDR": "localhost"}, "localhost is a loopback address", True),
        ({**TORCHRUN, "MASTER_ADDR": "nobody"}, "nobody means nothing on node2", False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set", True),
    ],
)
def test_a_place_that_cannot_be(variables, part, agreed):
    with pytest.raises(UserError, match=r"MASTER_ADDR|1 to 65535") as refused:
        settled(variables)
    assert part in str(refused.value) and refused.value.agreed is agreed


def test_a_master_that_means_loopback_elsewhere(names):
    """Debian's /etc/hosts gives the own name 127.0.1.1: on the master's host that is harmless, on others
    fatal.
    """
    names["node1"] = "127.0.1.1"
    with pytest.raises(UserError, match="node1 means the loopback address 127.0.1.1 on node2"):
        settled(DEEPSPEED, MASTER_ADDR="node1")
    assert "MASTER_ADDR" not in settled(DEEPSPEED, MASTER_ADDR="node1", CROSS_RANK="0")


# ---------------------------------------------------------------------- interfaces


def test_a_host_whose_own_name_is_loopback_listens_where_the_master_is(names):
    names["node2"] = "127.0.1.1"
    assert settled(DEEPSPEED) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert settled(DEEPSPEED, GLOO_SOCKET_IFNAME="ib0") == {}, "the user's choice"
    assert settled(DEEPSPEED, CROSS_SIZE="1", LOCAL_SIZE="4") == {}, "one node may talk to itself"
    assert settled({"RANK": "0", "WORLD_SIZE": "2"}, MASTER_ADDR="127.0.0.1", MASTER_PORT="1") == {}, (
        "and this can be one only"
    )
    environment = dict(DEEPSPEED)
    (note,) = complete_environment(environment, find_place(environment))
    assert "node2, means the address 127.0.1.1" in note and "set to eth0" in note


def test_on_the_masters_own_host_another_node_shows_the_way(names, monkeypatch):
    names["node2"] = "127.0.1.1"
    asked = []
    monkeypatch.setattr(rendezvous, "source", lambda address: asked.append(address) or "10.0.0.2")
    on_first = {**SLURM, "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "node[2-3]"}
    assert settled(on_first)["GLOO_SOCKET_IFNAME"] == "eth0"
    assert asked == ["10.0.0.3"]


def test_where_the_way_is_not_clear_nothing_is_set(names, monkeypatch):
    names["node2"] = "127.0.1.1"
    monkeypatch.setattr(
        rendezvous, "interfaces", lambda: {"eth0": "10.0.0.2", "eth1": "10.1.0.2", "lo": "127.0.0.1"}
    )
    environment = {**DEEPSPEED, "MASTER_ADDR": "node2", "CROSS_RANK": "0"}
    (note,) = complete_environment(environment, find_place(environment))
    assert "set GLOO_SOCKET_IFNAME" in note and "GLOO_SOCKET_IFNAME" not in environment


# ---------------------------------------------------------------------- SLURM's lists of hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7],gpu-a[01-02]", ["node1", "node2", "node3", "node7", "gpu-a01", "gpu-a02"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1-2]-ib,login", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib", "login"]),
        ("a.b-c.example,d", ["a.b-c.example", "d"]),
        ("", []),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert list(nodelist.hosts(text)) == hosts


def test_the_first_of_a_long_list_is_cheap():
    assert next(nodelist.hosts("n[00001-99999999999]")) == "n00001"


@pytest.mark.parametrize("text", ["n[1-", "n[]", "n[a]", ",", "n[1-2-3]", "n[-2]", "n[1-]", "n 1", "n]1"])
def test_what_is_no_list_of_hosts(text):
    with pytest.raises(UserError, match="MASTER_ADDR"):
        list(nodelist.hosts(text))


# ---------------------------------------------------------------------- MPI


def test_without_mpi4py_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        UserError,
        match=r"4 MPI ranks on several nodes .* pip install 'distlora\[mpi\]', or export MASTER_ADDR",
    ):
        settled(OPEN_MPI)


class OneOfSeveral:
    """An MPI as rank 1 sees it."""

    BYTE, rank = "byte", 1

    def __init__(self, size: int, names: tuple[str, ...] = (), said: str = ""):
        self.COMM_WORLD, self.size, self._names, self._said = self, size, names, said

    def Get_library_version(self) -> str:
        return "Open MPI v4.1.4, package: Debian"

    def Allgather(self, own, everyones) -> None:
        width = len(own[0])
        everyones[0][:] = b"".join(name.encode().ljust(width, b"\0") for name in self._names)

    def Bcast(self, buffer, root: int) -> None:
        if self._said:
            buffer[0][: len(self._said)] = self._said.encode()
        self.sent = bytes(buffer[0]).rstrip(b"\0")


def test_rank_0_chooses_and_the_others_hear():
    hearing = OneOfSeveral(2, ("node1", "node2"), said='["10.0.0.1", 4711]')
    assert mpi._agree(hearing, "node2", lambda hosts: pytest.fail("rank 0 chooses"), 2) == ("10.0.0.1", 4711)
    choosing = OneOfSeveral(2, ("node1", "node2"))
    choosing.rank = 0
    assert mpi._agree(choosing, "node1", lambda hosts: (hosts[1], 4711), 2) == ("node2", 4711)
    assert choosing.sent == b'["node2", 4711]'


def test_another_mpi_than_the_launchers_is_named():
    with pytest.raises(UserError, match="mpi4py sees 1 of 4 ranks: it uses another MPI .Open MPI v4.1.4"):
        mpi._agree(OneOfSeveral(1), "node1", None, 4)
