"""Whether the weights of a checkpoint are known to be good: a mark beside its files.

    RUN/checkpoint-<step>/soundness.json    {"soundness": "good", "why": …, "manifest": …}

A checkpoint is good once a loss of its very weights has been seen finite: that of the step or evaluation
after it. It is bad if that loss was not finite, or if the run has gone back behind it. Without a mark, as
when it has just been written, when the run was stopped or killed there, and in runs of before there were
marks, it is unproven. A mark that is damaged, or of other files (by the manifest's SHA-256), counts as none.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from distlora.checkpoints.stored import MANIFEST
from distlora.files.atomic import flush_directory, sha256_of, write_text

MARK = "soundness.json"

Soundness = Literal["good", "bad", "unproven"]


def soundness(directory: str | os.PathLike[str]) -> Soundness:
    """What is known of a checkpoint's weights. Reads two small files, and raises nothing."""
    found = _read(Path(directory))
    return found["soundness"] if found else "unproven"


def why_bad(directory: str | os.PathLike[str]) -> str:
    """The reason that was given for a bad one."""
    found = _read(Path(directory)) or {}
    why = found.get("why")
    return why if isinstance(why, str) else ""


def mark(directory: str | os.PathLike[str], verdict: Literal["good", "bad"], why: str) -> None:
    """Writes the mark of a complete checkpoint, in place of an earlier one. A crash leaves the old mark or
    the new one. Raises OSError."""
    directory = Path(directory)
    content = {"soundness": verdict, "why": why, "manifest": sha256_of(directory / MANIFEST)}
    write_text(directory / MARK, json.dumps(content, indent=1) + "\n")
    flush_directory(directory)


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / MARK).read_text(encoding="utf-8"))
        is_of_this = isinstance(found, dict) and found.get("manifest") == sha256_of(directory / MANIFEST)
    except (OSError, ValueError, RecursionError):
        return None
    return found if is_of_this and found.get("soundness") in ("good", "bad") else None
