"""The cluster of namespaces itself: what the other tests take for granted of it, and that nothing of it is
left.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e import testbed
from tests.e2e.program import PATIENCE, Outcome, started
from tests.e2e.testbed import SCRIPT, cluster, lacking, wait_for


def test_hosts_are_apart_but_for_their_files(ssh_cluster, tmp_path):
    said = ssh_cluster.run(
        "head", "pdsh", "-R", "ssh", "-S", "-w", "node[1-2]", f"hostname -I; touch {tmp_path}/$(hostname)"
    )
    assert sorted(said.out.split("\n")) == ["", "node1: 10.231.77.11 ", "node2: 10.231.77.12 "], said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node1", "node2"]
    with started(*ssh_cluster.on("node2", "sleep", "1000")):
        wait_for(
            lambda: "sleep 1000" in ssh_cluster.processes("node2").values(), PATIENCE, "a process on node2"
        )
        assert ssh_cluster.processes("node1") == {}
        assert "sleep" not in ssh_cluster.run("node1", "ps", "-e").out


def test_a_cut_link_is_silent_and_a_crash_is_mended(ssh_cluster):
    def ask(
        patience: int,
    ) -> Outcome:  # it covers ssh's greeting too, which takes a second where all cores are busy
        return ssh_cluster.run("node1", "ssh", "-o", f"ConnectTimeout={patience}", "node2", "hostname")

    ssh_cluster.cut("node2")
    assert "timed out" in ask(1).err
    ssh_cluster.heal("node2")
    assert ask(30).out == "node2\n"
    ssh_cluster.crash("node2")
    assert "timed out" in ask(1).err, "a host without power does not refuse, it is silent"
    ssh_cluster.repair()
    assert ask(30).out == "node2\n"


def test_slurm_runs_tasks_on_both_nodes_with_their_gpus(slurm_cluster):
    shown = "echo $SLURM_PROCID $(hostname) $CUDA_VISIBLE_DEVICES"
    said = slurm_cluster.run(
        "head", "srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "bash", "-c", shown
    )
    lines = sorted(line.split()[:2] for line in said.out.splitlines())
    assert lines == [["0", "node1"], ["1", "node1"], ["2", "node2"], ["3", "node2"]], (
        said.err + slurm_cluster.logs()
    )


def test_nothing_is_left(tmp_path):
    reason = lacking()
    if reason:
        pytest.skip(reason)
    name = f"t{os.getpid()}"
    with cluster(tmp_path / "bed", name) as made, started(*made.on("node1", "sleep", "1000")):
        wait_for(lambda: made.processes("node1"), PATIENCE, "a process on node1")
        sleeping = made.process("node1", "sleep")
        assert any(path.name.startswith(name) for path in Path("/run/netns").iterdir())
    assert not (tmp_path / "bed").exists()
    wait_for(
        lambda: not Path(f"/proc/{sleeping}").exists(), PATIENCE, "its end"
    )  # the kernel ends it in its own time
    assert not any(path.name.startswith(name) for path in Path("/run/netns").iterdir())


def test_a_cluster_whose_owner_was_killed_goes_down(tmp_path):
    reason = lacking()
    if reason:
        pytest.skip(reason)
    with subprocess.Popen(["sleep", "1000"]) as owner:
        settings = {
            "TESTBED_DIR": str(tmp_path / "bed"),
            "TESTBED_NAME": f"o{os.getpid()}",
            "TESTBED_OWNER": str(owner.pid),
        }
        subprocess.run(["bash", SCRIPT, "up"], check=True, env=os.environ | settings, timeout=60)
        owner.kill()
    wait_for(lambda: not (tmp_path / "bed").exists(), PATIENCE, "the end of the cluster")
    assert not Path(f"/run/netns/o{os.getpid()}-node1").exists()


# ---------------------------------------------------------------------- without rights


def test_a_skip_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert lacking() == "a cluster of namespaces needs root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, path: None if name in ("pdsh", "munged") else name)
    assert "needs pdsh (" in lacking() and "the packages munge pdsh)" in lacking(slurm=True)
    monkeypatch.setattr(shutil, "which", lambda name, path: name)
    monkeypatch.setattr(testbed, "_TRIAL", "echo Operation not permitted >&2; false")
    assert "needs rights that this machine does not give: " in lacking()
