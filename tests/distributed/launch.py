"""Starting a group of ranks for a list of cases, and reading what came of each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds after which the ranks of one world are given up. A broken collective only ends so.
PATIENCE = float(os.environ.get("DISTLORA_TEST_PATIENCE", 1500))


def launch(world_size: int, model: Path, out: Path, cases: list[dict], timeout: float = PATIENCE) -> None:
    """Runs the cases on `world_size` ranks; results lie in `out` afterwards, whatever failed."""
    out.mkdir(parents=True, exist_ok=True)
    plan = out / "plan.json"
    plan.write_text(json.dumps({"model": str(model), "out": str(out), "cases": cases}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [_rank(rank, world_size, port, plan, out) for rank in range(world_size)]
    try:
        for process in ranks:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        (out / "timeout").write_text(f"the ranks were still running after {timeout} s")
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _rank(rank: int, world_size: int, port: int, plan: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    log = (out / f"rank{rank}.log").open("w")
    command = [sys.executable, "-m", "tests.distributed.worker", str(plan)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)


def results_of(out: Path, key: str) -> dict[str, Tensor]:
    """What a case answered; fails the test with the ranks' own words if it did not."""
    path = out / f"{key}.safetensors"
    if not path.exists():
        said = [file.read_text() for file in [*sorted(out.glob("*.error")), *out.glob("timeout")]]
        logs = [f"{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(out.glob("rank*.log"))]
        pytest.fail(f"case {key} has no result\n" + "\n".join(said or logs), pytrace=False)
    return load_file(path)
