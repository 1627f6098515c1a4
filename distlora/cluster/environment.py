"""The environment of a run: versions, topology, variables. Every start adds its own to the run directory."""

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import distlora
from distlora.engine.comm import Comm, Topology
from distlora.files.atomic import write_text
from distlora.files.confidential import is_secret_name, redacted, shown_word
from distlora.files.json_files import read_json
from distlora.sentences import counted

ENVIRONMENT = "environment.json"

#: Packages whose version can change what a run does.
_PACKAGES = (
    "deepspeed", "transformers", "accelerate", "safetensors", "datasets", "numpy", "huggingface_hub",
    "bitsandbytes", "mpi4py",
)  # fmt: skip
#: Beginnings of the variables that launchers, transports and libraries read.
RELEVANT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CROSS_", "MASTER_", "OMPI_", "PMI", "SLURM_"),
    *("TORCH", "PYTORCH_", "DEEPSPEED_", "DS_", "DISTLORA_"),
    *("NCCL_", "GLOO_", "TP_", "UCX_", "MV2_", "FI_", "RDMAV_"),
    *("CUDA_", "HIP_", "ROCR_", "HF_", "TRANSFORMERS_", "TOKENIZERS_"),
    *("OMP_", "MKL_", "KMP_", "PYTHON", "MAX_JOBS"),
    *("LOCAL_SIZE", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
)  # fmt: skip
_EXACTLY = ("CC", "CXX")
#: The revision in a container whose build was not given one.
_UNKNOWN = "unknown"


def versions() -> dict[str, str | None]:
    """Versions of what should be equal on all nodes; None for what is not installed."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distlora": distlora.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda or torch.version.hip
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    found["driver"] = _first_word(Path("/sys/module/nvidia/version"))
    return found


def _first_word(path: Path) -> str | None:
    return path.read_text().split()[0] if path.exists() else None


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that can change what a run does. Those that hold a secret are left out."""
    chosen = {
        name: value for name, value in environment.items() if name.startswith(RELEVANT) or name in _EXACTLY
    }
    return {name: value for name, value in sorted(chosen.items()) if not is_secret_name(name)}


def git_revision(folder: Path) -> dict[str, Any] | None:
    """The revision of the git checkout around `folder`, and whether tracked files differ from it.

    None outside of a checkout.
    """
    revision = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return revision and {"revision": revision, "changed": None if changes is None else bool(changes)}


def source_revision() -> dict[str, Any] | None:
    """The revision of distlora's own code, as in `git_revision`.

    Outside of a checkout it is the variable DISTLORA_REVISION, which the build of a container sets; None
    without that too.
    """
    folder = Path(distlora.__file__).parent
    # A virtual environment within a checkout does not belong to it, so git must know the file.
    if _git(folder, "ls-files", Path(distlora.__file__).name):
        return git_revision(folder)
    built = os.environ.get("DISTLORA_REVISION", _UNKNOWN)
    return None if built == _UNKNOWN else {"revision": built, "changed": None}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git, or a file server that is too slow
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---------------------------------------------------------------------- topology


def resolve_topology(comm: Comm, topology: Topology) -> dict[str, Any]:
    """Ranks and hosts as they have met: "hosts" maps a name to its ranks. Collective; equal on every rank."""
    hosts: dict[str, list[int]] = {}
    for rank, host in enumerate(comm.gather(socket.gethostname())):
        hosts.setdefault(host, []).append(rank)
    return {
        "ranks": comm.world_size,
        "hosts": hosts,
        "master": comm.master,
        "backend": comm.backend if comm.master else None,
        "device": str(comm.device.type),
        "launcher": topology.launcher,
    }


def topology_line(found: Mapping[str, Any]) -> str:
    """One line: "4 ranks on 2 hosts (node1: 0, 1; node2: 2, 3), master node1:29500, gloo, …"."""
    hosts = "; ".join(f"{host}: {_spans(ranks)}" for host, ranks in found["hosts"].items())
    group = f"master {found['master']}, {found['backend']}" if found["master"] else "no process group"
    source = f"told by {found['launcher']}" if found["launcher"] else "started without a launcher"
    counts = f"{counted(found['ranks'], 'rank')} on {counted(len(found['hosts']), 'host')}"
    return f"{counts} ({hosts}), {group}, {source}"


def _spans(ranks: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


# ---------------------------------------------------------------------- the report


def record(
    run_dir: Path, topology: Mapping[str, Any], deepspeed: Mapping[str, Any] | None, resumed_at: int | None
) -> None:
    """Adds this start to `environment.json`, a JSON list with one object for every start of the run.

    Called on rank 0 only. deepspeed: the resolved config. resumed_at: the step of the checkpoint from which
    this start continues; None for a new run, and as long as nobody knows: see `note_resumed`.
    """
    path = run_dir / ENVIRONMENT
    write_text(path, json.dumps([*_earlier(path), report(topology, deepspeed, resumed_at)], indent=1) + "\n")


def note_resumed(run_dir: Path, step: int) -> None:
    """Writes to the entry of this start which checkpoint it has really gone on from: the newest may have been
    refused. Called on rank 0 only."""
    path = run_dir / ENVIRONMENT
    *others, own = _earlier(path) or [{}]
    if isinstance(own, dict):
        write_text(path, json.dumps([*others, own | {"resumed_at": step}], indent=1) + "\n")


def report(
    topology: Mapping[str, Any], deepspeed: Mapping[str, Any] | None, resumed_at: int | None
) -> dict[str, Any]:
    """The object for one start: when, with which command, where, with which versions. JSON types only, and no
    secret.
    """
    about = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "resumed_at": resumed_at,
        "command": [shown_word(word) for word in (sys.executable, *sys.argv)],
        "working_directory": os.getcwd(),
        "git": git_revision(Path.cwd()),
        "source": source_revision(),
        "versions": versions(),
        "platform": platform.platform(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "topology": dict(topology),
        "deepspeed": deepspeed,
        "variables": relevant_variables(os.environ),
    }
    return redacted(about)


def working_directory(run_dir: Path) -> Path:
    """Where the newest start of a run was made, from which the relative paths of its recipe begin; the
    current directory where that is not known.
    """
    starts = _earlier(run_dir / ENVIRONMENT)
    found = starts[-1].get("working_directory") if starts and isinstance(starts[-1], dict) else None
    return Path(found) if isinstance(found, str) and "\0" not in found else Path()


def _earlier(path: Path) -> list[Any]:
    """What earlier starts wrote. A damaged file does not stop a run: it is replaced."""
    try:
        found = read_json(path)
    except (FileNotFoundError, ValueError):
        return []
    return found if isinstance(found, list) else []
