"""Starting this very Python on another host through ssh, and what it means when that fails."""

import os
import shlex
import sys
from collections.abc import Sequence

#: Seconds for a connection, and for a connected host that has fallen silent.
CONNECT, SILENCE = 8, 15
#: No question is asked, and a dead host is noticed.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": CONNECT,
    "ServerAliveInterval": SILENCE // 3,
    "ServerAliveCountMax": 3,
}
#: What Python must know before it starts there.
_FIRST = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")


def option_words() -> list[str]:
    return [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]


def python_there(host: str, words: Sequence[str]) -> list[str]:
    """The command line of `python WORDS…` on a host, with this Python, in this directory. host: as ssh takes
    it.
    """
    variables = [f"{name}={os.environ[name]}" for name in _FIRST if os.environ.get(name)]
    there = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*variables, sys.executable, *words])}"
    return ["ssh", *option_words(), host, there]


def explain(code: int, said: str) -> str:
    """Why it did not work, from ssh's exit code and what was said."""
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
