"""The compiler, the cache of compiled extensions with its locks, and the build of DeepSpeed's operators on
one node.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def compiler_facts() -> dict[str, Any]:
    """ninjas: every ninja on PATH, first the one that is used; two versions build everything anew in turns."""
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name) or (shutil.which("g++") if "CXX" not in os.environ else None)
    return {
        "asked": name,
        "compiler": compiler,
        "version": _first_line([compiler, "--version"]) if compiler else None,
        "ninjas": {path: _first_line([path, "--version"]) for path in _all_on_path("ninja")},
        "header": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    }


def _first_line(command: list[str]) -> str | None:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def _all_on_path(name: str) -> list[str]:
    folders = dict.fromkeys(os.environ.get("PATH", "").split(os.pathsep))
    found = [
        os.path.join(folder, name) for folder in folders if os.access(os.path.join(folder, name), os.X_OK)
    ]
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


# ---------------------------------------------------------------------- the cache of extensions


def extensions_root() -> Path:
    """Where torch puts compiled extensions, without making the directory."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def locks() -> list[dict[str, Any]]:
    """Locks in the cache: path, age in seconds, and the process on this node that holds it, None for nobody.

    torch waits for such a file to go away, without a word and without end.
    """
    root = extensions_root()
    found = []
    for path in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:  # gone meanwhile
            continue
        found.append({"path": str(path), "age": age, "holder": _holder(path)})
    return found


def _holder(lock: Path) -> int | None:
    """A living build has the lock open, and its compilers work in the directory."""
    wanted = {os.path.realpath(lock), os.path.realpath(lock.parent)}
    for process in Path("/proc").glob("[0-9]*"):
        for link in [process / "cwd", *_open_files(process)]:
            try:
                if os.readlink(link) in wanted:
                    return int(process.name)
            except OSError:  # closed meanwhile, or another user's
                continue
    return None


def _open_files(process: Path) -> list[Path]:
    try:
        return list((process / "fd").iterdir())
    except OSError:
        return []


# ---------------------------------------------------------------------- the operators


class Build:
    """DeepSpeed's operators, built where a run would look for them, by a process of its own."""

    def __init__(
        self, process: subprocess.Popen | None, log: str, locks: list[dict[str, Any]], why: str = ""
    ):
        self.locks, self._process, self._log, self._why, self._began = (
            locks,
            process,
            log,
            why,
            time.monotonic(),
        )

    def wait(self, limit: float) -> dict[str, Any]:
        """state: "built", "failed", "skipped" or "running". What is not ready in `limit` seconds goes on:
        killed while it compiles, it would leave the lock on which all later runs wait."""
        if self._process is None:
            return {"state": "skipped", "why": self._why}
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"state": "running", "pid": self._process.pid, "log": self._log}
        said = Path(self._log).read_text(errors="replace").strip().splitlines()
        Path(self._log).unlink()
        seconds = time.monotonic() - self._began
        return {
            "state": "failed" if code else "built",
            "seconds": seconds,
            "said": said[-1] if said else f"exit code {code}",
        }


def start_build(names: Sequence[str]) -> Build:
    """names: of DeepSpeed's builders. Nothing is started where a lock would let the build wait for ever."""
    there = locks()
    if not names or there:
        return Build(None, "", there, "a lock is in the way" if names else "none is needed")
    handle, log = tempfile.mkstemp(prefix="distlora-doctor-", suffix=".log")
    with os.fdopen(handle, "wb") as output:
        command = [sys.executable, "-m", "distlora.engine.zero.operators", *names]
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **streams)
    return Build(process, log, there)
