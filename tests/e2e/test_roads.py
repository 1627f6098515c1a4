"""Two hosts by every road, on a cluster of namespaces: one loss curve, and an end in good order whatever
happens.

A start over two hosts takes ten seconds and more, so each has to show several things.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.bench import Bench
from tests.e2e.program import finish, started
from tests.e2e.testbed import wait_for

long = pytest.mark.cluster_long
#: Long enough to be interrupted, on a quiet machine and on a busy one.
STEPS = 40
#: Seconds for a start over two hosts, on a machine that does other things too.
PATIENCE = 280
#: Seconds within which everything has ended after a signal.
FAREWELL = 35
#: What a shell would make something of.
SIGNS = """a "b"; $(touch evil) `touch evil` %h 'c' \\ &"""
#: How a rank's command line begins, after the interpreter's path.
RANK = "-u -m distlora.cli.as_rank"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("roads"), steps=STEPS, save_every=8)


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    return path


def deepspeed_sh(*words: object) -> list[object]:
    return ["bash", "launch/deepspeed.sh", *words]


def mpi_sh(*words: object) -> list[object]:
    """Open MPI refuses to run as root unless it is told."""
    return ["bash", "launch/mpi.sh", "--mpirun-args=--allow-run-as-root --oversubscribe", *words]


def torchrun(node: int, *arguments: str) -> list[object]:
    """One node's part, as the README says it."""
    place = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--node-rank",
        node,
        "--master-addr",
        "node1",
        "--master-port",
        "29511",
    ]
    return [Path(sys.executable).with_name("torchrun"), *place, "-m", "distlora", "train", *arguments]


def run(cluster, command):
    """The command on head to its end, which must be a good one."""
    with started(*cluster.on("head", *command)) as process:
        outcome = finish(process, PATIENCE)
    assert outcome.code == 0, outcome.err[-4000:]
    return outcome


def interrupt(cluster, bench, name, command, victim, number=signal.SIGTERM):
    """Signals `victim(cluster)` once the run is under way; returns the outcome and the seconds until
    everything had ended.
    """
    with started(*cluster.on("head", *command)) as process:
        wait_for(lambda: bench.steps(name) >= 3 or process.poll() is not None, PATIENCE, "step 3")
        assert process.poll() is None, finish(process, 10).err[-4000:]
        began = time.monotonic()
        os.kill(victim(cluster), number)
        outcome = finish(process, 2 * FAREWELL)
        seconds = time.monotonic() - began
    return outcome, seconds


def the_script(cluster) -> int:
    """The first one of its processes: the others are parts of it. (The lowest number is not always the first
    one's: numbers begin again at the end.)
    """
    running = [
        pid for pid, command in cluster.processes("head").items() if command.startswith("bash launch/")
    ]
    return min(running, key=_start_time)


def _start_time(pid: int) -> tuple[int, int]:
    """Clock ticks from the machine's start to that of a process, and its number. In /proc/PID/stat they
    follow the name, which may hold anything.
    """
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]), pid


# ---------------------------------------------------------------------- DeepSpeed's launcher


def test_deepspeed_over_ssh_stops_when_it_is_told_and_goes_on(bench, hostfile, ssh_cluster):
    """And what stands in the command line arrives unharmed."""
    name = f"deepspeed {SIGNS}"
    quoted = str(bench.folder / name).replace("'", "''")  # as YAML has it
    command = deepspeed_sh(hostfile, *bench.arguments("deepspeed"), f"output_dir='{quoted}'")
    outcome, seconds = interrupt(ssh_cluster, bench, name, command, the_script)
    assert outcome.code == 75, outcome.err[-4000:]
    assert seconds < FAREWELL and ssh_cluster.processes() == {}
    stopped = bench.status(name)
    assert (
        stopped.state == "preempted"
        and stopped.requeue
        and f"preempted at step {stopped.step} of {STEPS}" in outcome.err
    )
    outcome = run(ssh_cluster, command)
    assert "2 ranks on 2 hosts (node1: 0; node2: 1), master 10.231.77.11:" in outcome.err
    assert f"/checkpoint-{stopped.step}" in outcome.err, "it went on from where it stopped"
    bench.expect_same_curve(name)
    assert not list(bench.folder.rglob("evil")) and bench.status(name).state == "done"


@pytest.mark.long
def test_every_host_for_itself(bench, hostfile, ssh_cluster):
    """Without ssh between the hosts: the same command on each, with its own number."""
    words = [hostfile, *bench.arguments("no-ssh", "train.steps=6")]
    parts = [
        ssh_cluster.on(f"node{node + 1}", *deepspeed_sh("--no-ssh", "--node-rank", node, *words))
        for node in (0, 1)
    ]
    with started(*parts[0]) as first, started(*parts[1]) as second:
        outcomes = [finish(process, PATIENCE) for process in (first, second)]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err[-4000:]
    bench.expect_same_curve("no-ssh", 6)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("node1 slots=1\nnode1 slots=1\n", "hosts:2: node1 stands in"),
        ("nöde1 slots=1\n", "hosts:1: 'nöde1 slots=1' has a character that is not ASCII"),
        ("# none\n", "hosts names no host"),
        ("node1 slots=1\nlocalhost slots=1\n", "hosts:2: localhost is another machine on every host"),
        ("node1 slots=1\nnode9 slots=1\n", "hosts:2: node9: cannot be reached through ssh"),
    ],
)
def test_a_mistake_in_the_hostfile_shows_before_anything_starts(
    bench, ssh_cluster, tmp_path, lines, sentence
):
    (tmp_path / "hosts").write_text(lines)
    outcome = ssh_cluster.run("head", *deepspeed_sh(tmp_path / "hosts", *bench.arguments("mistake")))
    assert outcome.code == 2 and outcome.out == "" and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("deepspeed.sh: ") and sentence in outcome.err


# ---------------------------------------------------------------------- Open MPI and torchrun


@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="there is no mpirun (Debian and Ubuntu: the package openmpi-bin)"
)
def test_mpi_over_two_hosts(bench, hostfile, ssh_cluster):
    pytest.importorskip("mpi4py", reason="there is no mpi4py (pip install 'distlora[mpi]')")
    outcome = run(ssh_cluster, mpi_sh("--hostfile", hostfile, *bench.arguments("mpi", "train.steps=6")))
    assert "as rank 0 told the others through MPI" in outcome.err and "told by Open MPI" in outcome.err
    bench.expect_same_curve("mpi", 6)


def test_torchrun_on_two_hosts_and_a_crash_of_one(bench, ssh_cluster):
    """The other host's ranks end within the limit and say who is silent; a new start goes on."""
    limit = 6
    words = bench.arguments("torchrun", f"train.hang_timeout={limit}", "train.save_every=2")
    with (
        started(*ssh_cluster.on("node1", *torchrun(0, *words))) as first,
        started(*ssh_cluster.on("node2", *torchrun(1, *words))),
    ):
        wait_for(lambda: bench.steps("torchrun") >= 5 or first.poll() is not None, PATIENCE, "step 5")
        ssh_cluster.crash("node2")
        crashed = time.monotonic()
        wait_for(lambda: bench.status("torchrun").state == "failed", limit + 10, "the end of rank 0")
        seconds = time.monotonic() - crashed
        outcome = finish(first, 60)
    assert outcome.code != 0 and seconds < limit + 10
    assert "distlora: rank 1 on node2 went silent for" in outcome.err
    status = bench.status("torchrun")
    assert status.requeue and "rank 1 on node2" in status.message
    ssh_cluster.boot("node2")
    with (
        started(*ssh_cluster.on("node1", *torchrun(0, *words))) as first,
        started(*ssh_cluster.on("node2", *torchrun(1, *words))) as second,
    ):
        outcomes = [finish(process, PATIENCE) for process in (first, second)]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err[-4000:]
    bench.expect_same_curve("torchrun")


# ---------------------------------------------------------------------- longer ones


@long
@pytest.mark.parametrize(
    ("road", "victim", "number"),
    [
        ("deepspeed", ("node2", "-m deepspeed.launcher.launch"), signal.SIGTERM),
        ("deepspeed", ("node2", RANK), signal.SIGTERM),
        ("deepspeed", ("head", "bash launch/"), signal.SIGINT),
        ("mpi", ("head", "bash launch/"), signal.SIGTERM),
        ("mpi", ("node1", RANK), signal.SIGUSR1),
        ("alone", ("head", "bash launch/"), signal.SIGUSR1),
        ("alone", ("head", "-m deepspeed.launcher.launch"), signal.SIGTERM),
    ],
    ids=lambda value: value[1].split()[-1] if isinstance(value, tuple) else str(value),
)
def test_whoever_is_told_to_stop_all_stop(bench, hostfile, ssh_cluster, road, victim, number):
    """In the middle of an accumulation of many micro-batches."""
    host, words = victim
    name = f"{road}-{host}-{words.split()[-1].replace('/', '')}-{number}"
    arguments = bench.arguments(
        name, "train.global_batch_size=64", "train.micro_batch_size=1", "train.steps=400"
    )
    command = {
        "deepspeed": deepspeed_sh(hostfile, *arguments),
        "mpi": mpi_sh("--hostfile", hostfile, *arguments),
        "alone": deepspeed_sh("--ranks", 2, "-", *arguments),
    }[road]

    def find(cluster):
        return min(
            pid for pid, line in cluster.processes(host).items() if words in line and "export " not in line
        )

    outcome, seconds = interrupt(ssh_cluster, bench, name, command, find, number)
    assert outcome.code == 75, outcome.err[-4000:]
    assert seconds < FAREWELL and ssh_cluster.processes() == {}
    assert bench.status(name).state == "preempted"


@long
def test_a_stop_does_not_wait_for_an_accumulation_of_slow_micro_batches(hostfile, ssh_cluster, tmp_path):
    """32 of them a rank, whose weights come over a slow link. What was accumulated is thrown away, and made
    again later.
    """
    bench = Bench(tmp_path, rows=64, steps=3, global_batch_size=64, micro_batch_size=1, save_every=0)
    gathers = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    command = deepspeed_sh(hostfile, *bench.arguments("slow", gathers))
    with started(*ssh_cluster.on("head", *command)) as process:
        wait_for(lambda: bench.steps("slow") >= 1 or process.poll() is not None, PATIENCE, "step 1")
        ssh_cluster.slow("node2", "2mbit")
        wait_for(lambda: bench.steps("slow") >= 2 or process.poll() is not None, PATIENCE, "step 2")
        time.sleep(3)
        began = time.monotonic()
        os.kill(the_script(ssh_cluster), signal.SIGTERM)
        outcome = finish(process, 2 * FAREWELL)
        seconds = time.monotonic() - began
    assert outcome.code == 75 and seconds < FAREWELL, outcome.err[-4000:]
    assert bench.status("slow").step == 2 and ssh_cluster.processes() == {}
    ssh_cluster.heal("node2")
    run(ssh_cluster, command)
    bench.expect_same_curve("slow")


@long
def test_a_cut_link_ends_the_job_and_names_the_host_and_the_same_command_goes_on(
    bench, hostfile, ssh_cluster
):
    limit = 6
    command = deepspeed_sh(
        "--grace", 10, hostfile, *bench.arguments("cut", f"train.hang_timeout={limit}", "train.save_every=2")
    )
    with started(*ssh_cluster.on("head", *command)) as process:
        wait_for(lambda: bench.steps("cut") >= 3 or process.poll() is not None, PATIENCE, "step 3")
        ssh_cluster.cut("node2")
        began = time.monotonic()
        wait_for(
            lambda: not ssh_cluster.processes("node2"), limit + 20, "the end of node2's rank, which is alone"
        )
        outcome = finish(process, 60)
        seconds = time.monotonic() - began
    assert outcome.code == 75 and "rank 1 on node2 went silent for" in outcome.err, outcome.err[-4000:]
    assert seconds < limit + 40
    ssh_cluster.heal("node2")
    assert ssh_cluster.processes() == {}
    assert "/checkpoint-" in run(ssh_cluster, command).err
    bench.expect_same_curve("cut")


@long
def test_a_cut_link_ends_the_job_long_before_the_usual_limit(bench, hostfile, ssh_cluster):
    """ssh notices it within 15 s. The ranks that can be reached are asked to end then, and look who is
    silent.
    """
    command = deepspeed_sh(hostfile, *bench.arguments("early", "train.steps=400"))
    with started(*ssh_cluster.on("head", *command)) as process:
        wait_for(lambda: bench.steps("early") >= 3 or process.poll() is not None, PATIENCE, "step 3")
        ssh_cluster.cut("node2")
        began = time.monotonic()
        outcome = finish(process, 120)
        seconds = time.monotonic() - began
    assert outcome.code == 75, outcome.err[-4000:]
    assert "deepspeed.sh: a host is lost" in outcome.err, outcome.err[-4000:]
    assert "rank 1 on node2 went silent for" in outcome.err, outcome.err[-4000:]
    assert seconds < 45, "before anything is killed"
    status = bench.status("early")
    assert status.state == "failed" and status.requeue and not ssh_cluster.processes("head", "node1")


@long
def test_hosts_whose_own_names_mean_a_loopback_address(bench, ssh_cluster, tmp_path):
    """As Debian's installer writes /etc/hosts. gloo would listen there, and nobody find it."""
    known = (ssh_cluster.folder / "hosts").read_text()
    parts = []
    for node in (0, 1):
        own = tmp_path / f"hosts-{node}"
        own.write_text(
            "".join(f"{line}\n" for line in known.splitlines() if not line.endswith(f"node{node + 1}"))
        )
        own.write_text(f"{own.read_text()}127.0.1.1 node{node + 1}\n")
        start = torchrun(node, *bench.arguments("loopback", "train.steps=6"))
        hidden = [
            "unshare",
            "--mount",
            "bash",
            "-c",
            'mount --bind "$0" /etc/hosts && exec "$@"',
            own,
            *start,
        ]
        parts.append(ssh_cluster.on(f"node{node + 1}", *hidden))
    with started(*parts[0]) as first, started(*parts[1]) as second:
        outcomes = [finish(process, PATIENCE) for process in (first, second)]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err[-4000:]
    assert (
        "node1, means the address 127.0.1.1 here: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME set to eth0"
        in outcomes[0].err
    )
    assert (
        "node2, means the address 127.0.1.1"
        in (bench.folder / "loopback" / "logs" / "rank-1.log").read_text()
    )
    bench.expect_same_curve("loopback", 6)


@long
def test_a_master_that_is_every_hosts_own_ends_all_at_once(bench, ssh_cluster):
    """No rank waits for one that cannot come, and the sentence comes once."""
    words = bench.arguments("own-master")
    place = [
        "WORLD_SIZE=2",
        "LOCAL_RANK=0",
        "LOCAL_WORLD_SIZE=1",
        "MASTER_ADDR=localhost",
        "MASTER_PORT=29512",
    ]
    codes, said = [], ""
    for rank in (0, 1):
        variables = [f"RANK={rank}", f"GROUP_RANK={rank}", *place]
        outcome = ssh_cluster.run(
            f"node{rank + 1}", "env", *variables, "python", "-m", "distlora", "train", *words
        )
        codes.append(outcome.code)
        said += outcome.err
    assert (
        codes == [2, 2]
        and said.count("localhost is a loopback address, and the job has several nodes; set MASTER_ADDR") == 1
    )


@long
def test_deepspeed_through_open_mpi(bench, hostfile, ssh_cluster):
    words = ["--launcher", "openmpi", "--launcher-args=--allow-run-as-root", hostfile]
    outcome = run(ssh_cluster, deepspeed_sh(*words, *bench.arguments("openmpi", "train.steps=6")))
    assert "told by Open MPI" in outcome.err
    bench.expect_same_curve("openmpi", 6)


@long
def test_the_doctor_looks_at_the_hosts_through_ssh_and_within_a_job(bench, hostfile, ssh_cluster):
    asked = ["-m", "distlora", "doctor", "--run-dir", bench.folder, "--no-build"]
    outcome = ssh_cluster.run("head", "python", *asked[:3], hostfile, *asked[3:])
    assert outcome.code == 0, outcome.out + outcome.err
    variables = [word for name in ("PATH", "PYTHONPATH", "DS_ACCELERATOR") for word in ("-x", name)]
    mpirun = ["mpirun", "--allow-run-as-root", "--hostfile", hostfile, *variables]
    outcome = ssh_cluster.run("head", *mpirun, "python", *asked)
    assert outcome.code == 0, outcome.out + outcome.err
    for found in ("to 10.231.77.11 through eth0", "is writable, and shared", "right on 2 ranks"):
        assert found in outcome.out, outcome.out
