"""Disks, shared directories, shared memory and the hub, as one node sees them."""

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from distlora.files.user_paths import expanded

#: Seconds to wait for the hub.
PATIENCE = 6.0
#: The beginning of the names of marks: files by which nodes see whether they share a directory.
MARK = ".distlora-doctor"
#: The size in bytes up to which a file is compared by its content.
_SMALL = 1 << 20


def existing(path: str | Path) -> Path:
    """The directory, or the nearest one above it that exists. A run creates the rest."""
    place = expanded(path).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def leave_mark(run_dir: str | None, mark: str | None) -> dict[str, Any]:
    """Writes a file into the run directory, which the other nodes should see.

    Returns the path of the directory on this node, and the problem or None.
    """
    if not run_dir or not mark:
        return {}
    place = existing(run_dir)
    try:
        with (place / f"{MARK}-{mark}").open("x") as file:
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return {"path": str(place), "problem": error.strerror or str(error)}
    return {"path": str(place), "problem": None}


def marks(run_dir: str, token: str) -> list[str]:
    """The marks of this examination that this node sees. Raises OSError if it cannot read the directory."""
    prefix = f"{MARK}-{token}"
    return sorted(
        entry.name.removeprefix(f"{MARK}-")
        for entry in os.scandir(existing(run_dir))
        if entry.name.startswith(prefix)
    )


def remove_marks(run_dir: str, token: str) -> None:
    """Removes all marks that this node sees. On a shared disk the first node removes those of all nodes."""
    with suppress(OSError):
        for mark in marks(run_dir, token):
            (existing(run_dir) / f"{MARK}-{mark}").unlink(missing_ok=True)


def path_facts(paths: dict[str, str]) -> dict[str, Any]:
    """Label -> path, whether it exists, and the checksum if it is a small file."""
    found = {}
    for label, name in paths.items():
        path = expanded(name)
        small = path.is_file() and path.stat().st_size <= _SMALL
        found[label] = {
            "path": name,
            "exists": path.exists(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if small else None,
        }
    return found


def disk_facts(run_dir: str | None) -> dict[str, Any]:
    """Label -> path, free and total bytes, for the places where a run writes; each file system only once."""
    places = {
        "run directory": run_dir,
        "Hugging Face cache": _cache(),
        "temporary files": tempfile.gettempdir(),
    }
    found, seen = {}, set()
    for label, name in places.items():
        if name is None or os.stat(existing(name)).st_dev in seen:
            continue
        seen.add(os.stat(existing(name)).st_dev)
        usage = shutil.disk_usage(existing(name))
        found[label] = {"path": str(existing(name)), "free": usage.free, "total": usage.total}
    return found


def _cache() -> str:
    from distlora.models.hub import cache_directory

    return cache_directory()


def shm_facts() -> dict[str, Any]:
    """Bytes of shared memory, which NCCL, gloo and data loaders use to communicate within a node."""
    usage = shutil.disk_usage("/dev/shm")
    return {"free": usage.free, "total": usage.total}


def hub_facts(model: str | None, needed: bool) -> dict[str, Any]:
    """Whether the hub can be used. It is asked only if it is needed and the model is not cached.

    model: a repository on the hub, or None.
    """
    from distlora.models import hub

    cached = model is not None and hub.is_cached(model)
    return {
        "model": model,
        "cache": hub.cache_directory(),
        "cached": cached,
        "needed": needed,
        "problem": None if cached or not needed else hub.problem_with_access(PATIENCE),
    }
