"""`launch/slurm.sbatch` on a SLURM cluster of two nodes: one loss curve, whatever comes between its beginning
and its end.
"""

import copy
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distlora.recipe.yaml_text import dump_yaml
from tests.e2e.bench import Bench
from tests.e2e.program import REPOSITORY
from tests.e2e.testbed import Cluster, wait_for

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
#: Seconds for what takes ten or twenty on a quiet machine.
LONG = 600
STEPS = 24
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
#: Two ranks on two nodes.
PAIR = ("--nodes=2", "--gpus-per-node=1")


class Job:
    """One job, from its submission on."""

    def __init__(
        self, cluster: Cluster, folder: Path, *options: str, words: tuple[str, ...], **variables: str
    ):
        """words: after the script's name; without any, the options say what runs."""
        self._cluster, self._folder = cluster, folder
        script = (SCRIPT, *words) if words else ()
        told = cluster.run(
            "head", "sbatch", "--parsable", f"--output={folder}/%j.out", *options, *script, **variables
        )
        assert told.code == 0, told.err
        self.number = told.out.strip()

    def task(self, index: int) -> "Job":
        """One of an array's."""
        task = copy.copy(self)
        task.number = f"{self.number}_{index}"
        return task

    def say(self, *words: str) -> str:
        return self._cluster.run("head", *words).out

    @property
    def facts(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.say("scontrol", "show", "job", self.number)))

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    def output(self) -> str:
        return (
            "\n".join(path.read_text() for path in sorted(self._folder.glob("*.out")))
            + self._cluster.logs()[-3000:]
        )

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Fails if the job ends before."""
        wait_for(lambda: condition() or self._has_ended(), LONG, f"job {self.number}: {what}", self.output)
        assert condition(), f"job {self.number} ended before {what}\n{self.output()}"

    def end(self) -> dict[str, str]:
        """What SLURM says about the job at its end."""
        wait_for(self._has_ended, LONG, f"the end of job {self.number}", self.output)
        return self.facts

    def _has_ended(self) -> bool:
        time.sleep(0.2)  # the machine has better things to do
        return self.state in ENDS

    def expect_end(self, state: str, *restarts: int) -> str:
        """Returns what the job wrote."""
        facts, said = self.end(), self.output()
        assert facts["JobState"] == state and int(facts["Restarts"]) in restarts, said
        return said


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("slurm")
    return Bench(
        folder, steps=STEPS, save_every=4, global_batch_size=16, micro_batch_size=16, hang_timeout=15
    )


def words_of(bench: Bench, name: str, *overrides: str) -> tuple[str, ...]:
    """The job's arguments for a run in the directory `name`. Its steps take long enough to be interrupted:
    eight micro-batches on each of two ranks."""
    return (*bench.arguments(name, "train.micro_batch_size=1"), *overrides)


def under_way(bench: Bench, name: str) -> bool:
    return any((bench.folder / name).glob("checkpoint-*"))


@pytest.fixture
def queue(slurm_cluster, tmp_path) -> Iterator[Callable[..., Job]]:
    """Submits a job; afterwards none is left, and both nodes are idle."""

    def submit(*options: str, words: tuple[str, ...], **variables: str) -> Job:
        return Job(slurm_cluster, tmp_path, *options, words=words, **variables)

    yield submit
    slurm_cluster.repair()
    slurm_cluster.run("head", "scancel", "--user=root")
    nodes = ("sinfo", "--noheader", "--partition=debug", "--format=%T %D")
    wait_for(
        lambda: slurm_cluster.run("head", *nodes).out == "idle 2\n", 60, "idle nodes", slurm_cluster.logs
    )


def interrupted(bench: Bench, queue, name: str, *options: str) -> Job:
    """A job on two nodes that has come to its first checkpoint."""
    job = queue(*options, words=words_of(bench, name))
    job.until(lambda: under_way(bench, name), "its first checkpoint")
    return job


# ---------------------------------------------------------------------- the short form


def test_two_nodes_are_one_run_that_goes_on_after_its_time(bench, queue):
    """The warning of the time limit, as SLURM gives it: USR1 to the batch script alone."""
    job = interrupted(bench, queue, "time", *PAIR)
    job.say("scancel", "--signal=USR1", "--batch", job.number)
    said = job.expect_end("COMPLETED", 1)
    bench.expect_same_curve("time")
    first, second = said.split("start 2: 2 ranks on node[1-2]")
    assert "the time limit is near" in first and f"job {job.number} is queued again" in first
    assert "0: 2 ranks on 2 hosts (node1: 0; node2: 1)" in first and "told by SLURM" in first
    stopped = int(re.search(r"continuing from \S+/checkpoint-(\d+)", second)[1])
    assert 4 <= stopped < STEPS, "what was done until then was not lost"


def test_a_mistake_is_not_queued_again(bench, queue):
    job = queue("--gpus-per-node=1", words=words_of(bench, "mistake", "train.lrr=$(touch evil)"))
    said = job.expect_end("FAILED", 0)
    assert job.facts["ExitCode"] == "2:0"
    assert "0: distlora: override train.lrr: unknown key, did you mean lr?" in said


def test_a_recipe_that_not_all_nodes_see(queue, slurm_cluster):
    """In a directory of one node's own, as /tmp is on a cluster."""
    assert slurm_cluster.run("node1", "touch", "/dev/shm/recipe.yaml").code == 0
    job = queue("--nodes=2", "--gpus-per-node=2", words=("/dev/shm/recipe.yaml",))
    said = job.expect_end("FAILED", 0)
    assert "slurm.sbatch: /dev/shm/recipe.yaml is not there on node2: put it where all nodes see it" in said


# ---------------------------------------------------------------------- the long form


@pytest.mark.cluster_long
def test_four_ranks_in_a_container(bench, queue, tmp_path):
    """A stand-in for apptainer, which runs what it is given."""
    (tmp_path / "bin").mkdir()
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.write_text(f"""#!/usr/bin/env bash
printf '%s ' "$@" >>{tmp_path}/apptainer
while [[ $1 != *.sif ]]; do shift; done
exec "${{@:2}}"
""")
    apptainer.chmod(0o755)
    path = f"{apptainer.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    image = ("--container", "image.sif", "--python", sys.executable, "--logs", str(tmp_path / "logs"))
    job = queue("--nodes=2", "--gpus-per-node=2", words=(*words_of(bench, "four"), *image), PATH=path)
    job.expect_end("COMPLETED", 0)
    bench.expect_same_curve("four")
    assert (tmp_path / "apptainer").read_text().count("exec --nv --bind") == 4
    said = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert sorted(said) == [f"{job.number}-{rank}.out" for rank in range(4)]
    assert "4 ranks on 2 hosts (node1: 0-1; node2: 2-3)" in said[f"{job.number}-0.out"]


@pytest.mark.cluster_long
def test_the_time_limit(bench, queue):
    """SLURM looks at its clocks twice a minute, so there are more steps."""
    many = "train.steps=200"
    bench.plain("plain-limit", many)
    job = queue(*PAIR, "--signal=B:USR1@60", words=words_of(bench, "limit", many))
    job.until(lambda: under_way(bench, "limit"), "its first checkpoint")
    hours, minutes, seconds = map(int, job.facts["RunTime"].split(":"))
    job.say("scontrol", "update", f"JobId={job.number}", f"TimeLimit={hours * 60 + minutes + 2}")
    job.until(lambda: job.facts["Restarts"] == "1", "its limit")
    job.say("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    assert "the time limit is near" in job.expect_end("COMPLETED", 1)
    bench.expect_same_curve("limit", quiet="plain-limit")


@pytest.mark.cluster_long
def test_preemption_by_another_partition(bench, queue):
    job = interrupted(bench, queue, "preempted", *PAIR)
    other = queue("--partition=hi", "--nodes=2", "--gpus-per-node=2", "--wrap=sleep 3", words=())
    job.until(lambda: job.facts["Restarts"] == "1", "being preempted")
    other.expect_end("COMPLETED", 0)
    assert "continuing from" in job.expect_end("COMPLETED", 1)
    bench.expect_same_curve("preempted")


@pytest.mark.cluster_long
def test_scontrol_requeue(bench, queue):
    job = interrupted(bench, queue, "requeued", *PAIR)
    job.say("scontrol", "requeue", job.number)
    assert "continuing from" in job.expect_end("COMPLETED", 1)
    bench.expect_same_curve("requeued")


@pytest.mark.cluster_long
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_fails(bench, queue, slurm_cluster, node):
    """Of the ranks' nodes, the first runs the batch script too. A minute later SLURM tells the node once more
    to end the job, which may have begun there anew: then it is interrupted a second time."""
    job = interrupted(bench, queue, f"without-{node}", *PAIR)
    slurm_cluster.crash(node)
    job.until(lambda: job.state != "RUNNING", f"the failure of {node} is noticed")
    slurm_cluster.boot(node)
    said = job.expect_end("COMPLETED", 1, 2)
    assert "continuing from" in said
    bench.expect_same_curve(f"without-{node}")


@pytest.mark.cluster_long
def test_a_rank_goes_silent(bench, queue, slurm_cluster):
    """It hangs, and SLURM sees nothing wrong:
    that another start may go on stands in the run's status only.
    """
    job = interrupted(bench, queue, "silent", *PAIR)
    os.kill(slurm_cluster.process("node2", "distlora train"), signal.SIGSTOP)
    said = job.expect_end("COMPLETED", 1)
    assert re.search(r"failed at step \d+ of 24: rank 1 on node2 went silent", said), said
    bench.expect_same_curve("silent")


@pytest.mark.cluster_long
def test_scancel_ends_it(bench, queue):
    job = interrupted(bench, queue, "cancelled", *PAIR)
    job.say("scancel", job.number)
    job.expect_end("CANCELLED", 0)
    assert job.say("squeue", "--noheader").strip() == ""


@pytest.mark.cluster_long
def test_an_array_of_two(bench, queue, tmp_path):
    """Each task on a node of its own; one of them is interrupted, and queued again alone."""
    sweep = tmp_path / "sweep.txt"
    runs = [bench.folder / "first $(touch evil)", bench.folder / "second"]
    sweep.write_text(f"# rates\n'output_dir={runs[0]}' train.lr=0.005\noutput_dir={runs[1]} train.lr=0.01\n")
    bench.plain("plain-second", "train.lr=0.01")
    job = queue("--array=0-1", "--gpus-per-node=2", words=(*words_of(bench, "unused"), "--sweep", str(sweep)))
    second = job.task(1)
    second.until(lambda: under_way(bench, "second"), "its first checkpoint")
    job.say("scancel", "--signal=USR1", "--batch", second.number)
    said = second.expect_end("COMPLETED", 1)
    assert f"job {job.number}_1, start 2: 2 ranks on" in said
    assert f"job {job.number}_0, start 2: 2 ranks on" not in job.task(0).expect_end("COMPLETED", 0)
    bench.expect_same_curve(runs[0].name)
    bench.expect_same_curve("second", quiet="plain-second")
    assert not (bench.folder / "unused").exists()


@pytest.mark.cluster_long
def test_a_sweep_as_an_array(bench, queue, tmp_path):
    """Each task conducts one point, on a node of its own; one of them is interrupted, and goes on."""
    sweep = tmp_path / "sweep.yaml"
    common = {"train.micro_batch_size": 1}  # its steps take long enough to be interrupted
    content = {"recipe": str(bench.recipe), "output": str(bench.folder / "sweep"), "common": common}
    sweep.write_text(dump_yaml(content | {"grid": {"train.lr": [0.005, 0.01]}}))
    first, second = "sweep/train.lr=0.005", "sweep/train.lr=0.01"
    bench.plain("plain-faster", "train.lr=0.01")
    job = queue("--array=0-1", "--gpus-per-node=1", words=("--verb", "sweep", str(sweep)))
    interrupted = job.task(1)
    interrupted.until(lambda: under_way(bench, second), "its first checkpoint")
    job.say("scancel", "--signal=USR1", "--batch", interrupted.number)
    said = interrupted.expect_end("COMPLETED", 1)
    assert "asked to stop (SIGUSR1): 1 point (train.lr=0.01) left of 1" in said
    job.task(0).expect_end("COMPLETED", 0)
    bench.expect_same_curve(first)
    bench.expect_same_curve(second, quiet="plain-faster")
    rows = json.loads((bench.folder / "sweep" / "sweep.json").read_text())["points"]
    assert [row["state"] for row in rows] == ["done", "done"]
