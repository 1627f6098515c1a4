"""Ranks that are started in a second: forked from a process that has imported everything.

What runs in them is the program itself, from its arguments on.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.program import free_port

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.torture.preload"])


def warm_up() -> None:
    """Imports what is preloaded, so that the first start takes no longer than the others."""
    process = _FORKS.Process(target=int, daemon=True)
    process.start()
    process.join()


class Start:
    """One start of a run: all its ranks."""

    def __init__(self, arguments: Sequence[str], world: int, log: Path):
        self.log, port = log, free_port()
        self._ranks = [
            _FORKS.Process(target=_rank, args=(list(arguments), rank, world, port, log), daemon=True)
            for rank in range(world)
        ]
        for process in self._ranks:
            process.start()

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all that still run."""
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks end within so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return not self.runs

    @property
    def runs(self) -> bool:
        return any(process.is_alive() for process in self._ranks)

    def others_run(self, rank: int) -> bool:
        return any(process.is_alive() for process in self._ranks if process is not self._ranks[rank])

    @property
    def codes(self) -> list[int]:
        """Exit codes; the negative number of the signal that has ended a rank."""
        return [process.exitcode for process in self._ranks]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30)


def _rank(arguments: list[str], rank: int, world: int, port: str, log: Path) -> None:
    """What torchrun sets, and the program."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
    from distlora.cli.main import main

    raise SystemExit(main(arguments))
