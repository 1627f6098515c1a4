"""The ranks of the column ZeRO-3: `python -m tests.model_matrix.ranks FOLDER OUT NAME…`.

Rank 0 writes {name: losses of all steps, or what went wrong}.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from distlora.cluster.topology import topology_from_environment
from distlora.engine.comm import Comm
from tests.model_matrix.columns import YES, refusal
from tests.model_matrix.subjects import RANKS, Subject

REPOSITORY, PATIENCE = Path(__file__).resolve().parents[2], 600


def under_zero(folder: Path, names: list[str]) -> dict[str, list[float] | str]:
    """The losses of each model on two ranks under ZeRO-3, or a sentence. One start of the ranks for all."""
    out = folder / "zero.json"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.model_matrix.ranks", str(folder), str(out), *names]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ranks = []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "PATH": path,
        }  # fmt: skip
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        for process in ranks:
            process.wait(PATIENCE)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = json.loads(out.read_text()) if out.exists() else {}
    return {name: found.get(name, "no: the ranks ended before") for name in names}


def cell(found: list[float] | str, plain: list[float]) -> str:
    """What the table says of losses under ZeRO-3, beside those of one process."""
    if isinstance(found, str):
        return found
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, plain, strict=True))
    return YES if worst < 1e-4 else f"no: the losses differ by {worst:.1e}"


def main(folder: Path, out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    comm = Comm(topology_from_environment(), torch.device("cpu"), timeout_minutes=3)
    found: dict[str, list[float] | str] = {}
    for name in names:
        subject = Subject(name, folder, comm)
        try:
            found[name] = subject.train(subject.start())
        except Exception as error:  # both ranks do the same, so that what one raises the other does, too
            found[name] = refusal(error, folder).replace("refused", "no")
        if comm.is_main:
            out.write_text(json.dumps(found))
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
