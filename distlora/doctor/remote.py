"""Asking nodes: the same program on each, here or through ssh, all at once, with a limit for each."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from distlora.doctor.node import answers
from distlora.environment import relevant_variables

#: Seconds for a connection, and for a connected node that has fallen silent.
CONNECT, SILENCE = 8, 15
#: What Python must know before it starts there. Everything else travels on its input, where no process list shows it.
_FIRST = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")
#: A rank's place is not the driver's.
_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_", "CROSS_", "MASTER_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Answer:
    """What a node said. problem: why it is not all, None if all is well. asked, answered: time.time() here."""

    values: list[Any] = field(default_factory=list)
    problem: str | None = None
    asked: float = 0.0
    answered: float = 0.0


def command(host: str | None) -> list[str]:
    """What starts the node's program. host: as ssh takes it, None for this machine."""
    program = [sys.executable, "-m", "distlora.doctor.node"]
    if host is None:
        return program
    variables = [f"{name}={os.environ[name]}" for name in _FIRST if os.environ.get(name)]
    there = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*variables, *program])}"
    options = {"BatchMode": "yes", "ConnectTimeout": CONNECT, "ServerAliveInterval": SILENCE // 3, "ServerAliveCountMax": 3}
    return ["ssh", *(word for name, value in options.items() for word in ("-o", f"{name}={value}")), host, there]


def forwarded() -> dict[str, str]:
    """The variables that a launcher would take along."""
    return {name: value for name, value in relevant_variables(os.environ).items() if not name.startswith(_PLACES)}


class Running:
    """Processes that are under way, so that an interrupt can end them all, those included that are just being started."""

    def __init__(self):
        self._processes: set[subprocess.Popen] = set()
        self._lock, self._ended = threading.Lock(), False

    def add(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._processes.add(process)
            if self._ended:
                _kill(process)

    def discard(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._processes.discard(process)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for process in self._processes:
                _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """With its session, since it has not heard of any signal that came here."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(host: str | None, request: Mapping[str, Any], limit: float, running: Running | None = None) -> Answer:
    """One node's answer, after `limit` seconds at the latest. running: holds the node's process while it runs."""
    asked = time.time()
    text = json.dumps(request | {"environment": forwarded() if host else {}})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(command(host), text=True, errors="replace", start_new_session=True, **pipes)
    except OSError as error:
        return Answer(problem=f"{error.filename}: {error.strerror}")
    running = running or Running()
    running.add(process)
    late = False
    try:
        out, err = process.communicate(text, timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        _kill(process)
        out, err = process.communicate()
    running.discard(process)
    values = answers(out)
    problem = None
    if late:
        problem = f"no answer within {limit:.0f} s"
    elif process.returncode or not values:
        problem = explain(process.returncode, err)
    return Answer(values, problem, asked, time.time())


def ask_all(hosts: Sequence[str | None], requests: Sequence[Mapping[str, Any]], limit: float) -> list[Answer]:
    """One request for each host, all at once, since ranks wait for each other; answers in the hosts' order."""
    running = Running()
    pool = ThreadPoolExecutor(len(hosts))
    try:
        return list(pool.map(lambda pair: ask(*pair, limit, running), zip(hosts, requests)))
    except BaseException:  # an interrupt
        running.end()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def explain(code: int, said: str) -> str:
    """Why a node's program did not answer, from ssh's exit code and what was said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code}"
    if "No module named" in said and "distlora" in last:
        return f"{sys.executable} has no distlora there"
    if code in (126, 127):
        return f"there is no Python at {sys.executable} there ({last})"
    if code == 255:
        return f"cannot be reached through ssh ({last})"
    if "cd:" in last or "No such file or directory" in last:
        return f"the working directory is not there ({last})"
    return last
