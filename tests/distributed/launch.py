"""Starting groups of ranks for a list of cases, and reading what came of each."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds after which the ranks of one world are given up. A broken collective only ends so.
PATIENCE = float(os.environ.get("DISTLORA_TEST_PATIENCE", 1500))
#: What is read while modules are imported.
IMPORTED_WITH = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
#: Ranks are forked from a process that has imported everything once, down to what DeepSpeed asks for when an
#: engine starts: imports cost eight seconds each.
PRELOADED = ["tests.distributed.worker", __name__, "functorch.compile", "torch.utils.cpp_extension"]
FORKS = multiprocessing.get_context("forkserver")


def launch(world_size: int, model: Path, out: Path, cases: list[dict], patience: float = PATIENCE) -> None:
    """Runs the cases on `world_size` ranks; results lie in `out` afterwards, whatever failed: behind a case
    that fails, new ranks go on with the next."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    while cases:
        in_time = _run(world_size, model, out, cases, deadline - time.monotonic())
        left = _from_first_failure(out, cases)
        if not in_time:
            at = left[0]["key"] if left else "the end"
            (out / "timeout").write_text(f"the ranks were still running after {patience:.0f} s, at {at}")
            return
        cases = left[1:]
        for case in cases:  # from ranks that were already there when another failed
            for file in (*_errors(out, case["key"]), out / f"{case['key']}.safetensors"):
                file.unlink(missing_ok=True)


def _from_first_failure(out: Path, cases: list[dict]) -> list[dict]:
    """The cases from the first on that failed on a rank or has no result."""
    good = (not _errors(out, case["key"]) and (out / f"{case['key']}.safetensors").exists() for case in cases)
    return cases[next((number for number, well in enumerate(good) if not well), len(cases)) :]


def _errors(out: Path, key: str) -> list[Path]:
    return sorted(file for file in out.glob("*.error") if file.name.startswith(f"{key}.rank"))


def _run(world_size: int, model: Path, out: Path, cases: list[dict], seconds: float) -> bool:
    """One start of the ranks; whether they ended in time."""
    plan = out / "plan.json"
    plan.write_text(json.dumps({"model": str(model), "out": str(out), "cases": cases}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    _prepare()
    ranks = [_rank(rank, world_size, port, plan, out) for rank in range(world_size)]
    deadline = time.monotonic() + seconds
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return all(process.exitcode is not None for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _prepare() -> None:
    """Starts the process that ranks are forked from, unless it is there."""
    FORKS.set_forkserver_preload(PRELOADED)
    with contextlib.chdir(REPOSITORY), mock.patch.dict(os.environ, IMPORTED_WITH):
        forkserver.ensure_running()


def _rank(
    rank: int, world_size: int, port: int, plan: Path, out: Path
) -> multiprocessing.process.BaseProcess:
    environment = IMPORTED_WITH | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    process = FORKS.Process(target=_begin, args=(environment, plan, out / f"rank{rank}.log"))
    process.start()
    return process


def _begin(environment: dict[str, str], plan: Path, log: Path) -> None:
    """What a forked process does: it becomes the rank that the environment says."""
    os.environ.update(environment)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from tests.distributed.worker import main  # there already; tests that only read results need no DeepSpeed

    sys.exit(main(plan))


def results_of(out: Path, key: str) -> dict[str, Tensor]:
    """What a case answered; fails the test with the ranks' own words if one of them failed,
    or none answered.
    """
    path = out / f"{key}.safetensors"
    said = [file.read_text() for file in _errors(out, key)]
    if not said and path.exists():
        return load_file(path)
    said += [file.read_text() for file in out.glob("timeout")]
    logs = [f"{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(out.glob("rank*.log"))]
    pytest.fail(f"case {key} has no result\n" + "\n".join(said or logs), pytrace=False)
