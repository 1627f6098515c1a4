"""What launchers, schedulers and users say of hosts and ranks."""

from hypothesis import strategies as st

from distlora.cluster import nodelist
from distlora.cluster.hostfile import read_hostfile
from distlora.cluster.rendezvous import complete_environment, find_place, own_local_rank, own_rank
from tests.fuzz.damage import HOSTILE, damaged, damaged_text, written
from tests.fuzz.rule import Loader

HOSTFILE = b"# all\nnode1 slots=8\nuser@node2.example slots=08  # comment\n10.0.0.3 slots=4\n\n"
NODELISTS = ("node[1-3,7],gpu-a[01-02]", "a[1-2]b[3-4]", "login", "n[001-100]")
SLURM = {
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "127.0.0.[1-1]",
}  # fmt: skip
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29512", "GROUP_RANK": "0",
}  # fmt: skip


def _hosts(text: str, folder):
    found = []
    for name in nodelist.hosts(text):
        found.append(name)
        if len(found) == 50:
            break
    return found


def _environment(given, folder):
    variables, changes = given
    environment = variables | changes
    own_rank(environment), own_local_rank(environment)
    place = find_place(environment)
    if place.several_nodes is False:
        complete_environment(environment, place, lambda *_: ("127.0.0.1", 29511))


_VALUES = st.one_of(
    st.sampled_from(("0", "1", "4", "-1", "", "01", "1.5", "99999", "node[1-2]", "x")),
    st.sampled_from([word for word in HOSTILE if "\0" not in word]),
    damaged_text(["1", "77", "127.0.0.1"], most=2),
)
_CHANGES = st.dictionaries(st.sampled_from([*SLURM, *TORCHRUN]), _VALUES, max_size=3)
LOADERS = (
    Loader(
        "hostfile",
        damaged([HOSTFILE], [b"slots=", b"@", b"node1 slots=8\n"]),
        lambda content, folder: read_hostfile(written(folder, content, "hosts")),
    ),
    Loader("list of nodes", damaged_text(NODELISTS, ["[", "]", "1-", "-"]), _hosts),
    Loader("environment", st.tuples(st.sampled_from((SLURM, TORCHRUN, {})), _CHANGES), _environment),
)
