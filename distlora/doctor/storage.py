"""Disks, shared directories, shared memory and the way to the model, as one node sees them."""

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Seconds that the hub is asked.
PATIENCE = 6.0
MARK = ".distlora-doctor"
#: Bytes up to which a file is compared by its content.
_SMALL = 1 << 20


def existing(path: str | Path) -> Path:
    """The directory itself, or the nearest one above it that is there already: a run makes the rest."""
    place = Path(path).expanduser().absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def leave_mark(run_dir: str | None, mark: str | None) -> dict[str, Any]:
    """Writes a file into the run directory, for the other nodes to see. The path of the directory is as it is
    here.
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
    """The marks of this examination that can be seen here. Raises OSError where the directory cannot be read."""
    prefix = f"{MARK}-{token}"
    return sorted(
        entry.name.removeprefix(f"{MARK}-")
        for entry in os.scandir(existing(run_dir))
        if entry.name.startswith(prefix)
    )


def remove_marks(run_dir: str, token: str) -> None:
    """All that can be seen here: on a shared disk the first node removes everybody's."""
    with suppress(OSError):
        for mark in marks(run_dir, token):
            (existing(run_dir) / f"{MARK}-{mark}").unlink(missing_ok=True)


def path_facts(paths: dict[str, str]) -> dict[str, Any]:
    """Label -> path, whether it is there, and the checksum of a small file."""
    found = {}
    for label, name in paths.items():
        path = Path(name).expanduser()
        small = path.is_file() and path.stat().st_size <= _SMALL
        found[label] = {
            "path": name,
            "exists": path.exists(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if small else None,
        }
    return found


def disk_facts(run_dir: str | None) -> dict[str, Any]:
    """Free bytes where a run writes, each file system once: label -> path, free, total."""
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
    """Bytes of shared memory, through which NCCL, gloo and data loaders talk within a node."""
    usage = shutil.disk_usage("/dev/shm")
    return {"free": usage.free, "total": usage.total}


def hub_facts(model: str | None, needed: bool) -> dict[str, Any]:
    """model: a repository on the hub. The hub is asked unless that is cached, or nothing is needed from it."""
    from distlora.models import hub

    cached = model is not None and hub.is_cached(model)
    return {
        "model": model,
        "cache": hub.cache_directory(),
        "cached": cached,
        "needed": needed,
        "problem": None if cached or not needed else hub.problem_with_access(PATIENCE),
    }
