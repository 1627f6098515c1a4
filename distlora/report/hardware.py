"""What a run ran on, and how it was started, as its environment.json tells it."""

import shlex
from pathlib import Path, PurePath
from typing import Any

from distlora.files.confidential import shown_word
from distlora.report.runs import RunRecord
from distlora.sentences import counted

#: Words that start the program itself, as they stand in a command after the interpreter.
_PROGRAM = ("distlora", "__main__.py")


def hardware_of(run: RunRecord) -> str:
    """Such as "8 × NVIDIA H100" and "2 ranks on a CPU"; "-" where it is unknown."""
    start = _newest(run)
    topology = dict(_items(start.get("topology")))
    ranks, device = topology.get("ranks"), topology.get("device")
    if not isinstance(ranks, int):
        return "-"
    hosts = topology.get("hosts")
    where = f" on {len(hosts)} hosts" if isinstance(hosts, dict) and len(hosts) > 1 else ""
    if device == "cpu":
        return f"CPU, {counted(ranks, 'rank')}{where}"
    return f"{ranks} × {start.get('accelerator') or device}{where}"


def command_of(run: RunRecord) -> str:
    """The command that began the run, on each of its ranks, without the paths of this machine's programs."""
    words = run.starts[0].get("command") if run.starts else None
    if not isinstance(words, list) or len(words) < 2:
        return ""
    # Those of older versions may hold what this one hides.
    _, program, *arguments = map(shown_word, map(str, words))
    # DeepSpeed's launcher gives every rank a number of its own.
    arguments = [word for word in arguments if not word.startswith(("--local_rank=", "--local-rank="))]
    name = PurePath(program).name
    started = ["distlora"] if name in _PROGRAM else ["python", name]
    topology = dict(_items(run.starts[0].get("topology")))
    ranks, launcher = topology.get("ranks"), topology.get("launcher")
    remark = f"    # on {ranks} ranks{f', {launcher}' if launcher else ''}" if ranks != 1 and ranks else ""
    return shlex.join([*started, *arguments]) + remark


def versions_of(run: RunRecord) -> dict[str, str]:
    """Versions of the newest start, of what was installed."""
    versions = _newest(run).get("versions")
    return {str(name): str(version) for name, version in _items(versions) if version}


def revision_of(run: RunRecord) -> str:
    """The revision of distlora's own code, with a plus sign where files differed from it."""
    source = dict(_items(_newest(run).get("source")))
    revision = source.get("revision")
    return f"{str(revision)[:12]}{'+' if source.get('changed') else ''}" if revision else "-"


def began(run: RunRecord) -> str:
    """The day on which the run began."""
    return str(run.starts[0].get("started", ""))[:10] or "-" if run.starts else "-"


def shown(path: Path) -> str:
    """A path as the reader of the page can use it: not one of this machine alone."""
    return path.name if path.is_absolute() else str(path)


def _newest(run: RunRecord) -> dict[str, Any]:
    return run.starts[-1] if run.starts else {}


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []
