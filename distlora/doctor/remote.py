"""Asking nodes: the same program on each, here or through ssh, all at once, with a limit for each."""

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
    """What a node said. problem: why it is not all, None if all is well. asked, answered: time.time() here."""

    values: list[Any] = field(default_factory=list)
    problem: str | None = None
    asked: float = 0.0
    answered: float = 0.0


def command(host: str | None) -> list[str]:
    """What starts the node's program. host: as ssh takes it, None for this machine."""
    # Everything that it must know travels on its input, where no process list shows it.
    program = ["-m", "distlora.doctor.node"]
    return [sys.executable, *program] if host is None else python_there(host, program)


def forwarded() -> dict[str, str]:
    """The variables that a launcher would take along."""
    return {name: os.environ[name] for name in exported_names(os.environ)}


class Running:
    """Processes that are under way, so that an interrupt can end them all, those included that are just being
    started.
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
    """With its session, since it has not heard of any signal that came here."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(host: str | None, request: Mapping[str, Any], limit: float, running: Running | None = None) -> Answer:
    """One node's answer, after `limit` seconds at the latest. running: holds the node's process while it
    runs.
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
