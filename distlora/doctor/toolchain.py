"""The compiler, the cache of compiled extensions with its locks, and the build of DeepSpeed's operators, on
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

from distlora.sentences import first_line


def compiler_facts() -> dict[str, Any]:
    """The compiler and what it needs.

    ninjas: path -> version of every ninja on PATH. The first one is used. Two versions are bad: each builds
    anew what the other has built. header: whether Python.h exists.
    """
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name) or (shutil.which("g++") if "CXX" not in os.environ else None)
    return {
        "asked": name,
        "compiler": compiler,
        "version": _version(compiler) if compiler else None,
        "ninjas": {path: _version(path) for path in _all_on_path("ninja")},
        "header": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    }


def _version(program: str) -> str | None:
    """The first line of `PROGRAM --version`; None if it says nothing."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return first_line(done.stdout) if done.stdout.strip() else None


def _all_on_path(name: str) -> list[str]:
    folders = dict.fromkeys(os.environ.get("PATH", "").split(os.pathsep))
    found = [
        os.path.join(folder, name) for folder in folders if os.access(os.path.join(folder, name), os.X_OK)
    ]
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


# ---------------------------------------------------------------------- the cache of extensions


def extensions_root() -> Path:
    """The directory of torch's compiled extensions, which is not created here."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def locks() -> list[dict[str, Any]]:
    """The locks in the cache, with "path", "age" in seconds, and "holder": the id of the process on this node
    that holds the lock, or None.

    torch waits silently and for ever until such a file disappears.
    """
    root = extensions_root()
    found = []
    for path in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:  # it has disappeared since
            continue
        found.append({"path": str(path), "age": age, "holder": _holder(path)})
    return found


def _holder(lock: Path) -> int | None:
    """The process that builds under this lock: it has the lock open, or works in the lock's directory."""
    wanted = {os.path.realpath(lock), os.path.realpath(lock.parent)}
    for process in Path("/proc").glob("[0-9]*"):
        for link in [process / "cwd", *_open_files(process)]:
            try:
                if os.readlink(link) in wanted:
                    return int(process.name)
            except OSError:  # closed since, or another user's
                continue
    return None


def _open_files(process: Path) -> list[Path]:
    try:
        return list((process / "fd").iterdir())
    except OSError:
        return []


# ---------------------------------------------------------------------- the operators


class Build:
    """A build of DeepSpeed's operators in a process of its own, into the cache where a run looks for them.

    locks: the locks that existed before. why: the reason why nothing is built.
    """

    def __init__(
        self, process: subprocess.Popen | None, log: str, locks: list[dict[str, Any]], why: str = ""
    ):
        self.locks, self._process, self._log, self._why = locks, process, log, why
        self._began = time.monotonic()

    def wait(self, limit: float) -> dict[str, Any]:
        """The outcome, whose "state" is "built", "failed", "skipped" or "running".

        A build that takes longer than `limit` seconds continues: if it were killed, it would leave its lock,
        and all later runs would wait for that.
        """
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
    """Starts to build these operators. Starts nothing if a lock exists, for which the build would wait.

    names: of DeepSpeed's builders.
    """
    found = locks()
    if not names or found:
        return Build(None, "", found, "a lock is in the way" if names else "none is needed")
    handle, log = tempfile.mkstemp(prefix="distlora-doctor-", suffix=".log")
    with os.fdopen(handle, "wb") as output:
        command = [sys.executable, "-m", "distlora.engine.zero.operators", *names]
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **streams)
    return Build(process, log, found)
