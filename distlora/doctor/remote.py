"""Asks nodes: starts the same program on each, here or through ssh, all at once, with a time limit."""

import json
import os
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

from distlora.cluster.exported_variables import exported_names
from distlora.cluster.ssh import explain, python_there
from distlora.doctor.node import answers


@dataclass(frozen=True)
class Answer:
    """What a node has answered.

    problem: why the answer is incomplete; None if it is complete. asked, answered: `time.time()` here.
    """

    values: list[Any] = field(default_factory=list)
    problem: str | None = None
    asked: float = 0.0
    answered: float = 0.0


def command(host: str | None) -> list[str]:
    """The command line that starts the node's program. host: as it is given to ssh; None for this machine."""
    # The request goes to the program's input, where no process list shows it.
    program = ["-m", "distlora.doctor.node"]
    return [sys.executable, *program] if host is None else python_there(host, program)


def forwarded() -> dict[str, str]:
    """The variables that a launcher would send to other hosts."""
    return {name: os.environ[name] for name in exported_names(os.environ)}


class Running:
    """The processes that are running, so that an interrupt can end all of them.

    A process that is added after `end` is ended at once.
    """

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
    """Kills the process and its session, which no signal to this process has reached."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(host: str | None, request: Mapping[str, Any], limit: float, running: Running | None = None) -> Answer:
    """One node's answer, after `limit` seconds at the latest.

    host: as in `command`. running: contains the node's process while it runs.
    """
    asked = time.time()
    text = json.dumps(request | {"environment": forwarded() if host else {}})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(
            command(host), text=True, errors="replace", start_new_session=True, **pipes
        )
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
    """Sends each host its request, and returns the answers in the order of the hosts.

    All hosts are asked at once, because ranks wait for each other.
    """
    running = Running()
    pool = ThreadPoolExecutor(len(hosts))
    try:
        return list(pool.map(lambda pair: ask(*pair, limit, running), zip(hosts, requests)))
    except BaseException:  # an interrupt
        running.end()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
