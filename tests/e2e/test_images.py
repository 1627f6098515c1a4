"""The container images, built and run for real: two containers train as two nodes. Takes a quarter of an
hour, and a network.
"""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.images import Engine, lacking
from tests.e2e.program import PATIENCE, REPOSITORY, curve, recipe_of, write_recipe, write_rows
from tests.tiny_models import tiny_model_dir

pytestmark = [pytest.mark.cluster_long, pytest.mark.skipif(bool(lacking()), reason=lacking())]

LAUNCH = ["bash", "launch/deepspeed.sh", "hosts"]
INSPECT = """
import importlib.metadata as metadata, json
print(json.dumps({found.metadata["Name"]: found.version for found in metadata.distributions()}))
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Path(tempfile.mkdtemp(prefix="distlora-images-")))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def cpu_image(engine) -> str:
    engine.build("Dockerfile.cpu", "localhost/distlora:cpu")
    return "localhost/distlora:cpu"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny model, its data and a recipe, by the paths that they have in a container."""
    folder = tmp_path_factory.mktemp("work")
    content = recipe_of(tiny_model_dir("llama", folder), write_rows(folder / "data"), Path("runs/two"))
    content["method"]["init"]["eta"] = 0.01  # its search is a hundred gathers of the model
    inside = {
        "model": {**content["model"], "path": "runs/work/llama"},
        "data": {**content["data"], "path": "runs/work/data"},
    }
    write_recipe(folder / "recipe.yaml", content | inside | {"deepspeed": "configs/zero/zero3.json"})
    for path in (folder, *folder.rglob("*")):  # the container's user is another one
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def nodes(engine, cpu_image, work) -> Iterator[Engine]:
    """compose.yaml, up, with `work` in the run directory."""
    if shutil.which("podman-compose") is None:
        pytest.skip("there is no podman-compose (pip install podman-compose)")
    up = engine.compose("up", "--detach", "--no-build", "node1", "node2")
    assert up.code == 0, up.err
    engine.podman("cp", f"{work}/.", f"{container('node1')}:/workspace/runs/work")
    yield engine
    engine.compose("down", "--volumes", "--timeout", "5")


def container(node: str) -> str:
    return f"distlora_{node}_1"


def wait_for_a_step(engine: Engine, name: str, run_dir: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while engine.call("podman", "exec", name, "test", "-s", f"{run_dir}/metrics.jsonl").code != 0:
        assert state(engine, name) == "running", engine.call("podman", "logs", name).err[-2000:]
        assert time.monotonic() < deadline, f"no step within {PATIENCE} s"
        time.sleep(0.5)


def state(engine: Engine, name: str, what: str = "Status") -> str:
    return engine.podman("inspect", "--format", f"{{{{.State.{what}}}}}", name).strip()


# ---------------------------------------------------------------------- one container


@pytest.mark.parametrize(
    ("dockerfile", "tag"),
    [("Dockerfile.cpu", "localhost/distlora:cpu"), ("Dockerfile", "localhost/distlora:cuda")],
)
def test_an_image_holds_the_tested_versions_and_no_keys(engine, dockerfile, tag):
    engine.build(dockerfile, tag)
    pinned = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    )
    found = json.loads(engine.podman("run", "--rm", tag, "python", "-c", INSPECT))
    normal = {
        re.sub("[-_.]+", "-", name).lower(): version.partition("+")[0] for name, version in found.items()
    }
    wanted = {re.sub("[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    assert {"torch", "deepspeed", "mpi4py", "bitsandbytes", "distlora"} <= set(normal)
    assert {name: normal[name] for name in wanted if name in normal and normal[name] != wanted[name]} == {}

    look = (
        "id -u; ls /etc/ssh/ssh_host_* /keys/* 2>/dev/null; "
        "touch /workspace/configs/x 2>/dev/null || echo read-only; sshd -V 2>&1"
    )
    said = engine.podman(
        "run",
        "--rm",
        tag,
        "bash",
        "-c",
        look.replace("sshd -V", "/usr/sbin/sshd -V") + " | grep -o OpenSSH; pdsh -V",
    )
    assert said.splitlines()[:3] == ["1000", "read-only", "OpenSSH"] and "pdsh-" in said
    assert "Low-rank" in engine.podman("run", "--rm", tag)


def test_a_signal_to_the_container_reaches_the_program(engine, cpu_image, work):
    overrides = ["deepspeed=null", "train.steps=100000", "train.eval_every=0", "output_dir=/tmp/long"]
    mount = f"--volume={work}:/workspace/runs/work:ro"
    command = ["distlora", "train", "runs/work/recipe.yaml", *overrides]
    engine.podman("run", "--detach", "--name", "signalled", mount, cpu_image, *command)
    wait_for_a_step(engine, "signalled", "/tmp/long")
    began = time.monotonic()
    engine.podman("stop", "--time", "60", "signalled")
    assert time.monotonic() - began < 30, "it did not have to be killed"
    assert state(engine, "signalled", "ExitCode") == "75"
    engine.podman("cp", "signalled:/tmp/long/status.json", engine.folder / "status.json")
    assert json.loads((engine.folder / "status.json").read_text())["state"] == "preempted"
    engine.podman("rm", "signalled")


# ---------------------------------------------------------------------- two nodes


def train_on_both(nodes: Engine, *overrides: str):
    command = [*LAUNCH, "runs/work/recipe.yaml", *overrides]
    return nodes.call("podman", "exec", container("node1"), *command, seconds=PATIENCE)


def test_two_nodes_train_as_one(nodes, tmp_path):
    done = train_on_both(nodes)
    assert done.code == 0, done.err[-3000:] + done.out[-2000:]
    assert "2 ranks on 2 hosts" in done.out + done.err
    one = [
        "python",
        "-m",
        "distlora",
        "train",
        "runs/work/recipe.yaml",
        "deepspeed=null",
        "output_dir=runs/one",
    ]
    nodes.podman("exec", container("node2"), *one)
    nodes.podman("cp", f"{container('node2')}:/workspace/runs/.", tmp_path)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-4)


def test_health_follows_what_a_launcher_would_meet(nodes):
    def health() -> int:
        return nodes.call("podman", "healthcheck", "run", container("node2"), seconds=60).code

    def on_node(*command: str) -> None:
        nodes.podman("exec", *command)

    assert health() == 0
    on_node(container("node2"), "pkill", "-STOP", "-o", "-x", "sshd")
    assert health() == 1
    on_node(container("node2"), "pkill", "-CONT", "-x", "sshd")
    assert health() == 0
    on_node("--user=0", container("node2"), "chmod", "500", "/workspace/runs")
    assert health() == 1
    on_node("--user=0", container("node2"), "chmod", "755", "/workspace/runs")
    assert health() == 0


def test_a_node_that_is_stopped_lets_its_ranks_save(nodes, tmp_path):
    name, run = container("node2"), "/workspace/runs/stopped"
    command = [
        *LAUNCH,
        "runs/work/recipe.yaml",
        "train.steps=100000",
        "train.eval_every=0",
        "output_dir=runs/stopped",
    ]
    nodes.podman("exec", "--detach", container("node1"), *command)
    wait_for_a_step(nodes, name, run)
    nodes.podman("stop", "--time", "100", name)
    assert state(nodes, name, "ExitCode") == "0", "it was not killed"
    deadline = time.monotonic() + 90
    while (
        nodes.call("podman", "exec", container("node1"), "pgrep", "-f", "--", "-m distlora.cli.as_rank").code
        == 0
    ):
        assert time.monotonic() < deadline, "the rank of node1 has not followed"
        time.sleep(1)
    nodes.podman("cp", f"{container('node1')}:{run}/status.json", tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
