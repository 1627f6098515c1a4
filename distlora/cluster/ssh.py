"""Starts this Python on another host through ssh, and explains why it failed."""

import os
import shlex
import sys
from collections.abc import Sequence

#: Seconds to connect, and seconds after which a connected host that is silent counts as lost.
CONNECT, SILENCE = 8, 15
#: With these options ssh asks no question, and notices a dead host.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": CONNECT,
    "ServerAliveInterval": SILENCE // 3,
    "ServerAliveCountMax": 3,
}
#: The variables that Python needs when it starts.
_FIRST = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")


def option_words() -> list[str]:
    return [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]


def python_there(host: str, words: Sequence[str]) -> list[str]:
    """The command line that runs `python WORDS…` on a host, with this Python, in this directory.

    host: as it is given to ssh.
    """
    variables = [f"{name}={os.environ[name]}" for name in _FIRST if os.environ.get(name)]
    there = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*variables, sys.executable, *words])}"
    return ["ssh", *option_words(), host, there]


def explain(code: int, said: str) -> str:
    """Why a command failed. code: ssh's exit code. said: its output."""
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
